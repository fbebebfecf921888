"""IP-Adapter files, as h94/IP-Adapter has them at tiny width, against diffusers' own loading of them."""

import copy

import pytest
import torch
from adapters import images, write_adapter

from personalize import models
from personalize.common.errors import UserError
from personalize.formats.safetensors_io import load_tensors, save_tensors
from personalize.models.fast_unet import IMAGE_KEYS_VALUES
from personalize.models.image_adapter import ENCODER, load_image_adapter

SCALE = 0.7


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


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


def wider(state):
    return {name: torch.zeros(len(weight), 9) for name, weight in state.items() if "_ip" in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, folder: state.update({"lora.up": torch.zeros(2)}), "is no IP-Adapter: it has a tensor 'lora.up'"),
        (lambda state, folder: state.pop("ip_adapter.1.to_k_ip.weight"), "was made for another base"),
        (lambda state, folder: state.update({"image_proj.proj.weight": torch.zeros(8, 3)}), "cannot be read"),
        (lambda state, folder: state.pop("image_proj.proj.weight"), "those for faces need an encoder of faces"),
        (lambda state, folder: state.update(wider(state)), r"of width \d+, and the file has keys for \d+, of width 9\."),
        (
            lambda state, folder: (folder / ENCODER / "config.json").write_text("{}"),
            "of two models, for .* is .* and should be",
        ),
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
