"""Which parameters train, and how they are saved. A method is a module with

attach(model, recipe) -> parameter groups   makes what trains, in float32; each group has a name, its params and an lr
state(model, recipe) -> {name: tensor}      what trains, for a checkpoint
restore(model, recipe, tensors)             puts those tensors back
save(model, folder, recipe)                 what users and other tools load
load(model, folder, recipe)                 loads a saved result into a fresh base
start_from(model, recipe, source) -> bool   fills what `attach` made from a user's file; False if it holds nothing for it

A group's name is that of the network it is in. Methods compose: ["textual-inversion", "lora"] is pivotal tuning.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from personalize.common import distributed
from personalize.common.errors import UserError, nearest
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import ADAPTERS, Lora
from personalize.formats import safetensors_io
from personalize.methods import quantization
from personalize.models import fast_unet
from personalize.models.interface import LatentModel

METHODS = {
    "full": "full", **dict.fromkeys(ADAPTERS, "lora"),
    "textual-inversion": "textual_inversion", "custom-diffusion": "custom_diffusion",
}  # fmt: skip
FACTOR = re.compile(r"\.(lora_B|lokr_w1|lokr_w1_a|hada_w1_a)(\.weight)?$")  # an adapter's update is linear in it
IN_PLACE = re.compile(r"^full:|_custom_diffusion\.weight$")  # weights of the base that train themselves
BASE_TRAINS = ("full", "custom-diffusion")  # these write into the base's own weights; all others only add to them
WITH_A_WORD = ("textual-inversion", "custom-diffusion")  # these learn the token itself, so it must be a new word


def check_methods(names: Sequence[str], *, quantize: str = "", text_encoder: bool = False, lora: Lora | None = None) -> None:
    """UserError for an unknown method, for methods that do not go together, or for settings that a method does not have."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}{nearest(name, METHODS) or '.'} Known: {', '.join(METHODS)}.")
    adapters = [name for name in names if name in ADAPTERS]
    if len(names) != 1 and (len(adapters) != 1 or set(names) - set(adapters) != {"textual-inversion"} or len(names) != 2):
        raise UserError(
            f"train.methods = {list(names)} do not go together: give one of {', '.join(METHODS)}, "
            "or textual-inversion and one adapter."
        )
    if quantize and not set(names) <= {*ADAPTERS, "textual-inversion"}:
        raise UserError(
            f"train.quantize = {quantize!r} is for adapters, whose base is frozen; {names[0]} trains the base itself."
        )
    if text_encoder and not set(names) & {"full", *ADAPTERS}:
        raise UserError(f"train.text_encoder = true does not go with {names[0]}, which trains the embedding of the token only.")
    if adapters:
        from personalize.methods.lora import check_adapter

        check_adapter(adapters[0], lora or Lora(), quantize)


def check_split_weights(recipe: Recipe, dtype: torch.dtype) -> None:
    """UserError where `train.masters = split` is set and the master weights cannot be split."""
    train, why = recipe.train, ""
    if train.masters != "split":
        return
    if dtype != torch.bfloat16:
        why = f"the model computes in {str(dtype).removeprefix('torch.')}; give dtype=bfloat16"
    elif train.methods != ("full",):
        why = f"{', '.join(train.methods)} trains few weights; use it with train.methods=full"
    elif not (row := OPTIMIZERS[train.optimizer]).split:
        why = f"{row.title} looks at whole weights, one tensor at a time; give train.optimizer=adamw"
    elif train.ema:
        why = "EMA needs whole weights; give train.ema=0"
    elif train.accumulate > 1:
        why = "the parts of a batch would add up in bfloat16; give train.accumulate=1"
    if why:
        raise UserError(f"train.masters = 'split' is not possible: {why}, or train.masters=float32.")


def check_offload(recipe: Recipe) -> None:
    """UserError where `train.offload` is set and the U-Net's blocks cannot wait in the host's memory."""
    train, why = recipe.train, ""
    if not train.offload:
        return
    if "full" in train.methods:
        why = (
            "full trains every block, so its gradients and AdamW's moments stay where the optimizer steps, on the device: "
            "of SDXL's U-Net 41 GB, or 21 with train.masters=split and adamw8bit. Give train.methods=lora"
        )
    elif train.quantize:
        why = "quantized weights have their scales beside them, which do not wait; give train.quantize=''"
    elif train.engine != "eager":
        why = f"train.engine={train.engine} keeps the addresses of weights, which are new each time; give train.engine=eager"
    elif not train.gradient_checkpointing:
        why = "each block would stay until its gradient is computed; give train.gradient_checkpointing=true"
    if why:
        raise UserError(f"train.offload = true is not possible: {why}, or train.offload=false.")


def attach(
    model: LatentModel, recipe: Recipe, *, quantize: Callable[[nn.Module, str], None] = quantization.quantize
) -> list[dict]:
    """The parameter groups of all methods of the recipe, in float32. Nothing else of the model's networks trains."""
    train = recipe.train
    check_methods(train.methods, quantize=train.quantize, text_encoder=train.text_encoder, lora=recipe.lora)
    if train.quantize:
        quantize(model.unet, train.quantize)
    groups = [group for module in _modules(train.methods).values() for group in module.attach(model, recipe)]
    trained = {id(p) for group in groups for p in group["params"]}
    for network in model.networks.values():  # PEFT freezes all that is not its own, even the rows of a learned word
        for p in network.parameters():
            p.requires_grad_(id(p) in trained)
    model.settle()
    for name in {group["name"] for group in groups}:
        model.networks[name].train()
    if train.gradient_checkpointing:
        # Also in what does not train itself: gradients of the text go through the U-Net.
        keeps_generator = fast_unet.has_dropout(model.unet)
        model.unet.enable_gradient_checkpointing(None if keeps_generator else fast_unet.recomputed)
        for encoder in model.text_encoders.values():
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return groups


