"""LoRA files of several programs in one form: PEFT's names below the part's (`unet.….lora_A.weight`), rank and alpha by layer.

The update of a layer is `alpha / rank * up @ down` (Hu et al. 2106.09685; kohya's `networks/lora.py`; PEFT's `LoraLayer`).
A file without alpha means alpha = rank, as in kohya's and diffusers' loaders.

Beside it a file may change weights and biases by a plain difference, without alpha: `diff` and `diff_b` of whole layers,
`w_norm` and `b_norm` of norms (LyCORIS, modules/full.py and norms.py); or by the bias of PEFT's `lora_B`, with it.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.formats import detect, lora_names
from personalize.formats.embedding import BUNDLED, bundled_words
from personalize.formats.lora_names import ALPHA, BARE, BIAS, DOWN, MAGNITUDE, UP, UP_BIAS, WEIGHT, Layer
from personalize.formats.safetensors_io import Header, load_tensors, read_header, refuse_pickle, save_tensors

HEADER = "lora_adapter_metadata"  # diffusers' name for the adapters' settings, as JSON
SIBLING = "adapter_config.json"  # PEFT's, beside the weights
# what a key looks like -> what it holds, which is not read. Left out without a word, the rest would draw something else.
NOT_READ = {
    r"\.(hada|lokr)_": "a LoHa or LoKr beside a LoRA (LyCORIS)",
    r"\.lora_mid\.": "a LoCon with a Tucker core (LyCORIS)",
    r"\.oft_": "an OFT",
    r"\.boft_": "a BOFT",
    r"\.on_input$": "an (IA)^3 (LyCORIS)",
    r"\.[ab][12]\.weight$": "a GLoRA (LyCORIS)",
    r"\.lora_embedding_": "a LoRA of embeddings",
    r"\.(set_weight|reshape_weight)$|\.modules_to_save\.": "whole modules (PEFT: modules_to_save)",
}
SD2_WIDTH = 1024  # of its text encoder, by which an SD2 is told from an SD1


@dataclass(frozen=True)
class Adapter:
    """A LoRA by layer `part.dotted.name`: down (r,in[,k,k]) is lora_A, up (out,r[,1,1]) lora_B; a DoRA's magnitude too."""

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    alphas: dict[str, float]
    differences: dict[str, Tensor] = field(default_factory=dict)  # {"part.dotted.name.weight" or ".bias": what is added}
    words: tuple[str, ...] = ()  # whose embeddings are in the file: `embedding.read_bundled`


def read_lora(path: Path, layers: Mapping[str, Collection[str]], base: str) -> Adapter:
    """The LoRA in a `.safetensors` of diffusers, PEFT, kohya or LyCORIS (LoCon), for the base with these layers.

    `layers` is {part: dotted names of its Linear and Conv2d, and of norms, which have plain differences}. UserError where the
    file is not a LoRA, is not whole, or has layers that the base lacks; whether the widths are the base's is the caller's to
    check.
    """
    path = Path(path)
    refuse_pickle(path, "a LoRA")
    header = read_header(path)
    _require_lora(path, {key: shape for key, (_, shape) in header["tensors"].items() if not BUNDLED.match(key)})
    by_layer = keys_by_layer(path, header, layers, base)
    settings, tensors = _settings(path, header, layers), load_tensors(path)
    adapter, ranks, alphas, differences = {}, {}, {}, {}
    for (part, layer), keys in sorted(by_layer.items()):
        name = f"{part}.{layer}"
        plain = {end: tensors[keys[role]] for role, end in ((WEIGHT, "weight"), (BIAS, "bias")) if role in keys}
        differences |= {f"{name}.{end}": value for end, value in plain.items()}
        if plain and not keys.keys() - {WEIGHT, BIAS, ALPHA}:
            continue
        down, up = (tensors[keys[role]] if role in keys else None for role in (DOWN, UP))
        ranks[name] = _rank(path, name, down, up)
        adapter |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if MAGNITUDE in keys:
            adapter[f"{name}.lora_magnitude_vector"] = _magnitude(path, name, tensors[keys[MAGNITUDE]], up)
        if ALPHA in keys:
            alphas[name] = number(path, keys[ALPHA], tensors[keys[ALPHA]])
        else:
            alphas[name] = _alpha(path, settings.get(part, {}), layer, ranks[name])
        if UP_BIAS in keys:
            bias = tensors[keys[UP_BIAS]].float() * (alphas[name] / ranks[name])
            differences[f"{name}.bias"] = differences.get(f"{name}.bias", 0) + bias
    return Adapter(adapter, ranks, alphas, differences, bundled_words(header["tensors"]))


