"""Our samplers against diffusers' schedulers, and every row of both tables against known data."""

import numpy as np
import pytest
import torch

from personalize.common.errors import UserError
from personalize.core import schedule as S
from personalize.core.rng import generator, normal
from personalize.core.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m
from personalize.core.steering import edited, known
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


@pytest.mark.parametrize("name", EVERY)
def test_a_sampler_without_any_step_left_returns_what_it_started_from(name):
    schedule, start, generators = S.from_betas(S.scaled_linear(1000)), torch.randn(2, *SHAPE), streams(2)
    noise = normal(generators, SHAPE)
    assert torch.equal(EVERY[name](net, noise, schedule, 5, generators=generators, first=5, start=start), start)


@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("name", EVERY)
def test_an_image_is_noised_to_the_level_of_the_step_it_starts_at(name, spacing):
    schedule, start = S.from_betas(S.scaled_linear(1000), spacing=spacing, steps_offset=1), torch.randn(2, *SHAPE)

    def calls(**options):
        seen, generators = [], streams(2)
        noise = normal(generators, SHAPE)
        EVERY[name](
            lambda z, t: seen.append((t, z)) or net(z, t), noise, schedule, 10, generators=generators, start=start, **options
        )
        return seen, noise

    every_step = sorted({t for t, _ in calls()[0]}, reverse=True)
    for first in (0, 1, 4, 9):
        [(t, z), *_], noise = calls(first=first)
        alpha, sigma = schedule.level(t)
        assert t == every_step[first]
        rounded = name == "dpm++2m-karras"  # the timestep told to the network is, and the noise level is not
        torch.testing.assert_close(z, alpha * start + sigma * noise, rtol=0, atol=5e-3 if rounded else 1e-4)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "euler", "unipc", "heun", "dpm++2m-karras", "pndm"])
def test_steps_left_out_are_a_path_of_their_own(name):
    """For one point of data, whatever it starts from and wherever, the point is reached; each step is made once."""
    schedule, start = S.from_betas(S.scaled_linear(1000), steps_offset=1), torch.randn(2, *SHAPE)
    for first in (1, 2, 8, 9):
        told, noise = [], normal(streams(2), SHAPE)
        z0 = EVERY[name](exact(schedule), noise, schedule, 10, first=first, start=start, on_step=told.append)
        torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=1e-4)
        per_step = {"heun": 2 * (10 - first) - 1, "pndm": 10 - first + (first < 9)}
        assert len(told) == per_step.get(name, 10 - first)


@pytest.mark.parametrize("betas", [S.scaled_linear(1000), S.rescale_zero_terminal_snr(S.scaled_linear(1000))])
@pytest.mark.parametrize("name", ["euler", "euler-a", "heun"])
def test_between_timesteps_the_edited_z0_is_the_one_the_scheduler_reads(name, betas):
    """linspace visits 957.375; an edit that reads another noise level there than the scheduler would change something else."""
    schedule = S.from_betas(betas, "v_prediction", spacing="linspace")
    scheduler, seen, read, generators = build(ROWS[name], schedule, 25), [], [], streams(2)
    scheduler.set_timesteps(25)

    def change(z, t, z0):
        seen.append(z0 * 0.5)
        return seen[-1]

    guided, z = edited(net, schedule, change), normal(generators, SHAPE) * scheduler.init_noise_sigma
    assert scheduler.timesteps[1].item() % 1 != 0
    for t in scheduler.timesteps:
        first_stage = name != "heun" or scheduler.state_in_first_order
        sigma = scheduler.sigmas[(scheduler.step_index or 0) + (0 if first_stage else 1)]
        scaled = scheduler.scale_model_input(z, t)
        out = guided(scaled, t.item())
        if name != "heun":
            step = scheduler.step(out, t, z, generator=generators) if name == "euler-a" else scheduler.step(out, t, z)
            read.append(step.pred_original_sample)
        else:  # which does not tell: v at the noise level that it uses for this call
            read.append(z / (sigma**2 + 1) - out * sigma / (sigma**2 + 1).sqrt())
            step = scheduler.step(out, t, z)
        z = step.prev_sample
    for mine, theirs in zip(seen[1:], read[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("name", EVERY)
def test_a_known_region_is_kept_by_every_sampler(name, spacing):
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction", spacing=spacing)
    held, mask = torch.randn(1, *SHAPE, generator=generator(0, "known")), torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    z0 = draw(name, schedule, 10, guided=known(exact(schedule), schedule, held, mask))
    wanted = (mask * POINT + (1 - mask) * held).expand_as(z0)
    torch.testing.assert_close(z0, wanted, rtol=0, atol=1.0 if name == "pndm" else 1e-3)
