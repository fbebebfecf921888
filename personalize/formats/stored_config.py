"""The configs of a base, kept as JSON in a single file's metadata, so that file -> folder gives back the folder exactly.

They are a stranger's words: only plain values under known names are taken, and whatever the tensors' shapes tell must
agree with them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError
from personalize.formats.ldm import names, vae_shape
from personalize.formats.ldm_unet import structure

KEY = "personalize.configs"
Config = dict[str, Any]
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
TEXT_KEYS = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "model_type", "num_attention_heads", "num_hidden_layers", "pad_token_id", "projection_dim", "torch_dtype",
    "transformers_version", "vocab_size",
}  # fmt: skip
TOLD_BY_SHAPES = {  # key -> what diffusers and transformers take where a config leaves it out
    "unet": {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280, "use_linear_projection": False}
    | {"addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None},
    "vae": {"in_channels": 3, "out_channels": 3, "latent_channels": 4},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 77},
}
TOLD_BY_SHAPES["text_encoder_2"] = TOLD_BY_SHAPES["text_encoder"] | {"projection_dim": 512}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "relu", "silu")
CLASS_PATTERN = re.compile(r"[A-Z][A-Za-z0-9]{0,60}Scheduler")
LONGEST = 1_000_000  # characters of JSON


def packed(family: str, configs: Mapping[str, Config], scheduler: Config) -> str:
    """The metadata's JSON text. Paths and names of where a model was read from stay out."""
    parts = {part: _taken(part, config) for part, config in configs.items()}
    kept = {"family": family, "parts": parts, "scheduler": _taken("scheduler", scheduler)}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def unpacked(text: str, family: str, inferred: Mapping[str, Config], path: Path) -> tuple[dict[str, Config], Config]:
    """({part: config}, scheduler's config) of the metadata's JSON. UserError where the file's own shapes say otherwise."""
    try:
        kept = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        kept = None
    parts = kept.get("parts") if isinstance(kept, dict) else None
    if not isinstance(parts, dict) or set(parts) != set(inferred) or kept.get("family") != family:
        raise _wrong(path, f"they are not the configs of a {family} model")
    configs = {part: _trusted(path, part, parts[part]) for part in inferred}
    for part, config in configs.items():
        for key, default in TOLD_BY_SHAPES[part].items():
            told, stored = inferred[part].get(key, default), config.get(key, default)
            if stored != told or type(stored) is not type(told):
                raise _wrong(path, f"{part}.{key} is {stored!r}, but its tensors say {told!r}")
        names(part, family, config)  # UserError where numbers of layers are none
        _heads(path, part, config)
        _amounts(path, part, config)
    if structure(configs["unet"]) != structure(inferred["unet"]) or vae_shape(configs["vae"]) != vae_shape(inferred["vae"]):
        raise _wrong(path, "their blocks are not those of its tensors")
    scheduler = _trusted(path, "scheduler", kept.get("scheduler"))
    return configs, scheduler


def plain(value: Any) -> bool:
    """Whether a value is null, a boolean, a finite number, a short text, or a list of such, two deep at most."""
    if isinstance(value, list):
        return len(value) <= 1000 and all(plain(v) and not (isinstance(v, list) and any(_nested(v))) for v in value)
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= 200)


def _nested(values: list) -> list[bool]:
    return [isinstance(value, list) for value in values]


def _taken(part: str, config: Mapping[str, Any]) -> Config:
    """Those of a config's entries that may stand in a file: plain, known, and no path."""
    return {key: value for key, value in sorted(config.items()) if _known(part, key) and plain(value)}


def _known(part: str, key: Any) -> bool:
    if part.startswith("text_encoder"):
        return key in TEXT_KEYS
    return isinstance(key, str) and (key in ("_class_name", "_diffusers_version") or not key.startswith("_"))


def _trusted(path: Path, part: str, config: Any) -> Config:
    """A stranger's config as it is written down, if it is one of this part and nothing more."""
    if not isinstance(config, dict) or len(config) > 200:
        raise _wrong(path, f"{part} is none")
    if bad := [str(key)[:60] for key, value in config.items() if not _known(part, key) or not plain(value)]:
        raise _wrong(path, f"{part}.{bad[0]} is unknown or no plain value")
    kind = config.get("_class_name")
    if part in CLASSES and kind != CLASSES[part]:
        raise _wrong(path, f"{part} is a {str(kind)[:60]!r}, not a {CLASSES[part]}")
    if part == "scheduler" and not (isinstance(kind, str) and CLASS_PATTERN.fullmatch(kind)):
        raise _wrong(path, f"its scheduler is a {str(kind)[:60]!r}")
    if part in TEXT_CLASSES and config.get("model_type") not in ("clip_text_model", "clip"):
        raise _wrong(path, f"{part} is a {str(config.get('model_type'))[:60]!r}, not a clip_text_model")
    return config


def _heads(path: Path, part: str, config: Config) -> None:
    """UserError where a number of heads does not divide the width it is for."""
    if part == "unet":
        heads, widths = config.get("attention_head_dim", 8), config["block_out_channels"]
        several = [heads] * len(widths) if type(heads) is int else heads
        sound = isinstance(several, list) and len(several) == len(widths) and all(type(h) is int and h > 0 for h in several)
    elif part.startswith("text_encoder"):
        heads, widths = config.get("num_attention_heads", 8), config["hidden_size"]
        sound = type(heads) is int and heads > 0 and widths % heads == 0
    else:
        return
    if not sound:
        raise _wrong(path, f"{part} has {str(heads)[:60]} attention heads")


def _amounts(path: Path, part: str, config: Config) -> None:
    """UserError where what no shape tells would make the network fail: groups, scale, activation."""
    if part in CLASSES:
        groups, scale = config.get("norm_num_groups", 32), config.get("scaling_factor", 1.0)
        if type(groups) is not int or groups < 1 or any(width % groups for width in config["block_out_channels"]):
            raise _wrong(path, f"{part} has {str(groups)[:40]} groups in a norm")
        if type(scale) not in (int, float) or scale <= 0:
            raise _wrong(path, f"{part} has scaling_factor {str(scale)[:40]}")
    elif config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise _wrong(path, f"{part} has hidden_act {str(config['hidden_act'])[:40]!r}, not one of {', '.join(ACTIVATIONS)}")


def _wrong(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} carries configs ({KEY} in its header) that are not its own: {why}. Download it again, or delete that entry."
    )
