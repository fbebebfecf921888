"""Full fine-tuning: every weight of the U-Net, and of the text encoder if asked. Saved as a whole diffusers folder."""

import os
import shutil
from pathlib import Path

from torch import Tensor

from personalize.config import Recipe
from personalize.files import read_json, write_json
from personalize.methods import require_folder, unfreeze
from personalize.models.base import LatentModel


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """Parameter groups in float32: the U-Net's, then the text encoder's."""
    train = recipe.train
    groups = [{"name": "unet", "params": unfreeze(model.unet), "lr": train.lr}]
    if train.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if train.text_encoder:
        groups.append({"name": "text_encoder", "params": unfreeze(model.text_encoder), "lr": train.text_lr or train.lr})
        if train.gradient_checkpointing:
            model.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return groups


def state(model: LatentModel) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part, module in _parts(model) for k, v in module.state_dict().items()}


def restore(model: LatentModel, tensors: dict[str, Tensor]) -> None:
    for part, module in _parts(model):
        module.load_state_dict({k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")})


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """A folder that `StableDiffusionPipeline.from_pretrained` loads; parts that did not train are linked to the base's.

    Parts that the base's index names and its folder lacks, such as a safety checker that was not downloaded, are
    left out of the index too.
    """
    trained, index = dict(_parts(model)), read_json(model.folder / "model_index.json")
    for part in [name for name, value in index.items() if isinstance(value, list)]:
        if part in trained:
            trained[part].save_pretrained(folder / part, safe_serialization=True)
        elif (model.folder / part).is_dir():
            shutil.copytree(model.folder / part, folder / part, copy_function=_link_or_copy)
        else:
            index[part] = [None, None]
    write_json(folder / "model_index.json", index)


def load(model: LatentModel, folder: Path) -> None:
    from safetensors.torch import load_file

    require_folder(folder, "model_index.json")
    for part, module in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        files = sorted((folder / part).glob("*.safetensors"))
        require_folder(folder, f"{part}/{files[0].name if files else '*.safetensors'}")
        tensors = {k: v for file in files for k, v in load_file(file).items()}
        module.load_state_dict(tensors)


def _parts(model: LatentModel):
    for part, module in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        if any(p.requires_grad for p in module.parameters()):
            yield part, module


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy(source, target)
