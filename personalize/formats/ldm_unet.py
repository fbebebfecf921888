"""The names of a Stable Diffusion U-Net in diffusers and in the original (LDM, SGM) code.

The original numbers all layers of one direction consecutively: `input_blocks.k.s` and `output_blocks.k.s`, where slot s is 0
for a resnet or a downsampler, 1 for a transformer, and the upsampler comes last; diffusers numbers them by resolution.
(CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py; the same in Stability-AI/generative-models.)
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from personalize.common.errors import UserError

ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
TRANSFORMER = ("norm1", "attn1.to_out.0", "norm2", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2")
UNBIASED = tuple(f"attn{k}.to_{x}" for k in (1, 2) for x in "qkv")
DEFAULTS = {
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "transformer_layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
MOST = 1000  # blocks, layers or transformers in one place: more is a damaged config


@dataclass(frozen=True)
class Structure:
    """What decides the names: per block, in the order that the image passes them; depth 0 where there is no attention."""

    widths: tuple[int, ...]  # output channels of the down blocks
    resnets: tuple[int, ...]  # of the down blocks; an up block has one more
    down: tuple[int, ...]  # transformer layers per attention
    middle: int
    up: tuple[int, ...]
    added: bool  # SDXL's embedding of size, crop and pooled text


def structure(config: Mapping[str, Any]) -> Structure:
    """The structure that a U-Net's `config.json` describes. UserError where the original layout has no place for it."""
    values = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    widths, n = values["block_out_channels"], len(DEFAULTS["block_out_channels"])
    if isinstance(widths, (list, tuple)):
        n = len(widths)
    widths, resnets = _each(values, "block_out_channels", n), _each(values, "layers_per_block", n)
    depths = _each(values, "transformer_layers_per_block", n)
    rising = _each(values, "reverse_transformer_layers_per_block", n, otherwise=depths[::-1])
    down = _attended(values, "down_block_types", n, {"CrossAttnDownBlock2D": True, "DownBlock2D": False})
    up = _attended(values, "up_block_types", n, {"CrossAttnUpBlock2D": True, "UpBlock2D": False})
    middle = values.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle != "UNetMidBlock2DCrossAttn":
        raise UserError(f"a U-Net with mid_block_type {middle!r} has no single-file layout; UNetMidBlock2DCrossAttn has.")
    return Structure(
        widths=widths,
        resnets=resnets,
        down=tuple(d * a for d, a in zip(depths, down, strict=True)),
        middle=depths[-1],
        up=tuple(d * a for d, a in zip(rising, up, strict=True)),
        added=values.get("addition_embed_type") == "text_time",
    )


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """{diffusers key: original key without `model.diffusion_model.`} of every weight of the U-Net of a `config.json`."""
    shape = structure(config)
    leaves = dict(_leaves(shape))
    return {
        f"{layer}.{end}": f"{original}.{end}"
        for layer, original in unet_layers(leaves).items()
        for end in (("weight", "bias") if leaves[layer] else ("weight",))
    }


def unet_layers(layers: Iterable[str]) -> dict[str, str]:
    """{diffusers layer: original layer}, both dotted, of those layers that have an original name.

    `layers` are all layers of one U-Net: they say how many resnets each block has.
    """
    names = sorted(layers)
    down, up = _resnets(names, "down_blocks"), _resnets(names, "up_blocks")
    attended = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return {name: original for name in names if (original := _original(name, down, up, attended))}


def _original(name: str, down: list[int], up: list[int], attended: set[int]) -> str | None:
    if name in ENDS:
        return ENDS[name]
    if m := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", name):
        return MIDDLE[m[1]] + "." + _inner(m[1], m[2]) if m[1] in MIDDLE else None
    m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if m is None or int(m[2]) >= len(down if m[1] == "down" else up):
        return None
    direction, block, kind, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    if direction == "down":
        first = 1 + sum(down[:block]) + block  # every earlier block ends with a downsampler
        if kind == "downsamplers":
            return f"input_blocks.{first + down[block]}.0.op" if rest == "conv" else None
        return f"input_blocks.{first + j}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    first = sum(up[:block])
    if kind == "upsamplers":
        return f"output_blocks.{first + up[block] - 1}.{1 + (block in attended)}.conv" if rest == "conv" else None
    return f"output_blocks.{first + j}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _resnets(names: list[str], blocks: str) -> list[int]:
    """How many resnets each of the down or up blocks has."""
    counts: dict[int, int] = {}
    for name in names:
        if m := re.match(rf"{blocks}\.(\d{{1,3}})\.resnets\.(\d{{1,3}})\.", name):
            counts[int(m[1])] = max(counts.get(int(m[1]), 0), int(m[2]) + 1)
    return [counts.get(block, 0) for block in range(max(counts, default=-1) + 1)]


def _leaves(shape: Structure) -> Iterator[tuple[str, bool]]:
    """(layer, whether it has a bias) of every layer with weights, in diffusers' names."""
    widths, n = shape.widths, len(shape.widths)
    yield from ((name, True) for name in ENDS if shape.added or not name.startswith("add_embedding"))
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(shape.resnets[i]):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", before != width)
            yield from _transformer(f"down_blocks.{i}.attentions.{j}", shape.down[i])
            before = width
        if i < n - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv", True
    yield from _resnet("mid_block.resnets.0", False)
    yield from _transformer("mid_block.attentions.0", shape.middle)
    yield from _resnet("mid_block.resnets.1", False)
    for i, width in enumerate(reversed(widths)):
        resnets, below = shape.resnets[n - 1 - i], widths[max(n - 2 - i, 0)]
        for j in range(resnets + 1):
            skipped = below if j == resnets else width
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", before + skipped != width)
            yield from _transformer(f"up_blocks.{i}.attentions.{j}", shape.up[i])
            before = width
        if i < n - 1:
            yield f"up_blocks.{i}.upsamplers.0.conv", True


def _resnet(prefix: str, shortcut: bool) -> Iterator[tuple[str, bool]]:
    yield from ((f"{prefix}.{name}", True) for name in RESNET if shortcut or name != "conv_shortcut")


def _transformer(prefix: str, depth: int) -> Iterator[tuple[str, bool]]:
    if depth:
        yield from ((f"{prefix}.{name}", True) for name in ("norm", "proj_in", "proj_out"))
    for k in range(depth):
        yield from ((f"{prefix}.transformer_blocks.{k}.{name}", True) for name in TRANSFORMER)
        yield from ((f"{prefix}.transformer_blocks.{k}.{name}", False) for name in UNBIASED)


def _each(values: Mapping[str, Any], key: str, n: int, *, otherwise: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The setting as one positive integer per block."""
    value = values.get(key, otherwise)
    per_block = [value] * n if type(value) is int else value
    most = MOST if key != "block_out_channels" else 1 << 20
    if not isinstance(per_block, (list, tuple)) or len(per_block) != n or not 0 < n <= MOST:
        raise UserError(f"a U-Net's config has {key} {str(value)[:80]}, which is not one number or {n} of them.")
    if not all(type(v) is int and 0 < v <= most for v in per_block):
        raise UserError(f"a U-Net's config has {key} {str(value)[:80]}, which has no single-file layout.")
    return tuple(per_block)


def _attended(values: Mapping[str, Any], key: str, n: int, known: dict[str, bool]) -> tuple[bool, ...]:
    kinds = values[key]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != n or not all(kind in known for kind in kinds):
        raise UserError(f"a U-Net with {key} {str(kinds)[:120]} has no single-file layout; {n} of {', '.join(known)} have.")
    return tuple(known[kind] for kind in kinds)
