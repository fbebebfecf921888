"""The `config.json` of every part of a single-file checkpoint, from the shapes of its tensors.

What shapes cannot tell is filled in by family, as the released models have it: heads, groups, image size, VAE scale,
activation. For widths that no release has (tiny models of tests), a norm has 32 groups or the largest power of two that
divides every width; for heads see `_heads`.
"""

import math
from collections.abc import Mapping
from typing import Any

from personalize.common.errors import UserError
from personalize.formats.clip_tokenizer import VOCABULARY_SIZE
from personalize.formats.detect import Shapes
from personalize.formats.ldm import NETWORKS, PREFIXES, SD2_LAYERS, file_keys, names
from personalize.formats.ldm_unet import MOST, count

Config = dict[str, Any]
LATENT_SIZE = {"sd1": 64, "sd2": 64, "sdxl": 128}
LATENT_SIZE_SD2_V = 96
SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
# Settings that change what the networks compute and that no shape tells, with what the libraries take where a config leaves
# one out.
UNET = {"act_fn": "silu", "attention_head_dim": 8, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0}
UNET |= {"mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32}
UNET |= {"resnet_time_scale_shift": "default", "time_embedding_type": "positional"}
VAE = {"act_fn": "silu", "latents_mean": None, "latents_std": None, "norm_num_groups": 32}
VAE |= {"scaling_factor": 0.18215, "shift_factor": None}
TEXT = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 8}
SCHEDULER = {"beta_end": 0.02, "beta_schedule": "linear", "beta_start": 1e-4, "num_train_timesteps": 1000}
SCHEDULER |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
SCHEDULER |= {"trained_betas": None}
NOT_TOLD_BY_SHAPES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "text_encoder_2": TEXT, "scheduler": SCHEDULER}


def infer_configs(shapes: Shapes, family: str, *, prediction: str) -> dict[str, Config]:
    """{part: config} of a single file {name: shape}, without a VAE where it has none.

    UserError where the shapes are not of the family's layout.
    """
    configs = {"unet": _unet(shapes, family)}
    if has_vae(shapes):
        configs["vae"] = infer_vae(shapes) | {"scaling_factor": SCALE[family]}
    configs |= {part: _text(shapes, family, part) for part in PREFIXES[family] if part.startswith("text_encoder")}
    set_size(configs, family, prediction)
    if family == "sdxl":
        condition_width = _size(shapes, PREFIXES[family]["unet"] + "label_emb.0.0.weight", 1)
        pooled = configs["text_encoder_2"]["projection_dim"]
        configs["unet"] |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (condition_width - pooled) // 6,  # height and width of original, crop and target
            "projection_class_embeddings_input_dim": condition_width,
        }
    return configs


def first_difference(configs: Mapping[str, Any], inferred: Mapping[str, Config]) -> str:
    """The first setting of `configs` that a reader of the single file would take for another, or "".

    Both are {part: config}, with "scheduler" as one of the parts. `configs` may be a stranger's JSON.
    """
    for part, inferred_config in inferred.items():
        config = configs.get(part)
        if not isinstance(config, dict):
            return f"no {part}"
        for key, default in NOT_TOLD_BY_SHAPES[part].items():
            value, expected = config.get(key, default), inferred_config.get(key, default)
            if key == "attention_head_dim" and isinstance(value, list) != isinstance(expected, list):
                blocks = len(inferred_config["block_out_channels"])
                value, expected = (heads if isinstance(heads, list) else [heads] * blocks for heads in (value, expected))
            if value != expected:
                return f"{part}.{key} = {str(value)[:60]} instead of {expected}"
    return ""


