"""Stable Diffusion checkpoints in the original (LDM, SGM) layout, to and from a diffusers folder's state dicts.

One table per part, `{diffusers key: original key}`, made from the part's `config.json`; where it is more than
a renaming, the original key tells: the VAE's attention is a 1x1 convolution there, OpenCLIP packs q, k and v into
`in_proj_*`, and its `text_projection` is the transpose. Text keys begin with `text_model.`, as files in the wild have
them (transformers 5 leaves that out in memory and, for CLIPTextModel, on disk; both are read).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.formats.ldm_unet import MOST, unet_names

NETWORKS = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
SDXL_TEXTS = {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}
PREFIXES = {
    "sd1": NETWORKS | {"text_encoder": "cond_stage_model.transformer."},
    "sd2": NETWORKS | {"text_encoder": "cond_stage_model.model."},
    "sdxl": NETWORKS | SDXL_TEXTS,
}
CLIP = "transformer."  # a text encoder under this is transformers' own CLIP; under `model.` it is OpenCLIP

VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15
OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPENCLIP_LAYER = {f"self_attn.{x}_proj.": "attn.in_proj_" for x in "qkv"} | {"self_attn.out_proj.": "attn.out_proj."}
OPENCLIP_LAYER |= {"layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}
# What files carry besides the weights: buffers, CLIP's logit scale, the projection that SD1 and SD2 do not use, EMA copies.
UNUSED = ("position_ids", "attn_mask", "logit_scale", "text_projection", "text_projection.weight")
UNUSED_BEGINNINGS = ("loss.", "model_ema.")
SD2_LAYERS = 23  # SD2 reads the last layer but one of OpenCLIP-H's 24; diffusers' text encoder ends there

State = dict[str, Tensor]
Config = Mapping[str, Any]


def names(part: str, family: str, config: Config) -> dict[str, str]:
    """{diffusers key: key in the single file} of every weight of a part of a family ("sd1", "sd2", "sdxl")."""
    prefix = PREFIXES[family][part]
    if part in ("unet", "vae"):
        table = (unet_names if part == "unet" else vae_names)(config)
    else:
        table = text_names(config, openclip=not prefix.endswith(CLIP), projection=part == "text_encoder_2")
    return {key: prefix + original for key, original in table.items()}


def to_ldm(parts: Mapping[str, State], family: str, configs: Mapping[str, Config]) -> State:
    """{part: diffusers state dict} -> the tensors of one file. UserError names weights that are missing or unknown."""
    tensors: State = {}
    for part in PREFIXES[family]:
        state = tidy(part, parts[part])
        table = names(part, family, configs[part])
        require_complete(part, set(state), set(table))
        for original, keys in _grouped(table).items():
            tensors[original] = _packed(original, [state[key] for key in keys])
    return tensors | (_sd2_rest(tensors) if family == "sd2" else {})


def _sd2_rest(tensors: State) -> State:
    """What OpenCLIP-H has beyond SD2's text encoder, and old loaders and ComfyUI expect; no image depends on it.

    The values are those of kohya's sd-scripts: the last block once more, a projection of ones, a scale of one.
    """
    prefix = PREFIXES["sd2"]["text_encoder"]
    block = f"{prefix}transformer.resblocks.{SD2_LAYERS - 1}."
    last = f"{prefix}transformer.resblocks.{SD2_LAYERS}."
    rest = {last + key.removeprefix(block): value for key, value in tensors.items() if key.startswith(block)}
    norm = tensors[f"{prefix}ln_final.weight"]
    width = norm.shape[0]
    return rest | {f"{prefix}text_projection": norm.new_ones(width, width), f"{prefix}logit_scale": norm.new_ones(())}


def from_ldm(tensors: State, family: str, configs: Mapping[str, Config]) -> dict[str, State]:
    """The tensors of one file -> {part: diffusers state dict}, of parts with a config. What belongs to no part is left out."""
    parts = {}
    for part, prefix in ((part, prefix) for part, prefix in PREFIXES[family].items() if part in configs):
        groups = _grouped(names(part, family, configs[part]))
        keys_in_file = file_keys(tensors, prefix)
        weights = {name for name in keys_in_file if name in groups or not _unused(name[len(prefix) :], family)}
        require_complete(part, weights, set(groups))
        parts[part] = {
            key: tensor
            for original, keys in groups.items()
            for key, tensor in zip(keys, _unpacked(original, tensors[keys_in_file[original]], len(keys)), strict=True)
        }
    return parts


def file_keys(tensors: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """{standard key: the key in the file} of the keys with this prefix: files of 2022 leave out CLIP's `text_model.`."""
    keys = [key for key in tensors if key.startswith(prefix)]
    if not prefix.endswith(CLIP):
        return {key: key for key in keys}
    return {prefix + _with_text_model(key[len(prefix) :]): key for key in keys}


