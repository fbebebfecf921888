"""A VAE in a file of its own, as it is passed around, or the one within a checkpoint, in diffusers' names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError
from personalize.formats.infer_config import infer_vae
from personalize.formats.ldm import NETWORKS, State, from_ldm, require_complete, tidy, vae_names
from personalize.formats.ldm_unet import count
from personalize.formats.safetensors_io import load_tensors

Config = dict[str, Any]
LDM, DIFFUSERS = "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.{}.resnets.0.conv1.weight"


def read_vae_file(path: Path) -> tuple[Config, State]:
    """(config, state dict) of diffusers' AutoencoderKL, from a file in the original names, alone or in a checkpoint, or
    in diffusers' names. UserError for a pickle and for a file that is no whole VAE.
    """
    tensors = load_tensors(path, "a VAE")
    try:
        if any(key.startswith(NETWORKS["vae"]) for key in tensors):
            return _from_original(tensors)
        if LDM in tensors:
            return _from_original({NETWORKS["vae"] + key: value for key, value in tensors.items()})
        if DIFFUSERS.format(0) in tensors:
            return _from_diffusers(tidy("vae", tensors))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    example = min(tensors, default="nothing")[:100]
    raise UserError(f"{path} is not a VAE: it has {len(tensors)} tensors such as {example!r}.")


def _from_original(tensors: State) -> tuple[Config, State]:
    config = infer_vae({key: tuple(value.shape) for key, value in tensors.items()})
    return config, from_ldm(tensors, "sd1", {"vae": config})["vae"]


def _from_diffusers(state: State) -> tuple[Config, State]:
    levels = count(state, DIFFUSERS)
    outline = {
        "block_out_channels": [len(state[DIFFUSERS.format(k)]) for k in range(levels)],
        "layers_per_block": count(state, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        **{f"use_{kind}": f"{kind}.weight" in state for kind in ("quant_conv", "post_quant_conv")},
    }
    table = vae_names(outline)
    require_complete("vae", set(state), set(table))
    return infer_vae(_original_shapes(state, table)), state


def _original_shapes(state: State, table: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {NETWORKS["vae"] + table[key]: tuple(value.shape) for key, value in state.items()}
