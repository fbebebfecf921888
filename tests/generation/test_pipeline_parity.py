"""Our drawing, from prompt to image, against diffusers' own pipeline over the same weights."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import schedule as S
from personalize.generation import sampling
from personalize.generation.sampling import image_generators
from personalize.models import loading
from personalize.models.lazy_imports import lazy_imports
from personalize.training.loss import per_image_loss

with lazy_imports():
    import diffusers

PROMPTS = ["a photo of a dog", "a cat in the snow"]
THEIRS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
V = {"prediction_type": "v_prediction"}
ZERO = {**V, "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def eps_model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def scheduler_config(tiny_sd):
    return json.loads((tiny_sd / "scheduler" / "scheduler_config.json").read_text())


def ours(model, how, prompts=PROMPTS):
    generators = image_generators(0, range(len(prompts)))
    return model.decode_latents(sampling.sample_latents(model, prompts, generators, how))


def pipeline(model, config, name):
    kind, options = THEIRS[name]
    made = diffusers.StableDiffusionPipeline(
        vae=model.vae, unet=model.unet, text_encoder=model.text_encoders["text_encoder"],
        tokenizer=model.tokenizers["text_encoder"],
        scheduler=getattr(diffusers, kind).from_config({**config, **options}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def theirs(model, config, how, *, name):
    images = pipeline(model, config, name)(
        PROMPTS, generator=image_generators(0, range(2)), num_inference_steps=how.steps, guidance_scale=how.guidance,
        negative_prompt=[how.negative] * 2, guidance_rescale=how.rescale, output_type="pt",
    ).images  # fmt: skip
    return images * 2 - 1


def with_config(model, folder, tmp_path, edit):
    """The same weights under an edited scheduler config: the model that reads it, and the config."""
    shutil.copytree(folder / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | edit
    path.write_text(json.dumps(config))
    other = copy.copy(model)
    other.schedule = loading.load_schedule(tmp_path)
    return other, config


def assert_same(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01, "two grey images agree about nothing"


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler-a", "heun", "unipc"])
def test_an_image_is_the_one_the_pipeline_draws_from_the_same_generators(eps_model, scheduler_config, name):
    how = SamplingConfig(name, 5, 5.0, negative="a red hat")
    assert_same(ours(eps_model, how), theirs(eps_model, scheduler_config, how, name=name))


@pytest.mark.parametrize(("name", "spacing"), [("ddim", "trailing"), ("dpm++2m", "trailing"), ("dpm++2m-karras", "leading")])
def test_it_is_so_at_the_spacings_where_both_visit_the_same_timesteps(eps_model, tiny_sd, tmp_path, name, spacing):
    model, config = with_config(eps_model, tiny_sd, tmp_path, {"timestep_spacing": spacing})
    how = SamplingConfig(name, 5, 5.0)
    assert_same(ours(model, how), theirs(model, config, how, name=name))


def test_guidance_1_is_the_pipeline_without_guidance(eps_model, scheduler_config):
    how = SamplingConfig("ddim", 4, 1.0, negative="a red hat")
    assert_same(ours(eps_model, how), theirs(eps_model, scheduler_config, how, name="ddim"))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_v_prediction_base_is_read_from_its_scheduler_config(eps_model, tiny_sd, tmp_path, name):
    model, config = with_config(eps_model, tiny_sd, tmp_path, V)
    how = SamplingConfig(name, 5, 5.0)
    assert_same(ours(model, how), theirs(model, config, how, name=name))


def test_zero_terminal_snr_with_guidance_rescaling_is_the_pipelines(eps_model, tiny_sd, tmp_path):
    model, config = with_config(eps_model, tiny_sd, tmp_path, {**ZERO, "timestep_spacing": "trailing"})
    how = SamplingConfig("ddim", 5, 7.5, rescale=0.7)
    assert_same(ours(model, how), theirs(model, config, how, name="ddim"))
    assert (ours(model, replace(how, rescale=0.0)) - ours(model, how)).abs().max() > 1e-3, "rescaling did nothing"


def test_the_schedule_of_a_base_is_that_of_its_scheduler(tiny_sd, tmp_path, eps_model):
    for number, edit in enumerate([{}, V, ZERO, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]):
        model, config = with_config(eps_model, tiny_sd, tmp_path / str(number), edit)
        abar = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double()
        torch.testing.assert_close(model.schedule.alphas_cumprod, abar, rtol=2e-4, atol=1e-7)
        assert model.schedule.prediction == config.get("prediction_type", "epsilon") and model.schedule.T == 1000


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", "euler-a"])
def test_an_image_alone_is_the_image_in_a_batch(eps_model, sampler):
    how = SamplingConfig(sampler, 4, 5.0)
    torch.testing.assert_close(ours(eps_model, how, PROMPTS[:1]), ours(eps_model, how)[:1], rtol=0, atol=1e-5)


def test_outside_its_interval_guidance_is_off(eps_model):
    how = SamplingConfig("ddim", 4, 5.0)
    plain, full = ours(eps_model, replace(how, guidance=1.0)), ours(eps_model, how)
    assert torch.equal(ours(eps_model, replace(how, interval=(0.0, 1.0))), full)
    torch.testing.assert_close(ours(eps_model, replace(how, interval=(0.999, 1.0))), plain, rtol=0, atol=1e-6)
    late = ours(eps_model, replace(how, interval=(0.0, 0.5)))
    assert (late - full).abs().max() > 1e-4 and (late - plain).abs().max() > 1e-4


def test_prompts_are_encoded_as_the_pipeline_encodes_them(eps_model, scheduler_config):
    prompts = [*PROMPTS, "", "a dog " * 60, PROMPTS[0]]
    expected, _ = pipeline(eps_model, scheduler_config, "ddim").encode_prompt(prompts, "cpu", 1, False)
    with torch.no_grad():
        torch.testing.assert_close(eps_model.encode_prompts(prompts)["text"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sampling.encode_texts(eps_model, prompts)["text"], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_batch_is_the_squared_error_diffusers_trains_on(eps_model, scheduler_config):
    z0, eps = (torch.randn(3, 4, 16, 16, generator=g) for g in image_generators(1, range(2)))
    t = torch.tensor([10, 500, 990])
    with torch.no_grad():
        cond = eps_model.encode_prompts(["a photo of a dog"] * 3)
        noisy = diffusers.DDPMScheduler.from_config(scheduler_config).add_noise(z0, eps, t)
        expected = (eps_model.unet(noisy, t, cond["text"]).sample - eps).square().mean((1, 2, 3))
        loss = per_image_loss(eps_model, z0, cond, t=t, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    snr = S.from_betas(S.scaled_linear(1000)).snr(t)
    with torch.no_grad():
        weighted = per_image_loss(eps_model, z0, cond, t=t, eps=eps, snr_gamma=5.0)
    torch.testing.assert_close(weighted, expected * (5 / snr).clamp(max=1), rtol=1e-4, atol=1e-6)
