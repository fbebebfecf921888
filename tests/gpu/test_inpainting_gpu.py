"""On a card: an edit is the CPU's, and what is kept is the image's own."""

import pytest
import torch

from personalize import models
from personalize.common.recipe import SamplingConfig
from personalize.core import rng
from personalize.generation import inpainting, sampling
from personalize.generation.inpainting import Canvas

pytestmark = pytest.mark.gpu


def test_an_edit_on_a_card_is_the_cpus_and_keeps_the_images_pixels(tiny_sd):
    pixels = rng.normal([rng.generator(3, "photo", 0)], (3, 32, 32))[0].clamp(-1, 1)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:26] = 1
    canvas, how, images = Canvas(pixels, mask, 0.8, visits=2), SamplingConfig("ddpm", 4, 3.0), []
    for device in ("cpu", "cuda"):
        model = models.load_model(str(tiny_sd), device=device, dtype="float32", say=lambda line: None)
        options = inpainting.sampling_options(model, canvas, how.steps)(2)
        z0 = sampling.sample_latents(model, ["a dog"] * 2, sampling.image_generators(0, range(2)), how, **options)
        images.append(inpainting.paste_kept(model.decode_latents(z0), canvas, model.downscale).cpu())
    kept = (mask == 0).expand(2, 3, -1, -1)
    assert all(torch.equal(drawn[kept], pixels.expand(2, -1, -1, -1)[kept]) for drawn in images)
    torch.testing.assert_close(*images, rtol=0, atol=1e-2)  # convolutions in TF32
