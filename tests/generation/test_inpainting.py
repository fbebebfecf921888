"""Images that begin with one: against diffusers' pipelines over the same weights, and at both ends of the strength."""

import copy
import json

import pytest
import torch
from torch.nn.functional import interpolate

from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.generation import inpainting, sampling
from personalize.generation.inpainting import Canvas
from personalize.generation.sampling import image_generators
from personalize.models import loading
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    import diffusers

PROMPTS = ["a photo of a dog", "a cat in the snow"]
KINDS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True}  # ours and theirs visit the same timesteps, and end clean
ZERO = TRAILING | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def config(tiny_sd):
    return json.loads((tiny_sd / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def pixels():
    return interpolate(rng.normal([rng.generator(3, "photo", 0)], (3, 8, 8)), 32, mode="bilinear").clamp(-1, 1)[0]


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:26] = 1  # whole cells of 2 px, where the two ways to shrink a mask agree
    return mask


def with_schedule(model, config, folder, edit):
    """The same weights under an edited scheduler config: the model that reads it, and the config."""
    (folder / "scheduler").mkdir()
    config = config | edit
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    other = copy.copy(model)
    other.schedule = loading.load_schedule(folder)
    return other, config


def ours(model, canvas, how, prompts=PROMPTS):
    options = inpainting.sampling_options(model, canvas, how.steps)(len(prompts))
    return sampling.sample_latents(model, prompts, image_generators(0, range(len(prompts))), how, **options)


def theirs(kind, model, config, how, **options):
    scheduler, more = KINDS[how.sampler]
    made = kind(
        vae=model.vae, unet=model.unet, text_encoder=model.text_encoders["text_encoder"],
        tokenizer=model.tokenizers["text_encoder"],
        scheduler=getattr(diffusers, scheduler).from_config({**config, **more}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made(
        PROMPTS, generator=image_generators(0, range(2)), num_inference_steps=how.steps, guidance_scale=how.guidance,
        output_type="latent", **options,
    ).images  # fmt: skip


def assert_same(latents, expected):
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01 and (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", KINDS)
def test_an_image_to_begin_with_is_the_img2img_pipelines(model, config, pixels, tmp_path, sampler):
    model, config = with_schedule(model, config, tmp_path, TRAILING)
    how, z0 = SamplingConfig(sampler, 5, 3.0), model.encode_images(pixels[None])[0]
    expected = theirs(
        diffusers.StableDiffusionImg2ImgPipeline, model, config, how, image=torch.cat([z0, z0]), strength=0.6
    )  # latents: theirs would add the VAE's noise
    assert_same(ours(model, Canvas(pixels, strength=0.6), how), expected)


@pytest.mark.parametrize(("sampler", "strength"), [*((name, 0.6) for name in KINDS), ("ddim", 1.0)])
def test_a_mask_is_the_inpaint_pipelines(model, config, pixels, mask, tmp_path, sampler, strength):
    """Theirs begins what is kept from pure noise at strength 1, which is the same at zero terminal SNR alone."""
    model, config = with_schedule(model, config, tmp_path, ZERO if strength == 1 else TRAILING)
    how, z0 = SamplingConfig(sampler, 5, 3.0), model.encode_images(pixels[None])[0]
    expected = theirs(
        diffusers.StableDiffusionInpaintPipeline, model, config, how, image=torch.cat([z0, z0]), mask_image=mask[None],
        masked_image_latents=torch.cat([z0, z0]), height=32, width=32, strength=strength,
    )  # fmt: skip
    assert_same(ours(model, Canvas(pixels, mask, strength), how), expected)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_at_zero_terminal_snr_strength_1_is_plain_drawing_bit_for_bit(model, config, pixels, tmp_path, sampler):
    model, _ = with_schedule(model, config, tmp_path, ZERO)
    how = SamplingConfig(sampler, 4, 3.0)
    plain = sampling.sample_latents(model, PROMPTS, image_generators(0, range(2)), how)
    assert torch.equal(ours(model, Canvas(pixels, strength=1.0), how), plain)
    assert not torch.equal(ours(model, Canvas(pixels, strength=0.75), how), plain)


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "lcm"])
def test_strength_0_is_the_vaes_reconstruction(model, pixels, sampler):
    z0 = ours(model, Canvas(pixels, strength=0.0), SamplingConfig(sampler, 4, 3.0))
    assert torch.equal(z0, model.encode_images(pixels[None])[0].expand(2, -1, -1, -1))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "euler-a"])
def test_an_edit_alone_is_the_edit_in_a_batch_and_the_kept_latents_are_the_images(model, pixels, mask, sampler):
    how, canvas = SamplingConfig(sampler, 4, 3.0), Canvas(pixels, mask)
    both = ours(model, canvas, how)
    torch.testing.assert_close(ours(model, canvas, how, PROMPTS[:1]), both[:1], rtol=0, atol=1e-4)
    z0, cells = model.encode_images(pixels[None])[0], inpainting.painted_cells(mask, 2)
    assert ((both - z0) * (1 - cells)).abs().max() < 1e-4 < ((both - z0) * cells).abs().max()


def test_visits_make_each_step_but_the_last_again(model, pixels, mask, monkeypatch):
    calls, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, cond: calls.append(1) or predict(z, t, cond))
    ours(model, Canvas(pixels, mask, visits=3), SamplingConfig("ddpm", 4, 3.0))
    assert len(calls) == 3 * 3 + 1


def test_a_cell_is_painted_if_any_pixel_of_it_is():
    mask = torch.zeros(1, 16, 16)
    mask[0, 9, 3] = 1
    cells = inpainting.painted_cells(mask, 8)
    assert cells.tolist() == [[[0, 0], [1, 0]]]


def test_a_feathered_mask_is_0_outside_1_a_cell_inside_and_at_the_images_edge_and_in_narrow_places():
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:, 16:] = 1  # to the edge of the image
    mask[:, 2:4] = 1  # 2 px narrow
    soft = inpainting.feathered(mask, 8)
    assert torch.equal(soft > 0, mask > 0)
    assert soft[0, 40, 16:26].tolist() == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1]
    assert soft[0, 63, 63] == 1 and (soft[0, 2:4, 20:44] == 1).all()


def test_what_is_kept_is_the_images_own_to_the_bit_and_what_is_painted_the_drawn_ones(pixels, mask):
    drawn = rng.normal([rng.generator(5, "drawn", 0)], (3, 32, 32)).clamp(-1, 1).expand(2, 3, 32, 32)
    pasted = inpainting.paste_kept(drawn, Canvas(pixels, mask), 2)
    kept = mask.expand(3, -1, -1) == 0
    assert all(torch.equal(row[kept], pixels[kept]) for row in pasted)
    assert torch.equal(pasted[:, :, 10:18, 12:24], drawn[:, :, 10:18, 12:24])
    assert inpainting.paste_kept(drawn, Canvas(pixels), 2) is drawn