def write_diffusers(path: Path, adapter: Adapter) -> None:
    """Write it as diffusers' `load_lora_weights` and PEFT read it: rank and alpha are in the header."""
    tensors = {_diffusers_key(key): value for key, value in adapter.tensors.items()}
    header: dict[str, Any] = {}
    for part in sorted({name.partition(".")[0] for name in adapter.ranks}):
        ranks, alphas = (_by_layer(part, values) for values in (adapter.ranks, adapter.alphas))
        dora = any(key.startswith(f"{part}.") and key.endswith(".lora_magnitude_vector") for key in adapter.tensors)
        rank, alpha = _most_common(ranks), _most_common(alphas)
        fields = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks), "use_dora": dora}
        fields["rank_pattern"] = {layer: r for layer, r in sorted(ranks.items()) if r != rank}
        fields["alpha_pattern"] = {layer: a for layer, a in sorted(alphas.items()) if a != alpha}
        header |= {f"{part}.{key}": value for key, value in fields.items()}
    save_tensors(path, tensors, {HEADER: json.dumps(header, sort_keys=True), "format": "pt"})


def with_scale_in_weights(adapter: Adapter) -> Adapter:
    """The same update with alpha equal to the rank in each layer: the scale alpha / rank goes into lora_B.

    In diffusers' form the scale lies in the header alone, which diffusers before 0.34 and ComfyUI do not read.
    """
    tensors = dict(adapter.tensors)
    for name, rank in adapter.ranks.items():
        tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"] * (adapter.alphas[name] / rank)
    return Adapter(tensors, adapter.ranks, {name: float(rank) for name, rank in adapter.ranks.items()})


