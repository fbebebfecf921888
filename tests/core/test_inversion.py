"""What personalize.core.inversion promises: the way back is exact for every network, scale and schedule."""

import pytest
import torch

from personalize.core import rng
from personalize.core import schedule as S
from personalize.core.inversion import ddim_inverse, ddpm_residuals
from personalize.core.samplers import ddim, ddpm

PLAIN = S.scaled_linear(1000)
ZERO_SNR = S.rescale_zero_terminal_snr(PLAIN)
SCHEDULES = [S.from_betas(PLAIN, p) for p in S.PREDICTIONS] + [S.from_betas(ZERO_SNR, p) for p in S.PREDICTIONS[1:]]
IDS = {"ids": lambda s: f"{s.prediction}-{s.alphas_cumprod[-1]:.0e}"}
STEPS = 12


def streams(count, purpose="inversion"):
    return [rng.generator(0, purpose, k) for k in range(count)]


def photo(count=2, dtype=torch.float64):
    return rng.normal(streams(count, "photo"), (4, 3, 3)).to(dtype)


def network(schedule, shift=0.5, scale=2.0):
    """Nothing that would denoise: the predicted z0 is far off, as under strong guidance."""
    return lambda z, t: schedule.from_z0(z, scale * torch.tanh(z) + shift, t)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("first", [0, 5, STEPS - 1])
@pytest.mark.parametrize("schedule", SCHEDULES, **IDS)
def test_an_image_comes_back_from_its_residuals(schedule, first, dtype, close):
    guided, z0 = network(schedule), photo(dtype=dtype)
    z, residuals = ddpm_residuals(guided, z0, schedule, STEPS, streams(2), first=first)
    assert residuals.shape == (STEPS - first, *z0.shape)
    back = ddpm(guided, z, schedule, STEPS, first=first, residuals=residuals)
    torch.testing.assert_close(back, z0, rtol=0, atol=close)


@pytest.mark.parametrize("first", [0, 8])
def test_other_words_give_another_image_the_less_the_later_it_begins(first):
    schedule, z0 = SCHEDULES[-1], photo()
    z, residuals = ddpm_residuals(network(schedule), z0, schedule, STEPS, streams(2), first=first)
    other = ddpm(network(schedule, shift=-0.5), z, schedule, STEPS, first=first, residuals=residuals)
    assert (other - z0).abs().mean() > 0.05
    if first:
        z, residuals = ddpm_residuals(network(schedule), z0, schedule, STEPS, streams(2))
        whole = ddpm(network(schedule, shift=-0.5), z, schedule, STEPS, residuals=residuals)
        assert (other - z0).abs().mean() < (whole - z0).abs().mean() + 1e-9


def test_each_level_is_noised_by_itself_with_the_spread_of_the_forward_process():
    """The z of neighbouring steps share nothing but the image, which is what keeps its layout in the residuals."""
    schedule, count, seen = SCHEDULES[2], 4000, []
    z0 = torch.full((count, 1, 1, 1), 0.3, dtype=torch.float64)

    def guided(z, t):
        seen.append((z.flatten(), t))
        return schedule.from_z0(z, z0, t)

    _, residuals = ddpm_residuals(guided, z0, schedule, 4, streams(count))
    noise = []
    for z, t in seen:
        alpha, sigma = schedule.level(t)
        noise.append((z - alpha * 0.3) / sigma)
        assert abs(noise[-1].mean()) < 0.06 and abs(noise[-1].std() - 1) < 0.04
    assert torch.corrcoef(torch.stack(noise)).sub(torch.eye(4)).abs().max() < 0.06
    # more than the sampler's own noise: of two draws, not of one (2304.06140, section 4)
    spread = schedule.posterior(z0, z0, seen[1][1], seen[2][1])[1] ** 0.5
    assert residuals[1].std() > 1.2 * spread


def test_residuals_of_another_path_are_the_programmers_error():
    schedule, z0 = SCHEDULES[0], photo()
    z, residuals = ddpm_residuals(network(schedule), z0, schedule, STEPS, streams(2), first=3)
    with pytest.raises(AssertionError, match="a residual belongs to one step"):
        ddpm(network(schedule), z, schedule, STEPS, residuals=residuals)
    with pytest.raises(AssertionError):
        ddpm_residuals(network(schedule), z0, schedule, STEPS, streams(2), first=STEPS)


def two_gaussians(schedule, means=(-1.0, 0.8), spread=0.5):
    """The best possible network of pixels that are of one of two Gaussians."""

    def guided(z, t):
        alpha, sigma = schedule.level(t)
        total = alpha**2 * spread**2 + sigma**2
        share = torch.stack([-((z - alpha * m) ** 2) / (2 * total) for m in means]).softmax(0)
        z0 = sum(share[k] * (m + alpha * spread**2 / total * (z - alpha * m)) for k, m in enumerate(means))
        return schedule.from_z0(z, z0, t)

    return guided


def round_trip(schedule, steps, iterations):
    z0 = 0.5 * rng.normal(streams(4, "data"), (4, 4, 4)).double() + 0.8
    guided = two_gaussians(schedule)
    back = ddim(guided, ddim_inverse(guided, z0, schedule, steps, iterations=iterations), schedule, steps)
    return (back - z0).square().mean().sqrt().item()


@pytest.mark.parametrize("schedule", SCHEDULES, **IDS)
def test_iterations_lead_back_to_the_image_at_zero_terminal_snr_too(schedule):
    once, twice, five, many = (round_trip(schedule, 25, count) for count in (1, 2, 5, 60))
    assert twice < once / 2 and five < once / 30 and many < 1e-9


def test_one_iteration_is_of_first_order():
    errors = [round_trip(SCHEDULES[-1], steps, 1) for steps in (25, 50, 100)]
    assert all(1.3 < a / b < 2.6 for a, b in zip(errors, errors[1:], strict=False)), errors
