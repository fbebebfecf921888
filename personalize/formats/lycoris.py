"""LoKr and LoHa in LyCORIS' form: Kronecker and Hadamard products of small matrices (Yeh et al. 2309.14859).

The update of a weight (out,in[,k,k]) is `scale` times, by `lycoris/modules/lokr.py` and `loha.py`,
lokr   kron(w1, w2): w1 is (a,c) or w1_a (a,r) @ w1_b (r,c); w2 is (b,d[,k,k]) or w2_a (b,r) @ w2_b (r,d[·k·k])
loha   (w1_a @ w1_b) * (w2_a @ w2_b): w_a (out,r), w_b (r,in[·k·k])
A Tucker core t (r,r,k,k) goes between the two of a product, w_a (r,out) and w_b (r,in). scale is alpha / r, and 1 where no
product has a rank.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.formats import lora, lora_names
from personalize.formats.lora_names import ALPHA, MAGNITUDE, split_key
from personalize.formats.safetensors_io import Header, load_tensors, read_header, refuse_pickle, save_tensors

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {part: {layer: of its weight}}
KINDS = {"lokr": "lokr_", "loha": "hada_"}  # -> what its tensors begin with
NOT_READ = {key: kind for key, kind in lora.NOT_READ.items() if "lokr" not in key}
SCALED = ("lokr_w1", "lokr_w1_a", "hada_w1_a")  # of each kind and form the one that takes the scale
RANKED = ("lokr_w1_b", "lokr_w2_b", "hada_w1_b")  # (r,...)
EXACT = 1e-5  # what a matrix may lose, as part of its norm, where it is split into a product


@dataclass(frozen=True)
class Adapter:
    """kind: one of KINDS; layers: {`part.dotted.name`: {"lokr_w1": tensor, …}}, in float32 and with a scale of 1."""

    kind: str
    layers: dict[str, dict[str, Tensor]]


def kind_of(header: Header) -> str:
    """The kind that a file holds, or "" for none."""
    roles = {split[1] for key in header["tensors"] if (split := split_key(key))}
    return next((kind for kind, start in KINDS.items() if any(role.startswith(start) for role in roles)), "")


def read_lycoris(path: Path, shapes: Shapes, base: str) -> Adapter:
    """The LoKr or LoHa in a file, for the base whose layers have weights of these shapes.

    UserError where it holds something else too, is not whole, or does not fit the base.
    """
    refuse_pickle(path, "an adapter")
    header = read_header(path)
    kind = kind_of(header)
    lora.refuse_kinds(path, header["tensors"], NOT_READ)
    tensors, layers = load_tensors(path), {}
    for (part, layer), keys in sorted(lora.keys_by_layer(path, header, shapes, base).items()):
        name = f"{part}.{layer}"
        if MAGNITUDE in keys:
            raise UserError(
                f"{path} is a {kind} with dora_scale, which is not read ({keys[MAGNITUDE]}). Train it without dora_wd."
            )
        if others := [key for role, key in keys.items() if not role.startswith(KINDS[kind]) and role != ALPHA]:
            raise UserError(f"{path} holds a {kind} and something else in one file, which is not read, such as {others[0]!r}.")
        alpha = lora.number(path, keys[ALPHA], tensors[keys[ALPHA]]) if ALPHA in keys else 0.0
        factors = {role: _flat(role, tensors[key].float()) for role, key in keys.items() if role != ALPHA}
        _require_fits(path, name, kind, factors, shapes[part][layer])
        rank = _rank(factors)
        layers[name] = scaled(factors, alpha / rank if alpha and rank else 1.0)
    return Adapter(kind, layers)


def write_kohya(
    path: Path,
    adapter: Adapter,
    shapes: Shapes,
    *,
    family: str,
    half: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write it as LyCORIS' trainer does and ComfyUI, Forge and AUTOMATIC1111 read it; `family` as for LoRA.

    Alpha is the rank, and the scale is in the weights: LyCORIS' own merge applies alpha / rank twice.
    """
    names = lora_names.kohya_names(adapter.layers, family=family, unet=shapes["unet"])
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.layers.items():
        part, _, layer = name.partition(".")
        whole = _whole(factors, shapes[part][layer])
        tensors |= {f"{names[name]}.{role}": value.half() if half else value for role, value in whole.items()}
        tensors[f"{names[name]}.alpha"] = torch.tensor(float(_rank(whole) or 1))
    sd2 = any(layer.endswith("attn2.to_k") and shape[1] == lora.SD2_WIDTH for layer, shape in shapes["unet"].items())
    rank = max(map(_rank, adapter.layers.values()), default=0) or 1
    header = lora.kohya_metadata(family, sd2=sd2, module="lycoris.kohya", rank=rank, alpha=rank)
    save_tensors(path, tensors, header | {"ss_network_args": f'{{"algo": "{adapter.kind}"}}'} | dict(metadata or {}))


