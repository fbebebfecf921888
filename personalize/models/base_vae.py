"""A VAE that is given for a base, from a file or a folder into the part `vae` of a diffusers folder."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.formats.infer_config import SCALE
from personalize.formats.ldm import State, require_complete, tidy, vae_names
from personalize.formats.safetensors_io import load_tensors, refuse_pickle, save_unsynced
from personalize.formats.vae_file import read_vae_file
from personalize.models.config_schema import INDEX, UNET, VAE
from personalize.models.locate import update_with_samples, weight_files

OF_THE_BASE = ("scaling_factor", "shift_factor", "sample_size", "norm_num_groups")  # what a file alone does not say
REMEDY = "Give a VAE of Stable Diffusion for base_vae, a .safetensors file or a folder of diffusers."


def vae_files(source: str) -> list[Path]:
    """The files of the VAE that `base_vae` names: weights, and of a folder its config. UserError where there is none."""
    place = Path(source).expanduser()
    refuse_pickle(place, "a VAE")
    if not place.exists():
        raise UserError(f"base_vae = {source!r}: there is no such file or folder. {REMEDY}")
    if not place.is_dir():
        return [place]
    place = place / "vae" if (place / "vae").is_dir() else place  # of a whole base
    files = [place / "config.json", *weight_files(place)]
    if len(files) < 2 or not files[0].exists():
        raise UserError(f"base_vae = {source!r}: there is no config.json with .safetensors weights in {place}. {REMEDY}")
    return files


def digest_of_vae(source: str) -> str:
    """12 hex digits that identify the VAE `source`, as `fingerprint` does a base."""
    digest = hashlib.sha256()
    for file in vae_files(source):
        update_with_samples(digest, file)
    return digest.hexdigest()[:12]


def write_vae(source: str, folder: Path, place: Path, say: Callable[[str], None]) -> None:
    """Write the VAE `source` into `place`, as the part of the base in a folder, which may have one or none.

    What a file alone does not say is as the base has it. UserError for what is no VAE, or one of other latents.
    """
    files, base = vae_files(source), _config_of_base(folder)
    try:
        config, state = _of_folder(files) if files[0].name == "config.json" else _of_file(files[0], base)
    except UserError as error:
        raise UserError(f"base_vae = {source!r}: {error} {REMEDY}") from None
    takes, gives = base["latent_channels"], config.get("latent_channels", 4)
    if gives != takes:
        raise UserError(f"base_vae = {source!r} has {gives} latent channels where the base's U-Net takes {takes}. {REMEDY}")
    scales = [part.get("scaling_factor", SCALE["sd1"]) for part in (config, base)]
    if scales[0] != scales[1]:
        say(f"base_vae = {source!r} scales latents by {scales[0]:g} and the base by {scales[1]:g}: it may be of another family")
    cells = read_json(folder / "unet" / "config.json", UNET).get("sample_size", 64)
    config.setdefault("sample_size", cells * 2 ** (len(config.get("block_out_channels", [64])) - 1))
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_unsynced(place / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})


def _config_of_base(folder: Path) -> dict:
    """The config of the VAE that a base has, or what is known of it by the rest."""
    if (config := folder / "vae" / "config.json").exists():
        own = read_json(config, VAE)
    else:
        is_xl = "XL" in read_json(folder / "model_index.json", INDEX)["_class_name"]
        own = {"scaling_factor": SCALE["sdxl" if is_xl else "sd1"]}
    return own | {"latent_channels": read_json(folder / "unet" / "config.json", UNET).get("out_channels", 4)}


def _of_folder(files: list[Path]) -> tuple[dict, State]:
    config = read_json(files[0], VAE)
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(f"{files[0]} is of {kind}, expected is AutoencoderKL.")
    state = tidy("vae", {key: value for file in files[1:] for key, value in load_tensors(file, "a VAE").items()})
    require_complete("vae", set(state), set(vae_names(config)))
    return {key: config[key] for key in VAE.fields if key in config} | {"_class_name": "AutoencoderKL"}, state


def _of_file(file: Path, base: Mapping[str, Any]) -> tuple[dict, State]:
    config, state = read_vae_file(file)
    same = base.get("block_out_channels") == config["block_out_channels"]
    return config | {key: base[key] for key in OF_THE_BASE if key in base and (same or key != "norm_num_groups")}, state
