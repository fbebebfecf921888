"""Our samplers against diffusers' schedulers, and every row of both tables against known data."""

import numpy as np
import pytest
import torch

from personalize.common.errors import UserError
from personalize.core import schedule as S
from personalize.core.rng import generator, normal
from personalize.core.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m
from personalize.generation.diffusers_samplers import DIFFUSERS, ROWS, build

SHAPE = (2, 4, 4)
POINT = torch.randn((1, *SHAPE), generator=generator(0, "point"))
EVERY = {**SAMPLERS, **DIFFUSERS}
READS_SAMPLE = sorted(SAMPLERS) + [name for name, row in ROWS.items() if "sample" in row.predictions]


def streams(count, first=0):
    return [generator(0, "image", first + i) for i in range(count)]


def net(z, t):
    """Some network: smooth in z and t, and nothing like a denoiser."""
    return torch.sin(2 * z) * 0.5 + 0.1 * np.cos(t / 100) + 0.3 * z.roll(1, -1)


def exact(schedule):
    """The best network for one point of data, between timesteps too."""
    table = schedule.alphas_cumprod.numpy()

    def guided(z, t):
        abar = np.interp(t, np.arange(schedule.T), table)
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        eps = (z - alpha * POINT) / sigma
        return {"epsilon": eps, "sample": POINT.expand_as(z), "v_prediction": alpha * eps - sigma * POINT}[schedule.prediction]

    return guided


def draw(name, schedule, steps, *, rows=2, first=0, guided=None):
    generators = streams(rows, first)
    noise = normal(generators, SHAPE)
    return EVERY[name](guided or exact(schedule), noise, schedule, steps, generators=generators)


def theirs(scheduler, steps, *, timesteps=None, **extra):
    """Their loop, as in a diffusers pipeline, with one generator per image."""
    generators = streams(2)
    z = normal(generators, SHAPE)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    for t in scheduler.timesteps:
        z = scheduler.step(net(z, t.item()), t, z, generator=generators, **extra).prev_sample
    return z


def ours(sampler, schedule, steps, **options):
    generators = streams(2)
    return sampler(net, normal(generators, SHAPE), schedule, steps, generators=generators, **options)


def config(schedule):
    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1).double(), schedule.alphas_cumprod[:-1]])
    return {
        "num_train_timesteps": schedule.T,
        "trained_betas": betas.tolist(),
        "prediction_type": schedule.prediction,
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.steps_offset,
    }


