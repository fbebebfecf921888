"""What personalize.core.steering promises, on data whose exact networks and classifiers are known."""

import math

import pytest
import torch

from personalize.core import schedule as S
from personalize.core.rng import generator, normal
from personalize.core.samplers import ddim, ddpm, dpmpp_2m
from personalize.core.steering import LEAST_ALPHA, STEERING, ascent, classified, edited, known, toward

PLAIN = S.scaled_linear(1000)
ZERO_SNR = S.rescale_zero_terminal_snr(PLAIN)
MEANS, SPREAD = torch.tensor([-1.0, 0.8], dtype=torch.float64), 0.5  # of two classes; every pixel of an image is of one


def randn(*shape, k=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(0, "steering", k), dtype=dtype)


def log_class(schedule, z, t):
    """log p(class | z_t), exact: (B,1,h,w) -> (B,2)."""
    alpha, sigma = schedule.level(t)
    distance = (z.unsqueeze(-1) - alpha * MEANS.to(z)).square().sum((1, 2, 3))
    return (-distance / (2 * (alpha**2 * SPREAD**2 + sigma**2))).log_softmax(-1)


def network(schedule, wanted=None):
    """The best possible network of both classes, or of one that it is told."""

    def guided(z, t):
        alpha, sigma = schedule.level(t)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        share = log_class(schedule, z, t).exp() if wanted is None else torch.eye(2).to(z)[wanted].expand(len(z), 2)
        z0 = sum(share[:, k, None, None, None] * (m + gain * (z - alpha * m)) for k, m in enumerate(MEANS.tolist()))
        return schedule.from_z0(z, z0, t)

    return guided


def classifier(schedule, wanted=1):
    return ascent(lambda z, t: log_class(schedule, z, t)[:, wanted])


SCHEDULES = [S.from_betas(PLAIN, p) for p in S.PREDICTIONS] + [S.from_betas(ZERO_SNR, p) for p in S.PREDICTIONS[1:]]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.prediction}-{s.alphas_cumprod[-1]:.0e}")
def test_an_exact_classifier_makes_the_conditional_network(schedule, dtype, close):
    for t in (0, 10, 100, 500, 800, 957):
        assert schedule.level(t)[0] > LEAST_ALPHA
        z = randn(8, 1, 2, 2, dtype=dtype)
        guided = classified(network(schedule), schedule, classifier(schedule), 1.0)
        told = network(schedule, wanted=1)
        given, expected = (schedule.to_z0(z, f(z, t), t) for f in (guided, told))
        torch.testing.assert_close(given, expected, rtol=0, atol=close)


def test_where_nothing_is_left_of_the_data_a_classifier_is_not_asked():
    schedule, z = S.from_betas(ZERO_SNR, "v_prediction"), randn(2, 1, 2, 2)
    for t in (999, 998, 990):
        assert schedule.level(t)[0] < LEAST_ALPHA
        assert torch.equal(classified(network(schedule), schedule, pytest.fail, 3.0)(z, t), network(schedule)(z, t))


def test_a_larger_scale_draws_the_class_more_often():
    schedule, noise = S.from_betas(ZERO_SNR, "v_prediction", spacing="trailing"), randn(2000, 1, 1, 1)
    shares = [
        (ddim(classified(network(schedule), schedule, classifier(schedule), s), noise, schedule, 10) > 0).double().mean().item()
        for s in (0.0, 0.3, 1.0, 3.0)
    ]
    assert shares == sorted(shares) and shares[0] < 0.6 and shares[2] > 0.9, shares


@pytest.mark.parametrize("name", STEERING)
def test_scale_zero_is_the_network_bit_for_bit_and_takes_no_gradient(name):
    schedule, z = S.from_betas(PLAIN), randn(2, 1, 2, 2)
    assert torch.equal(STEERING[name](network(schedule), schedule, pytest.fail, 0.0)(z, 500), network(schedule)(z, 500))


@pytest.mark.parametrize("name", STEERING)
def test_an_image_is_steered_the_same_in_any_batch(name):
    schedule, z = S.from_betas(PLAIN), randn(3, 1, 2, 2)
    steered = STEERING[name](network(schedule), schedule, classifier(schedule), 2.0)
    for i in range(3):
        torch.testing.assert_close(steered(z[i : i + 1], 500), steered(z, 500)[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STEERING)
def test_steering_is_finite_at_zero_terminal_snr_and_in_float32(name):
    schedule = S.from_betas(ZERO_SNR, "v_prediction")
    steered = STEERING[name](lambda z, t: torch.zeros_like(z).float(), schedule, lambda z, t: 1e3 * torch.ones_like(z), 5.0)
    for t in (0, 500, 990, 998, 999):
        out = steered(randn(2, 1, 2, 2).half(), t)
        assert out.isfinite().all() and out.dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.prediction}-{s.alphas_cumprod[-1]:.0e}")
