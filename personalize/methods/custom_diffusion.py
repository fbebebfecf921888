"""Custom Diffusion (Kumari et al. 2212.04488): keys and values of the U-Net's cross-attention, and the token's embedding.

Saved as `pytorch_custom_diffusion_weights.safetensors`, beside the embedding that textual inversion saves, for diffusers'
`pipe.unet.load_attn_procs(folder, weight_name=…, _pipeline=pipe)`; without `_pipeline` diffusers 0.42 loads nothing.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common.recipe import Recipe
from personalize.formats import safetensors_io
from personalize.methods import copy_all, require_folder, textual_inversion, unfreeze
from personalize.models.interface import LatentModel

FILE = "pytorch_custom_diffusion_weights.safetensors"


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """Groups of float32 parameters: keys and values, then the rows of the token."""
    params = [p for layer in _layers(model).values() for p in unfreeze(layer)]
    return [{"name": "unet", "params": params, "lr": recipe.train.lr}, *textual_inversion.attach(model, recipe)]


def state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    return {**_weights(model), **textual_inversion.state(model, recipe)}


def restore(model: LatentModel, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    copy_all(state(model, recipe), tensors, what=f"this state was made for another base than {model.name!r}")


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Saves two files, of weights and of embeddings."""
    # diffusers expects an entry for each attention layer; an empty one stands for the base's own.
    others = {f"{name}.processor": torch.empty(0) for name, _ in model.unet.named_modules() if name.endswith(".attn1")}
    safetensors_io.save_tensors(folder / FILE, {**others, **_weights(model)})
    textual_inversion.save(model, folder, recipe)


def load(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Loads a run's weights and embeddings. UserError where a file is missing or was made for another base."""
    _fill(model, require_folder(folder, FILE))
    textual_inversion.load(model, folder, recipe)


def start_from(model: LatentModel, recipe: Recipe, source: Path) -> bool:
    """Starts from a folder of this method, or from an embedding alone."""
    if has_weights := (source / FILE).exists():
        _fill(model, source / FILE)
    return textual_inversion.start_from(model, recipe, source) or has_weights


def _fill(model: LatentModel, path: Path) -> None:
    tensors = {key: value for key, value in safetensors_io.load_tensors(path).items() if len(value)}
    copy_all(_weights(model), tensors, what=f"{path} was made for another base than {model.name!r}")


def _weights(model: LatentModel) -> dict[str, Tensor]:
    """The live weights by the names diffusers gives them in files."""
    names = ((layer.rpartition("."), module.weight) for layer, module in _layers(model).items())
    return {f"{attention}.processor.{leaf}_custom_diffusion.weight": weight for (attention, _, leaf), weight in names}


def _layers(model: LatentModel) -> dict[str, nn.Module]:
    ends = (".attn2.to_k", ".attn2.to_v")
    return {name: module for name, module in model.unet.named_modules() if name.endswith(ends)}
