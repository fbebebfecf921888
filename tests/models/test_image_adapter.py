"""IP-Adapter files, as h94/IP-Adapter has them at tiny width, against diffusers' own loading of them."""

import copy

import pytest
import torch
from PIL import Image

from personalize import models
from personalize.common.errors import UserError
from personalize.formats.safetensors_io import load_tensors, save_tensors
from personalize.models.fast_unet import IMAGE_KEYS_VALUES
from personalize.models.image_adapter import ENCODER, load_image_adapter
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers.models.embeddings import IPAdapterFullImageProjection, IPAdapterPlusImageProjection
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, EMBEDDING, SCALE = 32, 24, 0.7


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


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


def ours(model, prompt, z, t, cond):
    with torch.no_grad():
        return model.predict(z, t, model.prepare(cond) | prompt)


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_an_adapter_computes_what_diffusers_does(model, tmp_path, kind):
    adapter, _ = load_image_adapter(model, write_adapter(tmp_path, model, kind))
    prompt = adapter.prompt(images(2), SCALE)
    tensors = load_tensors(tmp_path / "ip-adapter.safetensors")
    parts = {
        part: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    theirs = copy.deepcopy(model.unet)
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [SCALE]
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([7, 700])
    cond = model.encode_prompts(["a photo of a dog", "a cat"])
    pixels = adapter.processor(images=images(2), return_tensors="pt").pixel_values
    with torch.no_grad():
        for part, x in zip(prompt.rows(2), (pixels, torch.zeros_like(pixels)), strict=True):
            out = adapter.encoder(x, output_hidden_states=True)
            told = out.image_embeds if kind == "plain" else out.hidden_states[-2]
            told = torch.zeros_like(told) if kind == "plain" and not x.any() else told
            added = {"image_embeds": [torch.stack([told] * 2)]}
            reference = theirs(z, t, cond["text"], added_cond_kwargs=added, return_dict=False)[0]
            assert (ours(model, part, z, t, cond) - reference).abs().max() < 1e-4
    assert (ours(model, prompt.rows(2)[0], z, t, cond) - ours(model, {}, z, t, cond)).abs().max() > 1e-2


def test_the_scale_is_of_what_images_add_alone(model, tmp_path):
    adapter, _ = load_image_adapter(model, write_adapter(tmp_path, model, "plain"))
    none, half, whole = (adapter.prompt(images(1), scale).cond for scale in (0.0, 0.5, 1.0))
    for name, kv in whole.items():
        k, v = kv.chunk(2, -1)
        assert name.startswith(IMAGE_KEYS_VALUES)
        assert torch.equal(half[name], torch.cat([k, 0.5 * v], -1)) and not none[name].chunk(2, -1)[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, folder: state.update({"lora.up": torch.zeros(2)}), "is no IP-Adapter: it has a tensor 'lora.up'"),
        (lambda state, folder: state.pop("ip_adapter.1.to_k_ip.weight"), "was made for another base"),
        (lambda state, folder: state.update({"image_proj.proj.weight": torch.zeros(8, 3)}), "cannot be read"),
        (lambda state, folder: state.pop("image_proj.proj.weight"), "those for faces need an encoder of faces"),
        (lambda state, folder: (folder / ENCODER).rename(folder / "elsewhere"), f"has no folder {ENCODER}"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_named(model, tmp_path, change, message):
    path = write_adapter(tmp_path, model, "plain")
    state = load_tensors(path)
    change(state, tmp_path)
    save_tensors(path, state)
    with pytest.raises(UserError, match=message):
        load_image_adapter(model, path)


def test_a_base_without_an_adapter_says_what_to_give(model):
    with pytest.raises(UserError, match="--adapter FILE"):
        load_image_adapter(model)