def write_kohya(
    path: Path, adapter: Adapter, *, family: str, metadata: Mapping[str, str] | None = None, unet: Collection[str] | None = None
) -> None:
    """Write it as kohya's trainer, AUTOMATIC1111 and ComfyUI read it, for `family` "sd" (1.x, 2.x) or "sdxl".

    SDXL's names depend on all of the base's U-Net layers, which are `unet`, else those of the released SDXL.
    """
    names = lora_names.kohya_names(adapter.alphas, family=family, unet=unet)
    tensors: dict[str, Tensor] = {}
    for name, alpha in adapter.alphas.items():
        key = names[name]
        up = adapter.tensors[f"{name}.lora_B.weight"]
        tensors |= {f"{key}.lora_down.weight": adapter.tensors[f"{name}.lora_A.weight"], f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        if (magnitude := adapter.tensors.get(f"{name}.lora_magnitude_vector")) is not None:
            tensors[f"{key}.dora_scale"] = magnitude.reshape(-1, *[1] * (up.ndim - 1))
    cross_attention = [value for key, value in adapter.tensors.items() if key.endswith("attn2.to_k.lora_A.weight")]
    sd2 = any(value.shape[1] == SD2_WIDTH for value in cross_attention)
    rank, alpha = _most_common(adapter.ranks), _most_common(adapter.alphas)
    header = kohya_metadata(family, sd2=sd2, module="networks.lora", rank=rank, alpha=alpha)
    save_tensors(path, tensors, header | dict(metadata or {}))


def kohya_metadata(family: str, *, sd2: bool, module: str, rank: float, alpha: float) -> dict[str, str]:
    """The entries of a file's header by which other programs tell what it is for."""
    sd2 = sd2 and family == "sd"
    return {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sdxl_base_v1-0" if family == "sdxl" else "sd_v2" if sd2 else "sd_v1",
        "ss_v2": str(sd2),  # by which AUTOMATIC1111 tells 2.x
    }


def keys_by_layer(path: Path, header: Header, layers: Mapping[str, Collection[str]], base: str) -> dict[Layer, dict[str, str]]:
    """{layer: {role: key}}. UserError where a key belongs to no layer."""
    keys = {key: value for key, value in header["tensors"].items() if not BUNDLED.match(key)}
    first = max((part for part in layers if path.parent.name.startswith(part)), key=len, default="")
    index = lora_names.known_names(layers, first=first)
    roles: dict[Layer, dict[str, str]] = {}
    unknown = []
    for key in sorted(keys):
        name, role = lora_names.split_key(key) or (key, "")
        layer = index.get(name)
        if not role or layer is None:
            unknown.append(key)
        elif role in roles.setdefault(layer, {}):
            raise UserError(f"{path} has layer {'.'.join(layer)} twice: as {roles[layer][role]} and as {key}.")
        else:
            roles[layer][role] = key
    if unknown:
        why, key = _why_unknown(unknown, layers, base)
        nearest = max(sorted(index), key=lambda known: len(os.path.commonprefix([known, key])), default="none")
        raise UserError(
            f"{path} {why}: {len(unknown)} of its {len(keys)} tensors belong to no layer of it, such as {key[:160]!r} (a name "
            f"that would: {nearest!r}). Use the base that it was trained on, or save it in kohya's or diffusers' form."
        )
    return roles


def _why_unknown(unknown: list[str], layers: Mapping[str, Collection[str]], base: str) -> tuple[str, str]:
    """(whether keys are of another base, something else than a LoRA, or of layers in an unknown spelling; one such key)."""
    tails = lora_names.layer_tails(layers)
    beside, spelt = [], []
    for key in unknown:
        name, role = lora_names.split_key(key) or (key.rpartition(".")[0], "")
        words = name.replace(".", "_").split("_")
        is_of_base = any("_".join(words[k:]) in tails for k in range(len(words)))
        if not is_of_base or (role and name.startswith(lora_names.HEADS)):
            return f"was made for another base than {base!r}", key
        (spelt if role else beside).append(key)
    if beside:
        return f"holds more than a LoRA of {base!r}", beside[0]
    return f"spells layers that {base!r} has in a way unknown here", spelt[0]


def refuse_kinds(path: Path, keys: Collection[str], kinds: Mapping[str, str]) -> None:
    """UserError where a key is of one of the kinds {pattern: what it is}."""
    for pattern, kind in kinds.items():
        if found := sorted(name for name in keys if re.search(pattern, name)):
            of_all = f"{len(found)} of its {len(keys)} tensors, such as {found[0][:160]!r}"
            raise UserError(f"{path} holds {kind}, which is not read: {of_all}. Use a LoRA, LoCon, DoRA, LoKr or LoHa.")


def _require_lora(path: Path, shapes: detect.Shapes) -> None:
    refuse_kinds(path, shapes, NOT_READ)
    if detect.CONV_IN in shapes:
        raise UserError(f"{path} is a whole checkpoint, not a LoRA. Give it as the base.")
    if not any((split := lora_names.split_key(name)) and split[1] in (DOWN, WEIGHT, BIAS) for name in shapes):
        raise UserError(f"{path} is not a LoRA: none of its {len(shapes)} tensors is a lora_down or lora_A.")


def _rank(path: Path, name: str, down: Tensor | None, up: Tensor | None) -> int:
    if down is None or up is None:
        raise UserError(f"{path} has only one half of layer {name}: it is not whole. Download it again.")
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise UserError(f"{path}: the halves of layer {name} have shapes {shapes}, which do not fit each other.")
    return down.shape[0]


def _magnitude(path: Path, name: str, scale: Tensor, up: Tensor) -> Tensor:
    """A DoRA's scale as PEFT has it: (out,) for a linear layer, (1,out,1,1) for a convolution. LyCORIS may scale inputs."""
    out = up.shape[0]
    if scale.numel() != out or (scale.ndim == 2 and scale.shape[0] != out):
        raise UserError(
            f"{path} is a DoRA that scales the inputs of layer {name} (dora_scale of shape {tuple(scale.shape)} for {out} "
            "outputs), which is not read. Train it with wd_on_output."
        )
    return scale.reshape(-1) if up.ndim == 2 else scale.reshape(1, -1, 1, 1)


def number(path: Path, key: str, tensor: Tensor) -> float:
    """A tensor of one finite number, as alpha is."""
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise UserError(f"{path}: {key} is not one finite number.")
    return value


def _settings(path: Path, header: Header, layers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{part: PEFT's settings} from the file's header; for a file that PEFT wrote, from the settings file beside it."""
    if any(name.startswith(BARE) for name in header["tensors"]):
        if not (path.parent / SIBLING).exists():
            raise UserError(f"{path} is PEFT's, which keeps alpha in {SIBLING} beside it. Put that into {path.parent}.")
        return dict.fromkeys(layers, _dictionary(path.parent / SIBLING, read_json(path.parent / SIBLING)))
    try:
        settings = _dictionary(path, json.loads(header["metadata"].get(HEADER, "{}")))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its header entry {HEADER} is not JSON. Download it again.") from None
    return {part: {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")} for part in layers}


def _alpha(path: Path, settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha by PEFT's settings: the layer's own, else that of all layers, else the rank; times sqrt(rank) for rsLoRA."""
    value = settings.get("lora_alpha", rank)
    for pattern, pattern_alpha in _dictionary(path, settings.get("alpha_pattern") or {}).items():
        suffix = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", suffix):
            raise UserError(f"{path} has the alpha_pattern {pattern[:80]!r}; only plain names of layers are read there.")
        if layer == suffix or (not pattern.startswith("^") and layer.endswith(f".{suffix}")):
            value = pattern_alpha
            break
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{path} gives alpha {str(value)[:40]!r} for layer {layer}, which is no number.")
    return float(value) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def _dictionary(path: Path, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path}: its settings are not a JSON object but {str(value)[:60]!r}. Download it again.")
    return value


def _diffusers_key(key: str) -> str:
    part, _, rest = key.partition(".")
    if part == "unet":
        return key
    # without this ending transformers ignores a text encoder's magnitude and draws something else
    ending = ".weight" if rest.endswith(".lora_magnitude_vector") else ""
    return f"{part}.{lora_names.with_text_model(rest)}{ending}"


def _by_layer(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a part by layer, without `text_model.`: PEFT matches the ends of names, and so names with it too."""
    layers = {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
    return {layer.removeprefix("text_model."): _as_int(value) for layer, value in layers.items()}


def _most_common(values: Mapping[str, Any]) -> Any:
    counted = Counter(map(_as_int, values.values()))
    return max(counted, key=lambda value: (counted[value], value), default=0)


def _as_int(value: float) -> float:
    return int(value) if float(value).is_integer() else value
