"""Inpainting bases, whose U-Net also takes a mask and a masked image: read, and drawn as diffusers draws them."""

import pytest
import torch
from bases import inpainting_base
from torch.nn.functional import interpolate

from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.generation import inpainting, sampling
from personalize.generation.inpainting import Canvas
from personalize.generation.sampling import image_generators
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    import diffusers

PROMPTS = ["a photo of a dog", "a cat in the snow"]
KIND = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}


@pytest.fixture(scope="module")
def pixels():
    return interpolate(rng.normal([rng.generator(3, "photo", 0)], (3, 8, 8)), 32, mode="bilinear").clamp(-1, 1)[0]


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:26] = 1
    return mask


def load(folder):
    return models.load_model(str(folder), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def folders(tiny_sd, tiny_sdxl, tmp_path_factory):
    place, bases = tmp_path_factory.mktemp("inpainting"), {"sd": tiny_sd, "sdxl": tiny_sdxl}
    return {name: inpainting_base(base, place / name, scale=0.1) for name, base in bases.items()}


def ours(model, canvas, how, prompts=PROMPTS):
    options = inpainting.sampling_options(model, canvas, how.steps)(len(prompts))
    return sampling.sample_latents(model, prompts, image_generators(0, range(len(prompts))), how, **options)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family", KIND)
def test_a_mask_is_the_inpaint_pipelines(folders, pixels, mask, family, strength):
    model, how = load(folders[family]), SamplingConfig("euler", 5, 3.0)
    pipeline = getattr(diffusers, KIND[family]).from_pretrained(folders[family], local_files_only=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    z0, grey = (model.encode_images(x[None])[0].repeat(2, 1, 1, 1) for x in (pixels, pixels * (1 - mask)))
    expected = pipeline(
        PROMPTS, generator=image_generators(0, range(2)), num_inference_steps=5, guidance_scale=3.0, image=z0,
        mask_image=mask[None], strength=strength, masked_image_latents=grey, height=32, width=32, output_type="latent",
    ).images  # fmt: skip
    latents = ours(model, Canvas(pixels, mask, strength), how)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert (latents - ours(model, Canvas(-pixels, mask, strength), how)).abs().max() > 1e-3, "the masked image did nothing"


@pytest.mark.parametrize("family", KIND)
def test_new_channels_of_zeros_are_the_old_base(tiny_sd, tiny_sdxl, tmp_path, pixels, family):
    plain = load(tiny_sd if family == "sd" else tiny_sdxl)
    wide, how = load(inpainting_base(plain.folder, tmp_path / "wide", scale=0.0)), SamplingConfig("ddim", 4, 3.0)
    assert (wide.inpaints, plain.inpaints, wide.latent_channels) == (True, False, 4)
    expected = sampling.sample_latents(plain, PROMPTS, image_generators(0, range(2)), how)
    torch.testing.assert_close(
        sampling.sample_latents(wide, PROMPTS, image_generators(0, range(2)), how), expected, rtol=0, atol=1e-5
    )
    begun = [ours(model, Canvas(pixels, strength=0.5), how) for model in (wide, plain)]
    torch.testing.assert_close(*begun, rtol=0, atol=1e-5)


def test_a_plain_image_is_one_of_which_nothing_is_kept(folders, pixels):
    model, how = load(folders["sd"]), SamplingConfig("ddim", 4, 3.0)
    plain = sampling.sample_latents(model, PROMPTS, image_generators(0, range(2)), how)
    everything = torch.ones(1, 32, 32)
    torch.testing.assert_close(ours(model, Canvas(pixels, everything), how), plain, rtol=0, atol=1e-6)
