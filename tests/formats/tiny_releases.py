"""Tiny random models with the full layout of the three releases, made once per process, and a tiny vocabulary."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch

from personalize.formats.ldm import tidy, to_ldm
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

FAMILIES = ("sd1", "sd2", "sdxl")
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# As released, but narrow: SD1 has 8 heads, SD2 and SDXL heads of 64, or what the inference takes for these widths.
UNETS = {
    "sd1": {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 8, "cross_attention_dim": 16}
    | {"down_block_types": (CROSS_DOWN,) * 3 + (DOWN,), "up_block_types": (UP,) + (CROSS_UP,) * 3, "sample_size": 64},
    "sd2": {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": [1, 1, 2, 2], "cross_attention_dim": 16}
    | {"down_block_types": (CROSS_DOWN,) * 3 + (DOWN,), "up_block_types": (UP,) + (CROSS_UP,) * 3, "sample_size": 96}
    | {"use_linear_projection": True, "upcast_attention": True},
    "sdxl": {"block_out_channels": (16, 16, 32), "attention_head_dim": [1, 1, 2], "cross_attention_dim": 48}
    | {"down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, CROSS_UP, UP), "sample_size": 128}
    | {"use_linear_projection": True, "transformer_layers_per_block": [1, 2, 3], "addition_embed_type": "text_time"}
    | {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 20 + 6 * 4},
}
SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
PIECES = 64
PLACES = 12


@cache
def models(family: str) -> dict:
    """{part: model}."""
    torch.manual_seed(0)
    size = UNETS[family]["sample_size"] * 8
    made = {
        "unet": UNet2DConditionModel(**UNETS[family], layers_per_block=2, norm_num_groups=16),
        "vae": AutoencoderKL(
            block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=8, latent_channels=4, sample_size=size,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=SCALE[family],
        ),
    }  # fmt: skip
    if family == "sd2":
        made["text_encoder"] = _text(CLIPTextModel, 16, "gelu", 0, projection_dim=512)
    else:
        made["text_encoder"] = _text(CLIPTextModel, 16, "quick_gelu", PIECES - 1, projection_dim=16)
    if family == "sdxl":
        made["text_encoder_2"] = _text(CLIPTextModelWithProjection, 32, "gelu", 0, projection_dim=20)
    for model in made.values():  # norms and biases start as ones and zeros, which would hide a swap
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.eval()
    return made


@cache
def states(family: str) -> dict[str, dict]:
    """{part: state dict as files have it}: text keys begin with `text_model.`."""
    return {part: tidy(part, model.state_dict()) for part, model in models(family).items()}


@cache
def configs(family: str) -> dict[str, dict]:
    """{part: what save_pretrained writes as config.json}."""
    made = {}
    for part, model in models(family).items():
        with tempfile.TemporaryDirectory() as folder:
            (model.save_config if hasattr(model, "save_config") else model.config.save_pretrained)(folder)
            made[part] = json.loads((Path(folder) / "config.json").read_text())
    return made


@cache
def _tensors(family: str) -> dict:
    return to_ldm(states(family), family, configs(family))


def tensors(family: str) -> dict:
    """A single file's tensors; a dict of the caller's own."""
    return dict(_tensors(family))


@cache
def layers(family: str) -> dict[str, set[str]]:
    """{part: dotted names of its Linear and Conv2d layers}, as the installed transformers calls them."""
    wanted = (torch.nn.Linear, torch.nn.Conv2d)
    parts = {part: model for part, model in models(family).items() if part != "vae"}
    return {part: {name for name, m in model.named_modules() if isinstance(m, wanted)} for part, model in parts.items()}


@cache
def norms(family: str) -> dict[str, set[str]]:
    """{part: dotted names of its norms}."""
    wanted = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    parts = {part: model for part, model in models(family).items() if part != "vae"}
    return {part: {name for name, m in model.named_modules() if isinstance(m, wanted)} for part, model in parts.items()}


def vocabulary(folder: Path) -> Path:
    """A folder with vocab.json and merges.txt, as many pieces as the text encoders have rows."""
    folder.mkdir(parents=True)
    letters = [chr(ord("!") + k) for k in range(PIECES - 2)]
    pieces = {piece: k for k, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def _text(kind, hidden: int, act: str, pad: int, **more):
    config = CLIPTextConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=1, vocab_size=PIECES,
        max_position_embeddings=PLACES, bos_token_id=PIECES - 2, eos_token_id=PIECES - 1, pad_token_id=pad, hidden_act=act,
        **more,
    )  # fmt: skip
    return kind(config)