@pytest.mark.parametrize("prediction", S.PREDICTIONS)
@pytest.mark.parametrize("final_alpha_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("leading", 7), ("trailing", 20)])
def test_ddim_is_that_of_diffusers_where_its_stride_is_right(spacing, steps, eta, final_alpha_one, prediction):
    from diffusers import DDIMScheduler

    schedule = S.from_betas(S.scaled_linear(100, end=0.05), prediction, spacing=spacing, final_alpha_one=final_alpha_one)
    scheduler = DDIMScheduler(**config(schedule), clip_sample=False, set_alpha_to_one=final_alpha_one)
    expected = theirs(scheduler, steps, eta=eta)
    torch.testing.assert_close(ours(ddim, schedule, steps, eta=eta), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", S.PREDICTIONS)
@pytest.mark.parametrize("spacing", S.SPACINGS)
def test_dpmpp_2m_is_that_of_diffusers_on_the_same_timesteps(spacing, prediction):
    """Their `leading` and `linspace` divide by steps + 1, so the timesteps are handed over; the solver is what agrees."""
    from diffusers import DPMSolverMultistepScheduler

    schedule = S.from_betas(S.scaled_linear(100, end=0.05), prediction, spacing=spacing)
    scheduler = DPMSolverMultistepScheduler(**config(schedule), algorithm_type="dpmsolver++", solver_order=2)
    timesteps = schedule.timesteps(12).tolist()
    expected = theirs(scheduler, 12, timesteps=timesteps)
    torch.testing.assert_close(ours(dpmpp_2m, schedule, 12), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [12, 24])
def test_ddpm_is_that_of_diffusers(steps, variance):
    from diffusers import DDPMScheduler

    schedule = S.from_betas(S.linear(24, end=0.1))
    scheduler = DDPMScheduler(**config(schedule), clip_sample=False, variance_type=variance)
    torch.testing.assert_close(ours(ddpm, schedule, steps, variance=variance), theirs(scheduler, steps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_recovers_one_point_of_data(name, spacing, prediction):
    schedule = S.from_betas(S.scaled_linear(1000), prediction, spacing=spacing, steps_offset=1)
    z0 = draw(name, schedule, 10)
    rough = name == "pndm" and (spacing, prediction) != ("leading", "epsilon")  # stride T // steps; see the module
    torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=0.5 if rough else 1e-4)


@pytest.mark.parametrize("name", READS_SAMPLE)
def test_sample_predictions_are_read_by_those_that_can(name):
    z0 = draw(name, S.from_betas(S.scaled_linear(1000), "sample"), 10)
    torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(EVERY.keys() - set(READS_SAMPLE)))
def test_sample_predictions_are_refused_by_the_others(name):
    with pytest.raises(UserError, match="'sample' predictions"):
        draw(name, S.from_betas(S.scaled_linear(1000), "sample"), 10)


@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_stays_finite_at_zero_terminal_snr(name, spacing):
    betas = S.rescale_zero_terminal_snr(S.scaled_linear(1000))
    z0 = draw(name, S.from_betas(betas, "v_prediction", spacing=spacing), 30)
    torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=0.1 if name == "pndm" else 1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_image_of_a_batch_is_the_one_drawn_alone(name):
    schedule = S.from_betas(S.scaled_linear(1000))
    batch = draw(name, schedule, 5, rows=3, guided=net)
    for i in range(3):
        torch.testing.assert_close(draw(name, schedule, 5, rows=1, first=i, guided=net), batch[i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_asks_for_the_timesteps_of_its_range_and_tells_its_progress(name):
    schedule, asked, told = S.from_betas(S.scaled_linear(1000)), [], []

    def guided(z, t):
        asked.append(t)
        return net(z, t)

    generators = streams(1)
    EVERY[name](guided, normal(generators, SHAPE), schedule, 5, generators=generators, on_step=told.append)
    assert told == list(range(len(asked))) and len(asked) >= 5
    assert all(0 <= t <= 999 and isinstance(t, int | float) for t in asked)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_scheduler_of_diffusers_is_built_over_our_noise_levels(name):
    schedule = S.from_betas(S.cosine(1000), "v_prediction", spacing="trailing", steps_offset=1)
    scheduler = build(ROWS[name], schedule, 10)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-3, atol=1e-6)
    settings = (scheduler.config.prediction_type, scheduler.config.timestep_spacing, scheduler.config.steps_offset)
    assert settings == ("v_prediction", "trailing", 1)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_row_is_the_loop_of_a_diffusers_pipeline(name):
    """The same seeds give the image that their scheduler gives when it is called by hand."""
    schedule = S.from_betas(S.scaled_linear(1000), steps_offset=1)
    scheduler, generators = build(ROWS[name], schedule, 8), streams(2)
    scheduler.set_timesteps(8)
    z = normal(generators, SHAPE) * scheduler.init_noise_sigma
    takes = {"generator": generators} if ROWS[name].stochastic else {}
    for t in scheduler.timesteps:
        z = scheduler.step(net(scheduler.scale_model_input(z, t), t.item()), t, z, **takes).prev_sample
    assert torch.equal(draw(name, schedule, 8, guided=net), z)


def test_too_many_steps_for_a_scheduler_is_the_users_error():
    with pytest.raises(UserError, match="LCMScheduler cannot take 101 steps"):
        draw("lcm", S.from_betas(S.scaled_linear(100)), 101)