def state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    """What trains, by "method:name"; the tensors are the live ones."""
    modules = _modules(recipe.train.methods)
    return {f"{name}:{k}": v.detach() for name, module in modules.items() for k, v in module.state(model, recipe).items()}


def restore(model: LatentModel, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    """Puts what `state` returned into a model to which the same methods are attached."""
    for name, module in _modules(recipe.train.methods).items():
        module.restore(model, recipe, {k.removeprefix(f"{name}:"): v for k, v in tensors.items() if k.startswith(f"{name}:")})


def base_state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    """Copies on the CPU of what trains in place, as the base has it: call it after `attach`. Adapters and words have none."""
    return {key: value.to("cpu", copy=True) for key, value in state(model, recipe).items() if IN_PLACE.search(key)}


def set_strength(model: LatentModel, recipe: Recipe, strength: float, base: Mapping[str, Tensor]) -> None:
    """Makes what was trained act `strength` times: an adapter's update is scaled, other weights lie so far from the base's.

    base: what `base_state` gave. A learned word stays as it is, and so does a method without `has_strength`.
    """
    tensors = state(model, recipe)
    for key, value in tensors.items():
        if key in base:
            tensors[key] = torch.lerp(base[key].to(value), value, strength).cpu()  # all of them are held at once
        elif FACTOR.search(key):
            tensors[key] = strength * value
    restore(model, recipe, tensors)


def has_strength(names: Sequence[str]) -> bool:
    """Whether the effect of these methods can be scaled. oft and boft rotate, and a word alone has no strength."""
    return bool(set(names) & {"full", "custom-diffusion", "lora", "lokr", "loha"})


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Saves the result of each method, side by side in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in _modules(recipe.train.methods).values():
        module.save(model, folder, recipe)


def load(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Loads a saved result into a fresh base. UserError where a file is missing or was made for another base."""
    for module in _modules(recipe.train.methods).values():
        module.load(model, folder, recipe)


def start_from(model: LatentModel, recipe: Recipe) -> None:
    """After `attach`: training starts from the adapter, the embedding or both in `train.init_from`.

    UserError where it holds nothing for the methods, or what it holds has another shape than the recipe's.
    """
    source = init_source(recipe)
    was_filled = [module.start_from(model, recipe, source) for module in _modules(recipe.train.methods).values()]
    if not any(was_filled):
        raise UserError(f"train.init_from = {str(source)!r} holds nothing for {', '.join(recipe.train.methods)}.")


def init_source(recipe: Recipe) -> Path:
    """The file or folder that `train.init_from` names; of a run its result. UserError for one that cannot be read."""
    source = Path(recipe.train.init_from).expanduser()
    if not source.exists():
        raise UserError(f"train.init_from = {str(source)!r}: there is no such file or folder.")
    safetensors_io.refuse_pickle(source, "what to start from")
    source = source / "model" if (source / "manifest.json").exists() else source
    files = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
    if not files:
        raise UserError(
            f"train.init_from = {str(source)!r} holds no .safetensors file. Give a run, its export, or such a file."
        )
    for file in files:
        safetensors_io.read_header(file)
    return source


def unfreeze(module: nn.Module) -> list[nn.Parameter]:
    """Makes all parameters of a module trainable, in float32 -> the parameters."""
    module.float().requires_grad_(True)
    return list(module.parameters())


def require_folder(folder: Path, file: str) -> Path:
    """The path of a file in a saved result. UserError where it is missing."""
    if not (folder / file).exists():
        raise UserError(f"{folder} has no {file}: the run did not finish saving, or the file was deleted. Train it again.")
    return folder / file


def as_in(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of `network`: some versions of transformers have "text_model." in them, others not."""
    if not hasattr(network, "text_model"):
        return {key.removeprefix("text_model."): value for key, value in tensors.items()}
    if any(key.startswith("text_model.") for key in tensors):
        return tensors
    return {key if key.startswith("text_projection") else f"text_model.{key}": value for key, value in tensors.items()}


def copy_all(target: dict[str, Tensor], source: dict[str, Tensor], *, what: str) -> None:
    """Copies values into the live tensors of `target`. UserError for other names or shapes; `what` begins its sentence."""
    for key in sorted(source.keys() - target.keys()):
        raise UserError(f"{what}: it has {key}, expected are names such as {min(target, default='none')}.")
    for key in sorted(target.keys() - source.keys()):
        raise UserError(f"{what}: it lacks {key}, which is expected.")
    for key, value in target.items():
        if value.shape != source[key].shape:
            raise UserError(f"{what}: {key} has the shape {tuple(source[key].shape)}, expected is {tuple(value.shape)}.")
    for key, value in target.items():
        value.detach().copy_(distributed.shard_like(source[key], value))


def _modules(names: Sequence[str]) -> dict[str, ModuleType]:
    return {name: importlib.import_module(f"personalize.methods.{METHODS[name]}") for name in names}
