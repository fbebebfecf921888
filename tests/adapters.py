"""IP-Adapter files of random weights, named as h94/IP-Adapter names them, at tiny width."""

import torch
from PIL import Image

from personalize.formats.safetensors_io import save_tensors
from personalize.models.image_adapter import ENCODER
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers.models.embeddings import IPAdapterFullImageProjection, IPAdapterPlusImageProjection
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, EMBEDDING = 32, 24


def projection(kind, text):
    """The tensors of an adapter's projection by the names that the released files have."""
    if kind == "plain":
        return {
            "proj.weight": torch.randn(4 * text, EMBEDDING), "proj.bias": torch.randn(4 * text),
            "norm.weight": torch.rand(text), "norm.bias": torch.randn(text),
        }  # fmt: skip
    if kind == "full":
        names = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"}
        state = IPAdapterFullImageProjection(WIDTH, text).state_dict()
        return {next(n + k.removeprefix(o) for o, n in names.items() if k.startswith(o)): v for k, v in state.items()}
    state, out = IPAdapterPlusImageProjection(WIDTH, text, 64, depth=4, heads=1, num_queries=5).state_dict(), {}
    for key, value in state.items():
        for new, old in (("ln0", "0.norm1"), ("ln1", "0.norm2"), ("attn.to_q", "0.to_q"), ("attn.to_out.0", "0.to_out"),
                         ("ff.0", "1.0"), ("ff.1.net.0.proj", "1.1"), ("ff.1.net.2", "1.3")):  # fmt: skip
            key = key.replace(f".{new}.", f".{old}.")
        if "attn.to_v" in key:
            continue
        if "attn.to_k" in key:
            value, key = torch.cat([value, state[key.replace("to_k", "to_v")]]), key.replace("attn.to_k", "0.to_kv")
        out[key] = value
    return out


def write_adapter(folder, model, kind):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=EMBEDDING,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / ENCODER)
    unet, state = model.unet, {}
    cross = [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name]
    for k, attention in enumerate(cross):
        for part in ("to_k", "to_v"):
            state[f"ip_adapter.{2 * k + 1}.{part}_ip.weight"] = torch.randn(getattr(attention, part).weight.shape) * 0.2
    state |= {f"image_proj.{name}": value for name, value in projection(kind, unet.config.cross_attention_dim).items()}
    save_tensors(folder / "ip-adapter.safetensors", state)
    return folder / "ip-adapter.safetensors"


def images(count):
    noise = torch.randint(0, 256, (count, 20, 24, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in noise]