def test_an_edit_that_changes_nothing_is_the_network_to_rounding(schedule):
    for t in (0, 500, 957.375, 999):
        z = randn(2, 1, 2, 2, dtype=torch.float32)
        out = network(schedule)(z, t)
        torch.testing.assert_close(edited(network(schedule), schedule, lambda z, t, z0: z0 + 0)(z, t), out, rtol=0, atol=2e-5)
        assert torch.equal(edited(network(schedule), schedule, lambda z, t, z0: z0)(z, t), out)


def test_toward_moves_z0_by_the_variance_of_the_noise_and_only_each_nth_time():
    schedule, z, seen = S.from_betas(PLAIN, "v_prediction"), randn(2, 1, 2, 2), []

    def gradient(z0, t):
        seen.append(z0)
        return torch.full_like(z0, 0.5)

    steered = toward(network(schedule), schedule, gradient, 2.0, every=2)
    before = schedule.to_z0(z, network(schedule)(z, 500), 500)
    moved = [schedule.to_z0(z, steered(z, 500), 500) - before for _ in range(4)]
    variance = 1 - schedule.alphas_cumprod[500].item()
    for k, move in enumerate(moved):
        torch.testing.assert_close(move, torch.full_like(z, 0 if k % 2 else 2.0 * variance * 0.5))
    assert len(seen) == 2 and torch.equal(seen[0], before)


def test_a_gradient_is_taken_where_images_are_drawn():
    """Sampling runs in inference mode, where `enable_grad` alone records nothing."""
    layer = torch.nn.Linear(4, 1)
    with torch.inference_mode():
        z = randn(2, 1, 2, 2, dtype=torch.float32) + 0
        assert z.is_inference()
        g = ascent(lambda z, t: layer(z.flatten(1)).square()[:, 0])(z, 5)
        expected = 2 * layer(z.flatten(1))[:, :, None, None] * layer.weight.reshape(1, 1, 2, 2)
    torch.testing.assert_close(g, expected)


RHO, FIRST = 0.9, 1.2  # two pixels that go together, the first known: the other is N(1.08, 0.436^2)


def repainted(sampler, steps=25, **options):
    """Mean and standard deviation of the second channel when the first is held at FIRST."""
    schedule = S.from_betas(ZERO_SNR, "v_prediction", spacing="trailing")
    cov = torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)

    def guided(z, t):
        alpha, sigma = schedule.level(t)
        best = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2, dtype=torch.float64))
        return schedule.from_z0(z, torch.einsum("ij,bjhw->bihw", best, z), t)

    generators = [generator(0, "repaint")]
    noise, mask = normal(generators, (2, 64, 64)).double(), torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    held = known(guided, schedule, torch.full_like(noise, FIRST), mask)
    z0 = sampler(held, noise, schedule, steps, generators=generators, **options)
    assert (z0[:, 0] - FIRST).abs().max() < 1e-9
    return z0[:, 1].mean().item(), z0[:, 1].std().item()


@pytest.mark.parametrize(
    ("sampler", "options", "mean", "spread"),
    [
        (ddim, {}, 0.55, 0.66),
        (dpmpp_2m, {}, 0.57, 0.68),
        (ddpm, {}, 0.70, 0.56),
        (ddpm, {"visits": 3}, 0.92, 0.45),
        (ddpm, {"visits": 10}, 0.97, 0.41),
    ],
)
def test_a_known_region_draws_the_rest_towards_it_as_far_as_was_measured(sampler, options, mean, spread):
    """All below the truth, 1.08 and 0.436: replacement is biased, and going back and forth mends most of it."""
    assert repainted(sampler, **options) == (pytest.approx(mean, abs=0.03), pytest.approx(spread, abs=0.03))


def test_a_known_region_keeps_one_eps_in_ddim():
    schedule, seen = S.from_betas(ZERO_SNR, "v_prediction", spacing="trailing"), []
    z0 = randn(1, 1, 2, 2, k=1)
    held = known(network(schedule), schedule, z0, torch.zeros(1, 1, 2, 2))

    def noted(z, t):
        seen.append(schedule.to_eps(z, held(z, t), t))
        return held(z, t)

    noise = randn(1, 1, 2, 2)
    torch.testing.assert_close(ddim(noted, noise, schedule, 7), z0)
    assert all(math.isclose((eps - noise).abs().max().item(), 0, abs_tol=1e-6) for eps in seen)
