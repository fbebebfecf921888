"""Loading one part of a diffusers folder: a network, a tokenizer, the noise schedule. Safetensors only, and whole."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.common.finite import require_finite_file
from personalize.common.untrusted import require_regular
from personalize.core import schedule as schedules
from personalize.models.config_schema import IMAGE_ENCODER, SCHEDULER, TEXT_ENCODER, UNET, VAE
from personalize.models.lazy_imports import lazy_imports
from personalize.models.locate import weight_files

with lazy_imports():
    from transformers.models.clip.tokenization_clip import CLIPTokenizer


def read_configs(folder: Path, name: str) -> tuple[dict, dict]:
    """config.json of the U-Net and of the VAE. UserError, before weights are read, for a base of another kind of model."""
    unet = {"in_channels": 4, **read_json(_part_folder(folder, "unet") / "config.json", UNET)}  # with diffusers' defaults
    vae = {"latent_channels": 4, "block_out_channels": [64], **read_json(_part_folder(folder, "vae") / "config.json", VAE)}
    takes, gives = unet["in_channels"], vae["latent_channels"]
    if takes not in (gives, 2 * gives + 1):
        raise UserError(
            f"base {name!r} takes {takes} channels where its VAE gives {gives}: an editing, upscaling or depth U-Net, which is "
            "not read. Use the plain text-to-image base, or an inpainting one."
        )
    if "sample_size" not in unet:
        raise UserError(
            f"{folder}/unet/config.json does not say sample_size. "
            "Write the size this base was trained at there, in latent cells: 64 for 512 px."
        )
    return unet, vae


def load_network(kind, folder: Path, part: str, dtype: torch.dtype):
    """A frozen network of class `kind` from folder/part in `dtype`. UserError where it is missing, a pickle or not whole."""
    place = _part_folder(folder, part)
    files = weight_files(place)
    if not files:
        raise UserError(
            f"{place} has no .safetensors file (pickles such as .bin are not opened, they can run code). "
            "Convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
        )
    for file in files:
        require_regular(file, "weight file")
    options = {"variant": "fp16" if ".fp16" in files[0].name else None, "torch_dtype": dtype, "use_safetensors": True}
    if part not in ("unet", "vae", "prior"):
        options |= encoder_options(place, kind) | {"ignore_mismatched_sizes": True}  # they are named below
    try:
        for file in files:
            require_finite_file(file)
        with lazy_imports():
            module, loading_info = kind.from_pretrained(place, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{place} cannot be loaded: {str(error).splitlines()[0]}") from error
    if wrong := sorted(loading_info["mismatched_keys"]):
        name, held, expected = wrong[0]
        raise UserError(
            f"{place}: config.json and the weights are of two models, for {name} is {tuple(held)} and should be "
            f"{tuple(expected)}. Take both from one download."
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(f"{place} lacks {len(missing)} weights, such as {missing[0]}: it is not whole. Download it again.")
    return module.eval().requires_grad_(False)


def encoder_options(place: Path, kind) -> dict:
    """Known fields of the config of an encoder of text or images alone: others could name code of the hub."""
    table = IMAGE_ENCODER if place.name == "image_encoder" else TEXT_ENCODER
    config = read_json(place / "config.json", table)
    known = {name: config[name] for name in table.fields if name in config}
    return {"config": kind.config_class(**known), "attn_implementation": "sdpa"}


def load_tokenizer(folder: Path, part: str, *, most: int, size: int) -> CLIPTokenizer:
    """A base's tokenizer, which cuts at `most` tokens, for a text encoder with embeddings of `size` tokens.

    UserError without its files, where transformers would make an empty one, and for one of more tokens.
    """
    place = folder / part
    if not any((place / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{place} has neither tokenizer.json nor vocab.json: it is not a whole Stable Diffusion base.")
    try:
        for file in place.iterdir():
            require_regular(file, "vocabulary")
        tokenizer = CLIPTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} cannot be loaded: {str(error).splitlines()[0]}") from error
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= size:
        raise UserError(f"{place} has a token of id {largest}, and its text encoder knows {size}. Restore the folder.")
    tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    return tokenizer


def load_schedule(folder: Path, part: str = "scheduler") -> schedules.Schedule:
    """The noise schedule and prediction type that the folder's scheduler config names."""
    path = folder / part / "scheduler_config.json"
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    config |= read_json(path, SCHEDULER)
    if str(name := config.get("_class_name", "")).startswith(("EDM", "FlowMatch")):
        raise UserError(f"{path} is of {name}, whose noise levels are not those of Stable Diffusion. Use another base.")
    T, kind = config["num_train_timesteps"], config["beta_schedule"]
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
    prediction = config.get("prediction_type", "epsilon")
    if config.get("trained_betas"):
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind not in names:
        raise UserError(f"{path} has beta_schedule {kind!r}; known are {', '.join(names)}. Use another base.")
    elif kind == "squaredcos_cap_v2":
        betas = schedules.cosine(T)
    else:
        betas = schedules.BETAS[names[kind]](T, config["beta_start"], config["beta_end"])
    if config.get("rescale_betas_zero_snr"):
        betas = schedules.rescale_zero_terminal_snr(betas)
        if prediction == "epsilon":
            raise UserError(f"{path} asks for zero terminal SNR with epsilon prediction, which says nothing of z0 there.")
    spacing = config.get("timestep_spacing", "leading")
    for key, value, known in (
        ("prediction_type", prediction, schedules.PREDICTIONS),
        ("timestep_spacing", spacing, schedules.SPACINGS),
    ):
        if value not in known:
            raise UserError(f"{path} has {key} {value!r}; known are {', '.join(known)}. Use another base.")
    return schedules.from_betas(
        betas,
        prediction,
        spacing=spacing,
        steps_offset=config.get("steps_offset", 0),
        final_alpha_one=config.get("set_alpha_to_one", True),
    )


def _part_folder(folder: Path, part: str) -> Path:
    if not (folder / part).is_dir():
        raise UserError(f"{folder} has no folder {part}: it is not a whole Stable Diffusion base.")
    return folder / part