def _unet(shapes: Shapes, family: str) -> Config:
    prefix = PREFIXES[family]["unet"]
    levels = _levels(shapes, prefix)
    widths, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    attended = [width for width, depth in zip(widths, depths, strict=True) if depth] + widths[-1:]
    attention = f"{prefix}middle_block.1."
    layers = [depth or 1 for depth in depths[:-1]] + [depths[-1] or _depth(shapes, attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _size(shapes, f"{prefix}input_blocks.0.0.weight", 1),
        "out_channels": _size(shapes, f"{prefix}out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": _one_or_all([len(level) for level in levels]),
        "transformer_layers_per_block": _one_or_all(layers),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": _size(shapes, f"{attention}transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(_shape(shapes, f"{attention}proj_in.weight")) == 2,
        "attention_head_dim": _heads(family, widths, attended),  # diffusers' name for the number of heads
        "norm_num_groups": math.gcd(32, *widths),
        "upcast_attention": family == "sd2",  # SD2.1's attention overflows in half precision without
    }


def _levels(shapes: Shapes, prefix: str) -> list[list[tuple[int, int]]]:
    """(width, transformer layers) of every resnet of every resolution, on the way down."""
    levels: list[list[tuple[int, int]]] = [[]]
    for k in range(1, MOST):
        block = f"{prefix}input_blocks.{k}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        elif f"{block}0.in_layers.2.weight" in shapes:
            levels[-1].append((_size(shapes, f"{block}0.in_layers.2.weight", 0), _depth(shapes, f"{block}1.")))
        else:
            break
    if any(len(set(level)) != 1 for level in levels):
        raise UserError(
            f"the U-Net's {prefix}input_blocks are not blocks of equal resnets with a downsampler between them: "
            "it is not a Stable Diffusion 1.x, 2.x or SDXL."
        )
    return levels


def _depth(shapes: Shapes, prefix: str) -> int:
    return count(shapes, prefix + "transformer_blocks.{}.norm1.weight")


def has_vae(shapes: Shapes) -> bool:
    """Whether a single file has a VAE."""
    return any(name.startswith(NETWORKS["vae"]) for name in shapes)


def set_size(configs: dict[str, Config], family: str, prediction: str) -> None:
    """Write the size that a family is released at, which for SD2 its prediction decides, into the configs of U-Net and VAE."""
    size = LATENT_SIZE_SD2_V if (family, prediction) == ("sd2", "v_prediction") else LATENT_SIZE[family]
    configs["unet"]["sample_size"] = size
    if "vae" in configs:
        configs["vae"]["sample_size"] = size * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def infer_vae(shapes: Shapes) -> Config:
    """A VAE's config from the names and shapes of a single file; its scale is that of SD 1 and 2."""
    prefix = NETWORKS["vae"]
    blocks = f"{prefix}encoder.down."
    levels = count(shapes, blocks + "{}.block.0.conv1.weight")
    widths = [_size(shapes, f"{blocks}{k}.block.0.conv1.weight", 0) for k in range(levels)]
    if not widths:
        raise UserError(f"the VAE has no {blocks}0.block.0.conv1.weight: it is not a VAE of Stable Diffusion.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _size(shapes, f"{prefix}encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, f"{prefix}decoder.conv_out.weight", 0),
        "latent_channels": _size(shapes, f"{prefix}decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": count(shapes, blocks + "0.block.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": math.gcd(32, *widths),
        "scaling_factor": SCALE["sd1"],
        "mid_block_add_attention": f"{prefix}encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": f"{prefix}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in shapes,
    }


def _text(shapes: Shapes, family: str, part: str) -> Config:
    prefix = PREFIXES[family][part]
    shapes = {standard: shapes[key] for standard, key in file_keys(shapes, prefix).items()}
    openclip, projection = prefix.endswith(".model."), part == "text_encoder_2"
    table = names(part, family, {"num_hidden_layers": 1})
    tokens, positions = (table[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    inner = table["text_model.encoder.layers.0.mlp.fc1.weight"]
    depth = count(shapes, "{}".join(inner.rsplit("0", 1)))
    vocabulary, hidden = _size(shapes, tokens, 0), _size(shapes, tokens, 1)
    end = min(vocabulary, VOCABULARY_SIZE) - 1
    unused_width = hidden if family != "sd2" else 512  # SD2's config has CLIP's default; the model has no projection
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _size(shapes, inner, 0),
        "num_hidden_layers": min(depth, SD2_LAYERS) if family == "sd2" else depth,
        "num_attention_heads": hidden // math.gcd(64, hidden),
        "max_position_embeddings": _size(shapes, positions, 0),
        "projection_dim": _size(shapes, f"{prefix}text_projection", 1) if projection else unused_width,
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "layer_norm_eps": 1e-5,
        # The released configs say 0 and 2, which makes transformers take the largest id for the end: wrong with new words.
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": 0 if openclip else end,
        "dtype": "float32",  # else transformers loads half-precision weights as stored, and the U-Net beside it does not
    }


def _heads(family: str, widths: list[int], attended: list[int]) -> int | list[int]:
    """8 heads for SD1, else heads of width 64; where the widths with attention do not allow it, a smaller power of two."""
    if family == "sd1":
        return math.gcd(8, *attended)
    return [max(width // math.gcd(64, *attended), 1) for width in widths]


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"the file has no {name}: it is not a whole Stable Diffusion 1.x, 2.x or SDXL.")
    return shapes[name]


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = _shape(shapes, name)
    if len(shape) <= axis or shape[axis] < 1:
        raise UserError(f"{name} has shape {shape}: it is not a whole Stable Diffusion 1.x, 2.x or SDXL.")
    return shape[axis]
