"""Full fine-tuning: every weight of the U-Net, and of the text encoder if asked. Saved as a whole diffusers folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common.errors import UserError
from personalize.common.files import link_or_copy, read_json, write_json
from personalize.common.recipe import Recipe
from personalize.common.tensor_file import on_host
from personalize.common.untrusted import OBJECT, Table
from personalize.core import bf16_split
from personalize.formats import reference_configs, safetensors_io, text_encoder
from personalize.methods import as_in, copy_all, require_folder, unfreeze
from personalize.models.interface import LatentModel
from personalize.models.locate import weight_files

PLAIN_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # of an index; the third has the safety checker
SHARDS = Table({"weight_map": OBJECT}, needs=("weight_map",), remedy="Download it again.")


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """Parameter groups in float32, or with split master weights: the U-Net's, then each text encoder's."""
    train = recipe.train
    is_split = train.masters == "split" and model.dtype == torch.bfloat16
    return [
        {
            "name": part,
            "params": (_split if is_split else unfreeze)(network),
            "lr": train.lr if part == "unet" else train.text_lr or train.lr,
        }
        for part, network in _trained(model, recipe).items()
    ]


def state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    """Split weights as float32 copies in the host's memory, all others live."""
    live = _live(model, recipe)
    return {k: on_host(bf16_split.master_weight(v)) if hasattr(v, bf16_split.LOW) else v for k, v in live.items()}


def restore(model: LatentModel, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    copy_all(state(model, recipe), tensors, what=f"this state was made for another base than {model.name!r}")
    for key, live in _live(model, recipe).items():
        if hasattr(live, bf16_split.LOW):
            bf16_split.set_master_weight(live, tensors[key])


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """A folder that diffusers' `from_pretrained` loads; parts that did not train are linked to the base's.

    Parts that the base's index names and its folder lacks, such as a safety checker that was not downloaded, are
    left out of the index too, and so is what only code beside the base could build. Split weights are float32 from here on,
    in the model as in the files.
    """
    trained, base_index = _trained(model, recipe), read_json(model.folder / "model_index.json")
    index = {key: value for key, value in base_index.items() if not isinstance(value, list) and key != "_name_or_path"}
    for part in [name for name, value in base_index.items() if isinstance(value, list)]:
        kind = _plain_class(part, base_index[part])
        if part in trained:
            bf16_split.merge_halves(trained[part])
            with _on_host(trained[part], model.device):
                trained[part].save_pretrained(folder / part, safe_serialization=True)
        elif kind and (model.folder / part).is_dir():
            _link_part(model.folder / part, folder / part)
        else:
            kind = [None, None]
        index[part] = kind
        if kind != [None, None]:
            if part in model.tokenizers:
                text_encoder.write_released_keys(folder / part)
            _rewrite_config(folder / part / "config.json", {"dtype": "float32"} if part in model.tokenizers else {})
    write_json(folder / "model_index.json", dict(sorted(index.items())))


@contextmanager
def _on_host(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the network is in the host's memory: its library copies all weights where they lie before it writes them."""
    if device.type == "cpu":
        yield
        return
    network.to("cpu", memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        network.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)


def _plain_class(part: str, named: list) -> list | None:
    """What plain diffusers builds a part with: the class that personalize does, else the index's; None: code of the base's."""
    if part in reference_configs.CLASSES:
        return reference_configs.CLASSES[part]
    if len(named) == 2 and named[0] in PLAIN_LIBRARIES:
        return named
    if part.startswith("tokenizer"):
        return reference_configs.TOKENIZER
    return ["diffusers", "DDIMScheduler"] if part == "scheduler" else None


def _link_part(source: Path, target: Path) -> None:
    """Links a part's folder. Weights that are there in half precision only get the plain names, which diffusers looks for."""
    weights = weight_files(source)
    variant = ".fp16" if weights and ".fp16" in weights[0].name else ""
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".py"):
        is_weights, is_index = path.suffix == ".safetensors", ".safetensors.index" in path.name
        if (is_weights and path not in weights) or (is_index and (".fp16" in path.name) != bool(variant)):
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if is_index and variant:
            shards = read_json(path, SHARDS)
            shards["weight_map"] = {key: str(name).replace(variant, "") for key, name in shards["weight_map"].items()}
            write_json(place.with_name(path.name.replace(variant, "")), shards)
        else:
            link_or_copy(path, place.with_name(path.name.replace(variant, "")) if is_weights and variant else place)


def load(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Loads a folder's trained networks. UserError where one is missing or was made for another base."""
    require_folder(folder, "model_index.json")
    for part, module in _trained(model, recipe).items():
        files = sorted((folder / part).glob("*.safetensors"))
        require_folder(folder, f"{part}/{files[0].name if files else '*.safetensors'}")
        tensors = {k: v for file in files for k, v in safetensors_io.load_tensors(file).items()}
        what = f"{folder / part} was made for another base than {model.name!r}"
        copy_all(module.state_dict(), as_in(module, tensors), what=what)


def start_from(model: LatentModel, recipe: Recipe, source: Path) -> bool:
    raise UserError(
        f"train.init_from = {str(source)!r} is for adapters and embeddings. To go on from a whole model give it as base = …"
    )


def _trained(model: LatentModel, recipe: Recipe) -> dict[str, nn.Module]:
    return {"unet": model.unet, **(model.text_encoders if recipe.train.text_encoder else {})}


def _live(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    parts = _trained(model, recipe)
    return {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict(keep_vars=True).items()}


def _split(module: nn.Module) -> list[nn.Parameter]:
    """Makes all parameters of a bfloat16 module trainable, each with its lower half -> the parameters."""
    for p in module.requires_grad_(True).parameters():
        bf16_split.add_low_half(p)
    return list(module.parameters())


def _rewrite_config(path: Path, more: dict) -> None:
    """Without the path of the folder that it was loaded from, which names folders of this machine.

    transformers loads a text encoder in the dtype of its config, which must be that of the U-Net that trained.
    """
    config = read_json(path) if path.exists() else {}
    rewritten = {key: value for key, value in config.items() if key != "_name_or_path"} | more
    if config not in ({}, rewritten):
        path.unlink()  # it may be a link to the base's
        write_json(path, rewritten)