def tidy(part: str, state: Mapping[str, Tensor]) -> State:
    """A diffusers state dict with today's names: `text_model.` before text keys, `to_q` for the VAE's old `query`."""
    if part.startswith("text_encoder"):
        return {_with_text_model(key): v for key, v in state.items() if not key.endswith("position_ids")}
    if part != "vae":
        return dict(state)
    tidied = {}
    for key, value in state.items():
        stem, _, end = key.rpartition(".")
        block, _, layer = stem.rpartition(".")
        if layer in OLD_ATTENTION and ".attentions." in key:
            key = f"{block}.{OLD_ATTENTION[layer]}.{end}"
            value = _matrix(key, value) if end == "weight" else value
        tidied[key] = value
    return tidied


def vae_names(config: Config) -> dict[str, str]:
    """{diffusers key: original key without `first_stage_model.`} of every weight of an AutoencoderKL."""
    layers = {kind: kind for kind in ("quant_conv", "post_quant_conv") if config.get(f"use_{kind}", True)}
    for side in ("encoder", "decoder"):
        tables = [("", "", VAE_ENDS), *_vae_blocks(side, *_vae_shape(config))]
        tables += [(f"mid_block.resnets.{k}.", f"mid.block_{k + 1}.", VAE_RESNET) for k in (0, 1)]
        if config.get("mid_block_add_attention", True):
            tables.append(("mid_block.attentions.0.", "mid.attn_1.", VAE_ATTENTION))
        layers |= {f"{side}.{a}{x}": f"{side}.{b}{y}" for a, b, table in tables for x, y in table.items()}
    return {f"{name}.{end}": f"{original}.{end}" for name, original in layers.items() for end in ("weight", "bias")}


def _vae_shape(config: Config) -> tuple[tuple[int, ...], int]:
    """(output channels per block, resnets per block). UserError where the config does not say them."""
    widths, resnets = config.get("block_out_channels", [64]), config.get("layers_per_block", 1)
    is_valid = isinstance(widths, (list, tuple)) and 0 < len(widths) <= MOST and all(type(w) is int and w > 0 for w in widths)
    if not is_valid or type(resnets) is not int or not 0 < resnets <= MOST:
        raise UserError(f"a VAE's config has block_out_channels {str(widths)[:80]}, layers_per_block {str(resnets)[:20]}.")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = config.get(key, [kind])
        if not isinstance(kinds, (list, tuple)) or any(value != kind for value in kinds):
            raise UserError(f"a VAE with {key} {str(config[key])[:120]} has no single-file layout; {kind} has.")
    return tuple(widths), resnets


