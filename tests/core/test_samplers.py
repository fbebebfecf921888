"""What personalize.core.samplers promises, on data whose exact denoiser is known."""

import math
from dataclasses import replace

import pytest
import torch

from personalize.core import schedule as S
from personalize.core.rng import generator, normal
from personalize.core.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m

SHAPE = (2, 4, 4)
POINT = torch.randn((1, *SHAPE), generator=generator(0, "point"), dtype=torch.float64)
PLAIN = S.scaled_linear(1000)
ZERO_SNR = S.rescale_zero_terminal_snr(PLAIN)


def streams(count):
    return [generator(0, "image", i) for i in range(count)]


def exact(schedule, mean, spread=0.0, seen=None):
    """The best possible network for data N(mean, spread^2), pixel by pixel; notes each eps in `seen`."""

    def guided(z, t):
        alpha, sigma = schedule.coefficients(t, z)
        z0 = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (z - alpha * mean)
        eps = (z - alpha * z0) / sigma
        if seen is not None:
            seen.append(eps)
        return schedule.target(z0, eps, t)

    return guided


def draw(sampler, schedule, steps, *, count=2, dtype=torch.float64, **options):
    generators = streams(count)
    noise = normal(generators, SHAPE).to(dtype)
    return sampler(exact(schedule, POINT.to(dtype)), noise, schedule, steps, generators=generators, **options)


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("prediction", S.PREDICTIONS)
@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_a_deterministic_sampler_sees_the_same_eps_at_every_step(sampler, prediction, spacing, steps):
    schedule = S.from_betas(PLAIN, prediction, spacing=spacing, steps_offset=1)
    seen, noise = [], normal(streams(2), SHAPE).double()
    sampler(exact(schedule, POINT, seen=seen), noise, schedule, steps)
    assert len(seen) == steps
    for eps in seen:
        torch.testing.assert_close(eps, seen[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("prediction", S.PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_point_of_data_is_recovered(name, prediction, spacing, steps):
    schedule = S.from_betas(PLAIN, prediction, spacing=spacing, steps_offset=1)
    z0 = draw(SAMPLERS[name], schedule, steps)
    torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_an_ordinary_start(name, prediction, steps):
    schedule = S.from_betas(ZERO_SNR, prediction, spacing="trailing")
    assert schedule.alphas_cumprod[schedule.timesteps(steps)[0]] == 0
    z0 = draw(SAMPLERS[name], schedule, steps)
    torch.testing.assert_close(z0, POINT.expand_as(z0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("betas", "mean"), [(PLAIN, 0.0), (ZERO_SNR, 1.5)], ids=["plain", "zero_snr"])
@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        (ddpm, 200, {}),
        (ddpm, 200, {"variance": "fixed_large"}),
        (ddim, 200, {}),
        (ddim, 200, {"eta": 1.0}),
        (dpmpp_2m, 50, {}),
    ],
)
def test_gaussian_data_keep_their_mean_and_spread(sampler, steps, options, betas, mean):
    """A plain schedule starts from N(0, 1) where data of another mean would not be: there only mean 0 can come out."""
    schedule = S.from_betas(betas, "v_prediction", spacing="trailing")
    generators = [generator(0, "many")]
    noise = normal(generators, (1, 100, 100))
    z0 = sampler(exact(schedule, mean, 0.6), noise, schedule, steps, generators=generators, **options)
    assert z0.mean().item() == pytest.approx(mean, abs=0.03)
    assert z0.std().item() == pytest.approx(0.6, rel=0.04)


def flow_error(sampler, steps):
    """How far a sampler ends from the exact probability flow, which for Gaussian data is a line."""
    schedule, mean, spread = S.from_betas(PLAIN, spacing="linspace"), 1.5, 0.6
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    alpha, sigma = schedule.coefficients(999, noise)
    expected = mean + spread * (noise - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()
    return (sampler(exact(schedule, mean, spread), noise, schedule, steps) - expected).abs().max().item()


@pytest.mark.parametrize(("sampler", "gain"), [(ddim, 1.7), (dpmpp_2m, 3.0)])
def test_twice_the_steps_lower_the_error_by_the_order_of_the_solver(sampler, gain):
    assert flow_error(sampler, 160) < flow_error(sampler, 80) / gain


def test_second_order_is_nearer_than_first():
    assert flow_error(dpmpp_2m, 160) < 0.4 * flow_error(ddim, 160)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_neighbours(name):
    schedule = S.from_betas(PLAIN)
    three, both = (draw(SAMPLERS[name], schedule, 7, count=count, dtype=torch.float32) for count in (3, 2))
    assert three.dtype == torch.float32
    torch.testing.assert_close(three[:2], both, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_progress_is_told_after_every_step(name):
    told = []
    draw(SAMPLERS[name], S.from_betas(PLAIN), 7, on_step=told.append)
    assert told == list(range(7))


@pytest.mark.parametrize(("sampler", "options"), [(ddpm, {}), (ddim, {"eta": 1.0})])
def test_a_stochastic_sampler_without_generators_is_refused(sampler, options):
    schedule = S.from_betas(PLAIN)
    with pytest.raises(AssertionError, match="generator"):
        sampler(exact(schedule, POINT), POINT, schedule, 3, **options)


def test_ddpm_equals_ddim_with_eta_one():
    schedule = S.from_betas(PLAIN)
    images = []
    for sampler, options in ((ddpm, {}), (ddim, {"eta": 1.0})):
        generators = streams(2)
        noise = normal(generators, SHAPE).double()
        guided = exact(schedule, 0.5, 0.6)
        images.append(sampler(guided, noise, schedule, 30, generators=generators, **options))
    torch.testing.assert_close(*images)


def test_ddim_without_final_alpha_one_stops_at_the_first_noise_level():
    schedule = replace(S.from_betas(PLAIN, steps_offset=1), final_alpha_one=False)
    seen = []
    noise = normal(streams(2), SHAPE).double()
    z = ddim(exact(schedule, POINT, seen=seen), noise, schedule, 7)
    abar = schedule.alphas_cumprod[0].item()
    torch.testing.assert_close(z, math.sqrt(abar) * POINT + math.sqrt(1 - abar) * seen[0])


def drawn_on(sampler, schedule, steps, **options):
    generators = streams(2)
    noise = normal(generators, SHAPE)
    return sampler(exact(schedule, 0.5, 0.6), noise, schedule, steps, generators=generators, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_at_the_first_step_is_plain_drawing_where_nothing_of_it_remains(name):
    schedule = S.from_betas(ZERO_SNR, "v_prediction", spacing="trailing")
    start = torch.randn(2, *SHAPE, generator=generator(0, "start"))
    plain = drawn_on(SAMPLERS[name], schedule, 7)
    assert torch.equal(drawn_on(SAMPLERS[name], schedule, 7, start=start), plain)
    assert not torch.equal(drawn_on(SAMPLERS[name], schedule, 7, start=start, first=1), plain)


@pytest.mark.parametrize(("sampler", "options"), [(ddpm, {}), (ddim, {}), (ddim, {"eta": 1.0})])
def test_noise_taken_up_at_a_later_step_goes_on_as_it_would_have(sampler, options):
    schedule, seen, told = S.from_betas(PLAIN, "v_prediction", spacing="trailing"), [], []

    def draws(noise, generators, **more):
        def guided(z, t):
            seen.append((z, [g.get_state() for g in generators]))
            return exact(schedule, 0.5, 0.6)(z, t)

        return sampler(guided, noise, schedule, 9, generators=generators, **options, **more)

    generators = streams(2)
    whole = draws(normal(generators, SHAPE), generators)
    z, states = seen[4]
    for g, state in zip(generators, states, strict=True):
        g.set_state(state)
    assert torch.equal(draws(z, generators, first=4, on_step=told.append), whole)
    assert told == list(range(5))


def test_a_start_outside_the_path_is_the_programmers_error():
    with pytest.raises(AssertionError):
        drawn_on(ddim, S.from_betas(PLAIN), 7, first=8)
