"""Stable Diffusion 1.x, 2.1-v and SDXL in their full layout at tiny width, random, saved as users have them.

Blocks, layers, heads, projections and conditions are those of the releases; widths, and the depth of the text encoders,
are not. Sizes are: these bases say that they were trained at 512, 768 and 1024 px.
"""

import json
import shutil
from pathlib import Path

import torch

from personalize.formats import single_file
from personalize.formats.safetensors_io import load_tensors, save_tensors
from personalize.models.lazy_imports import lazy_imports
from personalize.toyland.pretraining import networks, stages

with lazy_imports():
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CAPTIONS = ["a photo of a dog", "a cat in the snow", "a dog zqv", "a red hat", "a photo of a cat"] * 5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def sd1(folder: Path) -> Path:
    """Stable Diffusion 1.5: four resolutions, 8 heads each, convolutions around attention, epsilon, 512 px."""
    words = tokenizer(pad="<|endoftext|>")
    parts = {
        "unet": unet((32, 64, 64, 64), (CROSS, CROSS, CROSS, PLAIN), text=48, sample_size=64, attention_head_dim=8),
        "vae": vae(512, scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(text(words, 48, layers=3, act="quick_gelu")),
        "tokenizer": words,
        "scheduler": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    }
    return saved(diffusers.StableDiffusionPipeline, folder, parts, **NO_CHECKER)


def sd2(folder: Path) -> Path:
    """Stable Diffusion 2.1: heads of one width, linear projections, OpenCLIP without its last layer, v prediction, 768 px."""
    words = tokenizer(pad="!")
    parts = {
        "unet": unet(
            (32, 64, 96, 96), (CROSS, CROSS, CROSS, PLAIN), text=96, sample_size=96, attention_head_dim=(1, 2, 3, 3),
            use_linear_projection=True, upcast_attention=True,
        ),
        "vae": vae(768, scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(text(words, 96, layers=23, act="gelu", projection_dim=512)),
        "tokenizer": words,
        "scheduler": diffusers.DDIMScheduler(
            **BETAS, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False
        ),
    }  # fmt: skip
    return saved(diffusers.StableDiffusionPipeline, folder, parts, **NO_CHECKER)


def sdxl(folder: Path) -> Path:
    """SDXL: three resolutions with 0, 2 and 10 transformers, two text encoders, pooled text and sizes, epsilon, 1024 px."""
    words, padded = tokenizer(pad="<|endoftext|>"), tokenizer(pad="!")
    parts = {
        "unet": unet(
            (32, 64, 96), (PLAIN, CROSS, CROSS), text=48 + 80, sample_size=128, attention_head_dim=(1, 2, 3),
            use_linear_projection=True, transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
            addition_time_embed_dim=16, projection_class_embeddings_input_dim=72 + 6 * 16,
        ),
        "vae": vae(1024, scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(text(words, 48, layers=3, act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(text(words, 80, layers=4, act="gelu", projection_dim=72)),
        "tokenizer": words,
        "tokenizer_2": padded,
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    }  # fmt: skip
    return saved(diffusers.StableDiffusionXLPipeline, folder, parts, add_watermarker=False)


LAYOUTS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def single(folder: Path, file: Path) -> Path:
    """The same weights in one file, in half precision, as other programs write it; the tokenizer lies beside it."""
    single_file.pack_single_file(folder, file, half=True)
    save_tensors(file, load_tensors(file))  # a file of other programs need not say what it is
    words = file.parent / "tokenizer"
    words.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (words / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    return file


def packable(folder: Path, copy: Path) -> Path:
    """A copy of a tiny base with the heads and groups that a reader of a single file takes for its widths."""
    shutil.copytree(folder, copy)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        path = copy / part / "config.json"
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        if part in ("unet", "vae"):
            config["norm_num_groups"] = min(config["block_out_channels"])
        if part == "unet":
            config["attention_head_dim"] = 8 if config.get("addition_embed_type") is None else [1, 1]
        if part.startswith("text"):
            config["num_attention_heads"] = config["hidden_size"] // (config["hidden_size"] & -config["hidden_size"])
        path.write_text(json.dumps(config))
    return copy


def inpainting_base(folder: Path, copy: Path, *, scale: float) -> Path:
    """A copy of a base whose U-Net takes a mask and a masked image too, with random weights of that scale for them."""
    shutil.copytree(folder, copy)
    index, config = copy / "model_index.json", copy / "unet" / "config.json"
    index.write_text(index.read_text().replace('Pipeline"', 'InpaintPipeline"'))
    files = {file: load_tensors(file) for file in (copy / "unet").glob("*.safetensors")}
    file, weights = next((file, tensors) for file, tensors in files.items() if "conv_in.weight" in tensors)
    settings, conv = json.loads(config.read_text()), weights["conv_in.weight"]
    settings["in_channels"] = 2 * settings["in_channels"] + 1
    more = scale * torch.randn(len(conv), conv.shape[1] + 1, 3, 3, generator=torch.Generator().manual_seed(1))
    config.write_text(json.dumps(settings))
    save_tensors(file, weights | {"conv_in.weight": torch.cat([conv, more.to(conv)], 1).contiguous()}, {"format": "pt"})
    return copy


def tokenizer(*, pad: str):
    """A small CLIP tokenizer for 77 tokens, filled up with `pad`: CLIP's with its end, OpenCLIP's with "!"."""
    model = json.loads(networks.tokenizer(CAPTIONS).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token=pad, model_max_length=77)


def text(words, width: int, *, layers: int, act: str, **more) -> CLIPTextConfig:
    """Heads of 64, or of the largest power of two in `width`; eos_token_id 2 as in all releases, which is not the end's."""
    sizes = {"vocab_size": len(words), "num_attention_heads": width // min(64, width & -width)} | more
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, hidden_act=act, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=2, **sizes,
    )  # fmt: skip


def unet(widths: tuple[int, ...], down: tuple[str, ...], *, text: int, **more) -> UNet2DConditionModel:
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=widths, cross_attention_dim=text,
        down_block_types=down, up_block_types=up, **more,
    )  # fmt: skip


def vae(size: int, *, widths: tuple[int, ...] = (16, 32, 32, 32), scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=min(32, widths[0]), latent_channels=4, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=scaling_factor,
    )  # fmt: skip


def saved(kind, folder: Path, parts: dict, *, half: bool = False, **more) -> Path:
    """A diffusers folder in half or in single precision; with the same numbers, so that one can be compared to the other."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.half() if half else part.half().float()
    kind(**parts, **more).save_pretrained(folder, safe_serialization=True)
    for name in parts:
        if name.startswith("tokenizer"):
            stages.tokenizer_files(folder / name, parts[name])
    return folder