def _vae_blocks(side: str, widths: tuple[int, ...], resnets: int) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(prefix in diffusers, original prefix, {name: original name} below them) of the blocks on one side."""
    down, n = side == "encoder", len(widths)
    ours, theirs, sample = ("down_blocks", "down", "downsample") if down else ("up_blocks", "up", "upsample")
    order = widths if down else widths[::-1]
    before = order[0]
    for i, width in enumerate(order):
        k = i if down else n - 1 - i  # the original numbers the decoder's blocks from the image inwards
        for j in range(resnets if down else resnets + 1):
            shortcut = {"conv_shortcut": "nin_shortcut"} if before != width else {}
            yield f"{ours}.{i}.resnets.{j}.", f"{theirs}.{k}.block.{j}.", VAE_RESNET | shortcut
            before = width
        if i < n - 1:
            yield f"{ours}.{i}.{sample}rs.0.", f"{theirs}.{k}.{sample}.", {"conv": "conv"}


def text_names(config: Config, *, openclip: bool, projection: bool) -> dict[str, str]:
    """{transformers key: original key without its prefix} of a CLIP text model; q, k and v share an OpenCLIP key."""
    depth = config.get("num_hidden_layers", 12)
    if type(depth) is not int or not 0 < depth <= MOST:
        raise UserError(f"a text encoder's config has num_hidden_layers {str(depth)[:40]}.")
    table = {key: original for key, original in OPENCLIP_ENDS.items() if projection or "projection" not in key}
    table |= {
        f"text_model.encoder.layers.{k}.{layer}{end}": f"transformer.resblocks.{k}.{original}{end}"
        for k in range(depth)
        for layer, original in OPENCLIP_LAYER.items()
        for end in ("weight", "bias")
    }
    return table if openclip else {key: key for key in table}


def _with_text_model(key: str) -> str:
    bare = key.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{key}" if bare else key


def _grouped(table: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, original in table.items():
        groups.setdefault(original, []).append(key)
    return groups


def _packed(original: str, tensors: list[Tensor]) -> Tensor:
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if original.endswith(".model.text_projection"):
        return tensor.T.contiguous()
    return tensor[:, :, None, None] if _convolution(original) else tensor


def _unpacked(original: str, tensor: Tensor, n: int) -> list[Tensor]:
    """The inverse of `_packed`; each tensor has memory of its own."""
    if original.endswith(".model.text_projection"):
        return [_matrix(original, tensor).T.contiguous()]
    if _convolution(original):
        return [_matrix(original, tensor)]  # some files have it as a matrix already
    if n == 1:
        return [tensor]
    if tensor.ndim == 0 or tensor.shape[0] % n:
        raise UserError(f"{original} of shape {tuple(tensor.shape)} is not {n} layers in one: not a Stable Diffusion file.")
    return [part.clone() for part in tensor.chunk(n)]


def _matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or any(size != 1 for size in tensor.shape[2:]):
        raise UserError(f"{name} of shape {tuple(tensor.shape)} is not a matrix: not a Stable Diffusion file.")
    return tensor.reshape(tensor.shape[:2])


def _convolution(original: str) -> bool:
    return original.endswith(".weight") and ".mid.attn_1." in original and ".norm." not in original


def _unused(rest: str, family: str) -> bool:
    """Whether a key, without its prefix, is one of those that files commonly have besides the part's weights."""
    beyond = family == "sd2" and rest.startswith(f"transformer.resblocks.{SD2_LAYERS}.")
    return beyond or rest.removeprefix("text_model.embeddings.") in UNUSED or rest.startswith(UNUSED_BEGINNINGS)


def require_complete(part: str, present: set[str], expected: set[str]) -> None:
    """UserError where keys are missing or beyond those expected."""
    if missing := sorted(expected - present):
        raise UserError(
            f"the {part} lacks {len(missing)} of {len(expected)} weights, such as {missing[0]}: the file is not whole, "
            "or not a Stable Diffusion model."
        )
    if unknown := sorted(present - expected):
        raise UserError(
            f"the {part} has {len(unknown)} weights besides the {len(expected)} of a Stable Diffusion model of its size, "
            f"such as {unknown[0][:120]}: it is another kind of model."
        )
