"""SDXL: our prompts, images and predictions against diffusers' own pipeline over the same weights."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from personalize import models
from personalize.common.recipe import load_recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.data.crops import Crop, Photo, corner
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.data.training_set import build_training_set
from personalize.generation import sampling
from personalize.generation.sampling import image_generators
from personalize.models.lazy_imports import lazy_imports
from personalize.training.loss import per_image_loss

with lazy_imports():
    import diffusers

PROMPTS = ["a photo of a dog", "a cat in the snow"]
HAT = "a red hat"
THEIRS = {"ddim": ("DDIMScheduler", {"clip_sample": False}), "euler": ("EulerDiscreteScheduler", {})}


@pytest.fixture(scope="module")
def model(tiny_sdxl):
    return models.load_model(str(tiny_sdxl), device="cpu", say=lambda line: None)


def pipeline(model, name="ddim", **edit):
    kind, options = THEIRS[name]
    config = json.loads((model.folder / "scheduler" / "scheduler_config.json").read_text())
    made = diffusers.StableDiffusionXLPipeline(
        vae=model.vae, unet=model.unet, scheduler=getattr(diffusers, kind).from_config({**config, **options, **edit}),
        text_encoder=model.text_encoders["text_encoder"], text_encoder_2=model.text_encoders["text_encoder_2"],
        tokenizer=model.tokenizers["text_encoder"], tokenizer_2=model.tokenizers["text_encoder_2"],
        force_zeros_for_empty_prompt=model.index["force_zeros_for_empty_prompt"], add_watermarker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def ours(model, how, prompts=PROMPTS):
    return model.decode_latents(sampling.sample_latents(model, prompts, image_generators(0, range(len(prompts))), how))


def theirs(model, how, *, prompts=PROMPTS, **more):
    images = pipeline(model, how.sampler)(
        prompts, generator=image_generators(0, range(len(prompts))), num_inference_steps=how.steps,
        guidance_scale=how.guidance, negative_prompt=[how.negative] * len(prompts) if how.negative else None,
        guidance_rescale=how.rescale, output_type="pt", **more,
    ).images  # fmt: skip
    return images * 2 - 1


def assert_same(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01, "two grey images agree about nothing"


@pytest.mark.parametrize("negative", ["", HAT])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_an_image_is_the_one_the_pipeline_draws_from_the_same_generators(model, name, guidance, negative):
    how = SamplingConfig(name, 5, guidance, negative=negative)
    assert_same(ours(model, how), theirs(model, how))


def test_what_is_asked_for_changes_the_image(model):
    """Else the tests above would hold of a base that does not look at its conditions."""
    how = SamplingConfig("ddim", 5, 5.0, negative=HAT)
    image = ours(model, how)
    for other in (replace(how, negative=""), replace(how, guidance=1.0), replace(how, guidance=7.0)):
        assert (ours(model, other) - image).abs().max() > 1e-3
    assert (ours(model, how, PROMPTS[::-1]) - image).abs().max() > 1e-3


def test_guidance_rescaling_is_the_pipelines(model):
    how = SamplingConfig("ddim", 5, 7.5, rescale=0.7)
    assert_same(ours(model, how), theirs(model, how))
    assert (ours(model, replace(how, rescale=0.0)) - ours(model, how)).abs().max() > 1e-3, "rescaling did nothing"


def test_images_larger_than_the_base_was_trained_at_are_the_pipelines(model):
    how = SamplingConfig("euler", 3, 5.0, size=48)
    assert_same(ours(model, how), theirs(model, how, height=48, width=48))


def test_the_size_conditions_are_those_of_the_pipeline(model):
    """The image's own size: telling the base another one gives another image."""
    how = SamplingConfig("ddim", 4, 5.0)
    same = theirs(model, how, original_size=(32, 32), target_size=(32, 32), crops_coords_top_left=(0, 0))
    other = theirs(model, how, original_size=(16, 16), target_size=(32, 32), crops_coords_top_left=(0, 0))
    assert_same(ours(model, how), same)
    assert (other - same).abs().max() > 1e-3


@pytest.mark.parametrize("negative", [None, [HAT] * 5])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(model, negative):
    prompts = [*PROMPTS, "a dog " * 60, "a dog!", PROMPTS[0]]
    text, no_text, pooled, no_pooled = pipeline(model).encode_prompt(prompts, device="cpu", negative_prompt=negative)
    with torch.no_grad():
        for encode in (model.encode_prompts, lambda texts: sampling.encode_texts(model, texts)):
            cond, uncond = encode(prompts), encode(negative or [""] * 5)
            for found, expected in (
                (cond["text"], text), (cond["pooled"], pooled), (uncond["text"], no_text), (uncond["pooled"], no_pooled),
            ):  # fmt: skip
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_two_tokenizers_pad_differently(model):
    first, second = (model.tokens(part, ["a dog"])[0] for part in model.text_encoders)
    end = model.tokenizers["text_encoder"].eos_token_id
    length = int((first == end).int().argmax())
    assert torch.equal(first[: length + 1], second[: length + 1])
    assert set(first[length + 1 :].tolist()) == {end} and set(second[length + 1 :].tolist()) == {0}