def delta(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The update of a weight of this shape. KeyError or RuntimeError where the factors do not make one."""
    if any(role.startswith("hada") for role in factors):
        return (_product(factors, "hada_w1", "hada_t1") * _product(factors, "hada_w2", "hada_t2")).reshape(shape)
    w1, w2 = _product(factors, "lokr_w1"), _product(factors, "lokr_w2", "lokr_t2")
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous()).reshape(shape)


def scaled(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The factors of `scale` times the update."""
    return {role: value * scale if role in SCALED and scale != 1 else value for role, value in factors.items()}


def fitted(what: str, factors: Mapping[str, Tensor], wanted: Collection[str], rank: int) -> dict[str, Tensor]:
    """The same update in the factors that training has, `wanted`, of this rank.

    UserError, beginning with `what`, where they cannot express it.
    """
    if set(wanted) == set(factors) and _rank(factors) in (0, rank):
        return dict(factors)
    if any("hada" in role for role in factors) or "lokr_t2" in wanted:
        if set(wanted) == set(factors):
            raise UserError(
                f"{what} has the rank {_rank(factors)}, expected is the recipe's {rank}. Set lora.rank = {_rank(factors)}."
            )
        raise UserError(f"{what} has the factors {', '.join(sorted(factors))}, training has {', '.join(sorted(wanted))}.")
    made: dict[str, Tensor] = {}
    for stem in ("lokr_w1", "lokr_w2"):
        product = _product(factors, stem, "lokr_t2" if stem == "lokr_w2" else "")
        made |= {stem: product} if stem in wanted else _split(what, stem, product.flatten(1), rank)
    return made


def _split(what: str, stem: str, matrix: Tensor, rank: int) -> dict[str, Tensor]:
    """A matrix (n,m) as a product of (n,rank) and (rank,m), by its singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    if s[rank:].norm() > EXACT * s.norm():
        needed = int((s > EXACT * s.norm()).sum())
        raise UserError(f"{what}: {stem} has the rank {needed}, more than the recipe's {rank}. Set lora.rank = {needed}.")
    root, kept = s[:rank].sqrt(), min(rank, len(s))
    a, b = torch.zeros(len(matrix), rank), torch.zeros(rank, matrix.shape[1])
    a[:, :kept], b[:kept] = u[:, :rank] * root, root[:, None] * v[:rank]
    return {f"{stem}_a": a, f"{stem}_b": b}


def _product(factors: Mapping[str, Tensor], stem: str, core: str = "") -> Tensor:
    if stem in factors:
        return factors[stem]
    a, b = factors[f"{stem}_a"], factors[f"{stem}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", factors[core], a, b) if core in factors else a @ b


def _rank(factors: Mapping[str, Tensor]) -> int:
    """The rank by which alpha is divided; 0 where all is whole."""
    return next((len(factors[role]) for role in RANKED if role in factors), 0)


def _flat(role: str, value: Tensor) -> Tensor:
    """Factors of a product as matrices: some versions keep a convolution's window in w_b."""
    return value.flatten(1) if role.endswith(("_a", "_b")) and value.ndim > 2 else value


def _whole(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A lokr as two whole matrices, small as they are: no alpha, no rank, one reading.

    LyCORIS guesses the layout of w2's factors from their shapes, wrongly for some convolutions (1920 to 640); AUTOMATIC1111's
    reader stops at them.
    """
    if "hada_w1_a" in factors:
        return dict(factors)
    w1, w2 = _product(factors, "lokr_w1"), _product(factors, "lokr_w2", "lokr_t2")
    return {"lokr_w1": w1, "lokr_w2": w2.reshape(len(w2), -1, *shape[2:]).contiguous()}


def _require_fits(path: Path, name: str, kind: str, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    roles = ", ".join(sorted(factors))
    on_meta = {role: value.to("meta") for role, value in factors.items()}  # shapes alone: nothing is computed
    try:
        stems = ("lokr_w1", "lokr_w2") if kind == "lokr" else ("hada_w1", "hada_w2")
        outputs = [len(_product(on_meta, stem, stem.replace("_w", "_t"))) for stem in stems]
        fits = shape[0] == (outputs[0] * outputs[1] if kind == "lokr" else outputs[0])
        delta(on_meta, shape)
    except KeyError as error:
        raise UserError(f"{path} has only {roles} of layer {name}, not {error}: it is not whole. Download it again.") from None
    except (RuntimeError, TypeError):
        fits = False
    if not fits or any(0 in value.shape for value in factors.values()):
        sizes = ", ".join(f"{role} {tuple(value.shape)}" for role, value in sorted(factors.items()))
        raise UserError(
            f"{path} was made for another base, or is damaged: its layer {name} has {sizes}, which makes no change of a "
            f"weight of shape {shape}. Use the base that it was trained on."
        )
