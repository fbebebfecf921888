"""Bases: finding one by name, and the families that can be loaded."""

import importlib
from collections.abc import Callable
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.models.interface import LatentModel
from personalize.models.locate import fingerprint, locate_base

__all__ = ["MODELS", "LatentModel", "families", "fingerprint", "load_model", "locate_base"]

MODELS = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}  # pipeline class in model_index.json -> module


def load_model(
    base: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vae: str = "whole",
    say: Callable[[str], None] = print,
    make_network: Callable | None = None,
) -> LatentModel:
    """The base called "toyland", a hub id, a diffusers folder or a .safetensors file, ready on a device.

    UserError for anything else. `vae`: how the VAE works, as in the recipe. `make_network`: used in place of
    `loading.load_network`, by the memory estimate.
    """
    folder = locate_base(base, say)
    family = families(folder, base)
    from personalize.models import devices, latent_diffusion, loading

    where = devices.choose_device(device)
    return latent_diffusion.LatentDiffusion(
        folder, base, importlib.import_module(f"personalize.models.{family}"),
        device=where, dtype=devices.dtype_for(where, dtype, say), vae=vae, fingerprint=fingerprint(folder),
        make_network=make_network or loading.load_network,
    )  # fmt: skip


def families(folder: Path, base: str) -> str:
    """The module that loads the pipeline in a diffusers folder. UserError where there is none."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"base {base!r} is not a diffusers folder: {folder} has no model_index.json.")
    kind = read_json(index).get("_class_name", "?")
    if kind not in MODELS:
        why = " Its U-Net takes a mask and a picture too: use the base it was made from." if "Inpaint" in str(kind) else ""
        raise UserError(
            f"base {base!r} is a {kind}; personalize trains {', '.join(MODELS)}, such as Stable Diffusion 1.5.{why}"
        )
    return MODELS[kind]
