"""The names of a Stable Diffusion U-Net in diffusers and in the original (LDM, SGM) code.

The original numbers all layers of one direction consecutively: `input_blocks.k.s` and `output_blocks.k.s`, where slot s is 0
for a resnet or a downsampler, 1 for a transformer, and the upsampler comes last; diffusers numbers them by resolution.
(CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py; the same in Stability-AI/generative-models.)
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from personalize.common.errors import UserError

TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # size, crop, pooled text: SDXL
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"} | TIME
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
MIDDLE = {f"mid_block.{x}": f"middle_block.{k}" for k, x in enumerate(("resnets.0", "attentions.0", "resnets.1"))}
UNBIASED = tuple(f"attn{k}.to_{x}" for k in (1, 2) for x in "qkv")
TRANSFORMER = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_out.0", *UNBIASED)
DEFAULTS = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "transformer_layers_per_block": 1}
DEFAULTS |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
DEFAULTS |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
MOST = 1000  # blocks, layers or transformers in one place: more is a damaged config


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """{diffusers key: original key without `model.diffusion_model.`} of every weight of the U-Net of a `config.json`.

    UserError where the original layout has no place for it.
    """
    return {
        f"{layer}.{end}": f"{original}.{end}"
        for layer, original in unet_layers(_layers_of(config)).items()
        for end in (("weight",) if layer.endswith(UNBIASED) else ("weight", "bias"))
    }


def unet_layers(layers: Iterable[str]) -> dict[str, str]:
    """{diffusers layer: original layer}, both dotted, of those layers that have an original name.

    `layers` are all layers of one U-Net: they say how many resnets each block has.
    """
    names = sorted(layers)
    originals, blocks = {}, _blocks({".".join(name.split(".")[:4]) for name in names})
    for name in names:
        match = re.match(r"(?:mid_block|(?:down|up)_blocks\.\d+)\.(?:resnets|attentions)\.\d+(?=\.)", name)
        if match and match[0] in blocks:
            inner = name[match.end() + 1 :]
            originals[name] = f"{blocks[match[0]]}.{RESNET.get(inner, inner)}"
        elif name in blocks:
            originals[name] = blocks[name]
    return originals


def count(names: Container[str], pattern: str) -> int:
    """How many names there are of a pattern such as "layers.{}.weight", from 0 on without a gap; MOST at most."""
    return next((k for k in range(MOST) if pattern.format(k) not in names), MOST)


def _blocks(present: set[str]) -> dict[str, str]:
    """{diffusers name: original name} of every resnet, attention and layer outside them; `present` has the resnets."""
    blocks = ENDS | ADDED | MIDDLE
    for side, original, k in (("down", "input", 1), ("up", "output", 0)):
        for i in range(count(present, f"{side}_blocks.{{}}.resnets.0")):
            block = f"{side}_blocks.{i}"
            for j in range(count(present, f"{block}.resnets.{{}}")):
                blocks |= {
                    f"{block}.resnets.{j}": f"{original}_blocks.{k}.0",
                    f"{block}.attentions.{j}": f"{original}_blocks.{k}.1",
                }
                k += 1
            if side == "down":
                blocks[f"{block}.downsamplers.0.conv"] = f"input_blocks.{k}.0.op"
                k += 1
            else:
                slot = 2 if f"{block}.attentions.0" in present else 1
                blocks[f"{block}.upsamplers.0.conv"] = f"output_blocks.{k - 1}.{slot}.conv"
    return blocks


def _layers_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Every layer with weights, in diffusers' names."""
    widths, resnets, down, middle, up = _structure(config)
    n, before = len(widths), widths[0]
    yield from ENDS | ADDED if config.get("addition_embed_type") == "text_time" else ENDS
    for i, width in enumerate(widths):
        for j in range(resnets[i]):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", before != width)
            yield from _transformer(f"down_blocks.{i}.attentions.{j}", down[i])
            before = width
        if i < n - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv"
    yield from _resnet("mid_block.resnets.0", False)
    yield from _transformer("mid_block.attentions.0", middle)
    yield from _resnet("mid_block.resnets.1", False)
    for i, width in enumerate(reversed(widths)):
        last, below = resnets[n - 1 - i], widths[max(n - 2 - i, 0)]
        for j in range(last + 1):
            skipped = below if j == last else width
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", before + skipped != width)
            yield from _transformer(f"up_blocks.{i}.attentions.{j}", up[i])
            before = width
        if i < n - 1:
            yield f"up_blocks.{i}.upsamplers.0.conv"


def _resnet(prefix: str, shortcut: bool) -> list[str]:
    return [f"{prefix}.{name}" for name in RESNET if shortcut or name != "conv_shortcut"]


def _transformer(prefix: str, depth: int) -> list[str]:
    ends = [f"{prefix}.{name}" for name in ("norm", "proj_in", "proj_out") if depth]
    return ends + [f"{prefix}.transformer_blocks.{k}.{name}" for k in range(depth) for name in TRANSFORMER]


def _structure(config: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int], list[int], int, list[int]]:
    """(widths, resnets, transformer layers per attention going down, in the middle, going up) of a U-Net's `config.json`.

    By block, in the order that the image passes them; widths and resnets are those of the down blocks, an up block has one
    resnet more; 0 layers where there is no attention.
    """
    values = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    widths = values["block_out_channels"]
    n = len(widths if isinstance(widths, (list, tuple)) else DEFAULTS["block_out_channels"])
    widths, resnets, depths = (
        _each(values, key, n) for key in ("block_out_channels", "layers_per_block", "transformer_layers_per_block")
    )
    rising = _each({"reverse_transformer_layers_per_block": depths[::-1]} | values, "reverse_transformer_layers_per_block", n)
    down, up = _attended(values, "Down", depths), _attended(values, "Up", rising)
    middle = values.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle != "UNetMidBlock2DCrossAttn":
        raise UserError(f"a U-Net with mid_block_type {middle!r} has no single-file layout; UNetMidBlock2DCrossAttn has.")
    return widths, resnets, down, depths[-1], up


def _each(values: Mapping[str, Any], key: str, n: int) -> Sequence[int]:
    """The setting as one positive integer per block."""
    value = values[key]
    per_block = [value] * n if type(value) is int else value
    most = MOST if key != "block_out_channels" else 1 << 20
    if not isinstance(per_block, (list, tuple)) or len(per_block) != n or not 0 < n <= MOST:
        raise UserError(f"a U-Net's config has {key} {str(value)[:80]}, which is not one number or {n} of them.")
    if not all(type(v) is int and 0 < v <= most for v in per_block):
        raise UserError(f"a U-Net's config has {key} {str(value)[:80]}, which has no single-file layout.")
    return per_block


def _attended(values: Mapping[str, Any], side: str, depths: Sequence[int]) -> list[int]:
    """The depths, 0 in blocks without attention."""
    key, known, n = f"{side.lower()}_block_types", (f"CrossAttn{side}Block2D", f"{side}Block2D"), len(depths)
    kinds = values[key]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != n or not all(kind in known for kind in kinds):
        raise UserError(f"a U-Net with {key} {str(kinds)[:120]} has no single-file layout; {n} of {', '.join(known)} have.")
    return [depth if kind == known[0] else 0 for depth, kind in zip(depths, kinds, strict=True)]
