"""The LoRA family, through PEFT: small trained changes to frozen layers.

lora   W + s B A, s = alpha / rank (Hu et al. 2106.09685); DoRA (2402.09353) and rsLoRA (2312.03732) as settings
lokr   a Kronecker product, loha a Hadamard product, of low-rank matrices (LyCORIS, Yeh et al. 2309.14859)
oft    inputs turned by block-diagonal rotations (Qiu et al. 2306.07280), boft by butterflies of them (Liu et al. 2311.06243)

A fresh adapter is exactly the identity, except PEFT's oft on convolutions, which is refused.
"""

import math
from pathlib import Path

from torch import Tensor, nn

from personalize.common.errors import UserError, nearest
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import ADAPTERS, Lora
from personalize.formats import lycoris
from personalize.methods import adapter_files, copy_all, peft_layers, require_folder
from personalize.methods.adapter_files import Part
from personalize.models.interface import LatentModel

NAME = "default"  # of the adapter that trains, or that was loaded as a run's result
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")  # of a U-Net's blocks
CONFIGS = {
    "lora": (
        "LoraConfig",
        lambda s: {"r": s.rank, "lora_alpha": s.alpha or s.rank, "use_dora": s.dora, "use_rslora": s.rslora},
    ),
    "lokr": ("LoKrConfig", lambda s: {"r": s.rank, "alpha": s.alpha or s.rank}),
    "loha": ("LoHaConfig", lambda s: {"r": s.rank, "alpha": s.alpha or s.rank}),
    # PEFT's default is a truncated series, which is a rotation near the identity only.
    "oft": ("OFTConfig", lambda s: {"r": 0, "oft_block_size": s.block, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", lambda s: {"boft_block_size": s.block}),
}
SETTINGS = {"r": "lora.rank", "use_dora": "lora.dora", "oft_block_size": "lora.block", "boft_block_size": "lora.block"}
MOST_BYTES = 16 << 30  # boft keeps a permutation matrix of width² in every layer


def check_adapter(kind: str, lora: Lora, quantize: str) -> None:
    """UserError for settings that this kind of adapter does not have."""
    for setting in ("dora", "rslora"):
        if kind != "lora" and getattr(lora, setting):
            raise UserError(
                f"lora.{setting} = true is for lora, not for {kind}. Set train.methods = lora, or lora.{setting} = false."
            )
    if kind != "lora" and lora.plus_ratio != 1:
        raise UserError(
            f"lora.plus_ratio = {lora.plus_ratio:g} is for lora, which has A and B, not for {kind}. Set train.methods = lora, "
            "or lora.plus_ratio = 1."
        )
    if kind == "oft" and lora.conv:
        raise UserError(
            "lora.conv = true does not go with oft: on convolutions a fresh one already changes the image. Use boft."
        )
    if quantize == "4bit" and kind in ("lokr", "loha"):
        raise UserError(
            f"train.quantize = '4bit' does not go with {kind}, which needs the shape of the weight. Use 8bit, or lora."
        )
    if quantize == "8bit" and lora.dora:
        raise UserError("train.quantize = '8bit' does not go with lora.dora, which needs the weight's norm. Use 4bit.")


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """Parameter groups in float32 whatever the base's dtype; a fresh adapter changes nothing."""
    peft = peft_layers.import_peft()
    kind, train = _kind(recipe), recipe.train
    name, fields = CONFIGS[kind]
    groups = []
    for part, network in _parts(model, recipe).items():
        targets = [*recipe.lora.targets, *CONVOLUTIONS * recipe.lora.conv] if part == "unet" else list(TEXT_TARGETS)
        _check_targets(network, recipe.lora.targets if part == "unet" else targets, model.name)
        if kind in ("oft", "boft"):
            _check_block(kind, recipe.lora.block, peft_layers.matching_layers(network, targets))
        config = getattr(peft, name)(target_modules=targets, **fields(recipe.lora))
        params = peft_layers.inject_adapter(network, config, name=NAME, what=f"lora.targets = {targets}")
        lr = train.lr if part == "unet" else train.text_lr or train.lr
        groups += _at_rates(network, part, params, lr, recipe.lora.plus_ratio)
    return groups


def _at_rates(network: nn.Module, part: str, params: list[nn.Parameter], lr: float, ratio: float) -> list[dict]:
    """The group of one network; with LoRA+ (Hayou et al. 2402.12354) two, B and DoRA's magnitudes at `ratio` times the rate."""
    if ratio == 1:
        return [{"name": part, "params": params, "lr": lr}]
    names = {id(p): name for name, p in network.named_parameters()}
    parts = {False: [], True: []}
    for p in params:
        parts[".lora_B." in names[id(p)] or p.ndim == 1].append(p)
    return [{"name": part, "params": parts[fast], "lr": ratio * lr if fast else lr} for fast in parts]


def state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part, adapter in _attached(model, recipe).items() for k, v in adapter.tensors.items()}


def restore(model: LatentModel, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    copy_all(state(model, recipe), tensors, what=f"this adapter was made for another base than {model.name!r}")


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """`pytorch_lora_weights.safetensors` for lora, else a PEFT folder `<network>_adapter` for each network."""
    adapter_files.write_adapter(folder, _attached(model, recipe))


def load(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Loads a run's adapters. UserError where they are missing, or of another base, kind or rank."""
    for part in _parts(model, recipe):
        peft_file = f"{part}{adapter_files.ENDING}/{adapter_files.TENSORS}"
        require_folder(folder, adapter_files.FILE if _kind(recipe) == "lora" else peft_file)
    attach(model, recipe)
    _fill(model, recipe, folder, what=f"{folder} was made for another base than {model.name!r}, or for another recipe")


def load_adapter(model: LatentModel, source: Path, *, name: str, weight: float) -> None:
    """Adds a user's adapter to those attached: a LoRA, LoKr or LoHa file, or a folder of ours or of PEFT.

    `name` is new to the model; `weight` times the adapter's effect is added. UserError for an adapter that is damaged or was
    made for another base, and for a weight other than 1 of oft and boft, which rotate and do not add.
    """
    source = source / "model" if (source / "model").is_dir() else source
    if not source.exists():
        raise UserError(f"there is no adapter {str(source)!r}. Give a .safetensors file, or the folder of a run or of PEFT.")
    what = f"{source} was made for another base than {model.name!r}"
    for part, adapter in adapter_files.read_adapter(source, model).items():
        network = adapter_files.adapted_networks(model)[part]
        peft_layers.add_differences(network, adapter.differences, weight, what=what)
        if adapter.config is None:
            continue
        if weight != 1 and adapter.kind in ("oft", "boft"):
            raise UserError(f"{source} is {adapter.kind}, which has no weight: {weight:g} is not possible, give 1.")
        for p in peft_layers.inject_adapter(network, adapter.config, name=name, what=what):
            p.requires_grad_(False)
        if adapter.loose:
            peft_layers.put_factors(network, name, adapter.tensors)
        else:
            copy_all(peft_layers.adapter_tensors(network, name), adapter.tensors, what=what)
        peft_layers.set_adapter_scale(network, name, weight)
    model.settle()


def start_from(model: LatentModel, recipe: Recipe, source: Path) -> bool:
    """Copies an adapter into the one that trains. UserError where its kind, rank or layers are not the recipe's."""
    if adapter_files.holds_adapter(source):
        _fill(model, recipe, source, what=f"train.init_from = {str(source)!r} and the recipe adapt other layers")
        return True
    return False


def put_rows(state: dict[str, Tensor], factors: dict[str, Tensor], *, first: int, scale: float) -> int:
    """Makes a LoRA {"….lora_A.weight": (r,in)} rows `first` to `first` + r of the one with the live tensors `state` -> r.

    scale: of its update, where that of `state` is 1. UserError for a layer that `state` lacks.
    """
    rank = 0
    for key, value in factors.items():
        if key not in state:
            raise UserError(f"a LoRA of {key.rpartition('.lora_')[0]} does not fit: lora.targets lacks this layer. Add it.")
        if key.endswith(".lora_A.weight"):
            state[key][first : first + len(value)].copy_(value)
            rank = max(rank, len(value))
        else:
            state[key][:, first : first + value.shape[1]].copy_(scale * value)
    return rank


def fuse_adapters(model: LatentModel) -> None:
    """Merges every adapter into the weights: the networks are plain diffusers and transformers modules again.

    UserError where the base is quantized: it has no such weights.
    """
    for part, network in model.networks.items():
        if any(getattr(network, f"is_loaded_in_{bits}", False) for bits in ("8bit", "4bit")):
            raise UserError(
                f"the {part} is quantized, so no adapter can go into its weights. Load the adapter into the plain base."
            )
        peft_layers.merge_adapter(network)


def _fill(model: LatentModel, recipe: Recipe, source: Path, *, what: str) -> None:
    """Copies an adapter into the attached one of the same kind, rank, scale and layers."""
    given, attached = adapter_files.read_adapter(source, model), _attached(model, recipe)
    _require_adapter_alone(given, source)
    if given.keys() != attached.keys():
        has, wanted = (" and ".join(sorted(parts)) for parts in (given, attached))
        raise UserError(f"{source} has adapters of {has}, expected are {wanted}. Set train.text_encoder to what it was.")
    for part, adapter in attached.items():
        _check_same(given[part], adapter, source)
        theirs = _tightened(given[part], adapter, source) if given[part].loose else given[part].tensors
        copy_all(adapter.tensors, theirs, what=what)


def _tightened(theirs: Part, ours: Part, source: Path) -> dict[str, Tensor]:
    """The tensors of LyCORIS' factors in the form, rank and scale of the adapter that trains: their update is the same."""
    wanted, tensors = adapter_files.layers_of({"": ours}), {}
    for layer, factors in adapter_files.layers_of({"": theirs}).items():
        if layer in wanted:  # a layer too many is told by its name
            scaled = lycoris.scaled(factors, ours.config.r / ours.alpha)
            factors = lycoris.fitted(f"{source}: layer {layer[1:]}", scaled, wanted[layer], ours.config.r)
        tensors |= {f"{layer[1:]}.{role}": value for role, value in factors.items()}
    return tensors


def _attached(model: LatentModel, recipe: Recipe) -> dict[str, Part]:
    """The attached adapters with live tensors, by network."""
    networks = _parts(model, recipe).items()
    return {part: Part(network.peft_config[NAME], peft_layers.adapter_tensors(network, NAME)) for part, network in networks}


def _kind(recipe: Recipe) -> str:
    return next(name for name in recipe.train.methods if name in ADAPTERS)


def _parts(model: LatentModel, recipe: Recipe) -> dict[str, nn.Module]:
    return {"unet": model.unet, **(model.text_encoders if recipe.train.text_encoder else {})}


def _check_targets(network: nn.Module, targets, base: str) -> None:
    for target in targets:
        if not peft_layers.matching_layers(network, [target]):
            ends = {
                name.split(".", i)[-1] for name in peft_layers.adaptable_layers(network) for i in range(name.count(".") + 1)
            }
            raise UserError(
                f"lora.targets = {list(targets)}: no layer of base {base!r} is called {target!r}{nearest(target, ends)} "
                "Expected are ends of names, such as to_q or ff.net.2."
            )


def _check_block(kind: str, block: int, layers: dict[str, nn.Module]) -> None:
    widths = {
        name: layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels * layer.kernel_size[0] ** 2
        for name, layer in layers.items()
    }
    for name, width in widths.items():
        if width % block:
            raise UserError(
                f"lora.block = {block} does not divide the width {width} of layer {name}. "
                f"Give a divisor of {math.gcd(*widths.values())}."
            )
    needed = 4 * sum(width**2 for width in widths.values())
    if kind == "boft" and needed > MOST_BYTES:
        raise UserError(f"boft would keep {needed >> 30} GB of permutations. Set lora.conv = false, or fewer lora.targets.")


def _require_adapter_alone(given: dict[str, Part], source: Path) -> None:
    """UserError for a file with more than an adapter, which the one that trains cannot hold."""
    for name, part in given.items():
        if part.differences:
            example = (
                f"{len(part.differences)} changes of weights and biases themselves, such as of {name}.{min(part.differences)}"
            )
            raise UserError(
                f"{source} holds {example}, from which no adapter can go on. Save it without them (LyCORIS: train_norm=False; "
                "PEFT: bias, lora_bias), or draw with it by generate --lora."
            )
        if part.words:
            raise UserError(
                f"{source} holds embeddings of {', '.join(map(repr, part.words))}, from which no adapter can go on. Save it "
                "without them (OneTrainer: Bundle Embeddings), or draw with it by generate --lora."
            )


def _check_same(theirs: Part, ours: Part, source: Path) -> None:
    if theirs.kind != ours.kind:
        raise UserError(f"{source} is a {theirs.kind}, but train.methods has {ours.kind}. Set train.methods = {theirs.kind}.")
    if theirs.loose:
        return
    if getattr(theirs.config, "rank_pattern", None) or getattr(theirs.config, "alpha_pattern", None):
        raise UserError(
            f"{source} has ranks or alphas that differ by layer, which a recipe cannot say. Merge it into the base."
        )
    for field, setting in SETTINGS.items():
        has, wanted = getattr(theirs.config, field, None), getattr(ours.config, field, None)
        if has != wanted:
            raise UserError(f"{source} has {setting} = {has}, expected is the recipe's {wanted}. Set {setting} = {has}.")
    if not math.isclose(theirs.alpha, ours.alpha, rel_tol=1e-6):
        raise UserError(f"{source} has alpha {theirs.alpha:g}, expected is the recipe's {ours.alpha:g}. Set lora.alpha.")