def test_an_empty_prompt_is_the_one_that_is_not_given(model):
    """Guidance from nothing to nothing is none, whatever its scale: an empty prompt is what the base learned as none."""
    how = SamplingConfig("ddim", 4, 5.0)
    assert_same(ours(model, how, ["", ""]), ours(model, replace(how, guidance=1.0), ["", ""]))


def test_the_loss_of_a_batch_is_the_squared_error_diffusers_trains_on(model):
    """examples/dreambooth/train_dreambooth_lora_sdxl.py: time ids (original size, crop, target size), pooled text."""
    z0, eps = (torch.randn(3, 4, 16, 16, generator=g) for g in image_generators(1, range(2)))
    t = torch.tensor([10, 500, 990])
    made = pipeline(model)
    with torch.no_grad():
        text, _, pooled, _ = made.encode_prompt(["a photo of a dog"] * 3, device="cpu", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(3, 1)}
        noisy = diffusers.DDPMScheduler.from_config(made.scheduler.config).add_noise(z0, eps, t)
        out = model.unet(noisy, t, text, added_cond_kwargs=added).sample
        cond = model.encode_prompts(["a photo of a dog"] * 3)
        loss = per_image_loss(model, z0, cond, t=t, eps=eps)
    torch.testing.assert_close(loss, (out - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_a_photo_is_told_with_its_size_and_crop_and_a_class_image_with_none(model, tmp_path):
    """As the base was trained (2307.01952, section 2.2) and as diffusers' script trains it: height and width of the file, top
    and left of the crop in the resized photo, the size now.
    """
    for name, size in (("a", (1999, 1000)), ("b", (64, 96))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    recipe = load_recipe(None, ["class_word=dog", "train.batch=2", "train.prior_batch=1", "photos.min_size=32"])
    known = [Subject("zqv", "dog", load_photos(tmp_path, min_size=32)[0])]
    data = build_training_set(model, recipe, known, priors={"dog": torch.zeros(1, 4, 16, 16)}, text_trains=False)
    batch = data.at(0)
    cond = batch.cond(slice(0, 3))
    wide, tall = [1000.0, 1999.0, 0.0, 16.0, 32.0, 32.0], [96.0, 64.0, 8.0, 0.0, 32.0, 32.0]
    rows = cond["sizes"].tolist()
    assert sorted(rows[:2]) == [tall, wide] and rows[2] == [32.0, 32.0, 0.0, 0.0, 32.0, 32.0]
    assert torch.equal(batch.cond(slice(1, 3))["sizes"], cond["sizes"][1:])
    added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]}
    with torch.no_grad():
        z_t = model.schedule.add_noise(batch.z0, batch.eps, batch.t)
        expected = model.unet(z_t, batch.t, cond["text"], added_cond_kwargs=added).sample
        torch.testing.assert_close(model.predict(z_t, batch.t, cond), expected, rtol=1e-4, atol=1e-5)
        plain = model.predict(z_t, batch.t, {k: v for k, v in cond.items() if k != "sizes"})
    assert (plain - expected)[:2].abs().max() > 1e-3 and torch.allclose(plain[2], expected[2], atol=1e-5)


def test_a_mirrored_crop_has_the_corner_of_the_mirrored_photo():
    photo = Photo("a", Image.new("RGB", (200, 100)), "", None, (200, 100))
    assert corner(Crop(photo, (20, 0, 120, 100)), 50) == (10, 0)
    assert corner(Crop(photo, (20, 0, 120, 100), mirrored=True), 50) == (40, 0)


def test_sizes_are_told_in_float32_whatever_the_dtype(tiny_sdxl, monkeypatch):
    model, seen = models.load_model(str(tiny_sdxl), device="cpu", dtype="bfloat16", say=lambda line: None), []
    arguments = model.family.unet_arguments
    monkeypatch.setattr(model.family, "unet_arguments", lambda cond, size: seen.append(cond["sizes"]) or arguments(cond, size))
    cond = model.encode_prompts(["a dog"]) | model.size_conditions([(1999, 1000)], [(16, 0)], 32)
    with torch.no_grad():
        model.predict(torch.zeros(1, 4, 16, 16), torch.ones(1), cond)
    assert seen[0].dtype == torch.float32 and seen[0][0, 1] == 1999
