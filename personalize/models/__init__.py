"""Base models: which families there are, and the loading of one by name."""

import importlib
from collections.abc import Callable
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.models.config_schema import INDEX
from personalize.models.interface import LatentModel
from personalize.models.locate import fingerprint, locate_base

__all__ = ["MODELS", "LatentModel", "family_of", "fingerprint", "load_model", "locate_base"]

MODELS = {  # pipeline class in model_index.json -> module
    "StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionInpaintPipeline": "sd", "StableDiffusionXLInpaintPipeline": "sdxl",
}  # fmt: skip


def load_model(
    base: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vae: str = "whole",
    prediction: str = "",
    base_vae: str = "",
    zero_snr: bool = False,
    offload: bool = False,
    chunks: int = 1,
    weighting: str = "",
    say: Callable[[str], None] = print,
    make_network: Callable | None = None,
) -> LatentModel:
    """The base called "toyland", a hub id, a diffusers folder or a .safetensors file, loaded to a device.

    `vae`, `prediction`, `base_vae` and `zero_snr` are as in the recipe, `offload` as its train.offload, `chunks` and
    `weighting` as its prompt section. `make_network` takes the place of `loading.load_network` in the memory estimate.
    UserError for anything else.
    """
    folder = locate_base(base, say, prediction=prediction, base_vae=base_vae, zero_snr=zero_snr)
    family = family_of(folder, base)
    from personalize.models import devices, latent_diffusion, loading, prompt_weights
    from personalize.models.kernels import group_norm

    if weighting:
        prompt_weights.require_compel()
    device_here = devices.choose_device(device)
    if device_here.type == "cuda" and make_network is None and (fault := group_norm.triton_fault(device_here)):
        say(f"group norms run as torch's own operators, which are slower: {fault}")
    return latent_diffusion.LatentDiffusion(
        folder, base, importlib.import_module(f"personalize.models.{family}"),
        device=device_here, dtype=devices.dtype_for(device_here, dtype, say), vae=vae, fingerprint=fingerprint(folder),
        make_network=make_network or loading.load_network, offload=offload,
        chunks=chunks, weighting=weighting, say=say,
    )  # fmt: skip


def family_of(folder: Path, base: str) -> str:
    """The name of the module for the pipeline in a diffusers folder. UserError where there is none."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"base {base!r} is not a diffusers folder: {folder} has no model_index.json. Check the path.")
    kind = read_json(index, INDEX)["_class_name"]
    if kind not in MODELS:
        raise UserError(f"base {base!r} is a {kind}; personalize reads {', '.join(MODELS)}, such as SD 1.5. Use one of these.")
    return MODELS[kind]
