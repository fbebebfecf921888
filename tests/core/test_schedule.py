"""What personalize.core.schedule promises."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from personalize.common.errors import UserError
from personalize.core import schedule as S
from personalize.core.rng import generator


def randn(*shape, k=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(0, "test", k), dtype=dtype)


@pytest.mark.parametrize("name", S.BETAS)
def test_betas_are_probabilities_and_abar_falls(name):
    betas = S.BETAS[name](100)
    assert betas.shape == (100,) and betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    assert (S.from_betas(betas).alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid")],
)
def test_betas_are_those_of_diffusers(name, theirs):
    from diffusers import DDPMScheduler

    ends = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    expected = DDPMScheduler(beta_schedule=theirs, **ends).betas.double()
    torch.testing.assert_close(S.BETAS[name](1000), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "abar"), [("sigmoid", [1.00, 0.90, 0.30, 0.006, 0]), ("sigmoid-abar", [1.00, 0.85, 0.50, 0.15, 0])]
)
def test_the_two_schedules_called_sigmoid_are_not_one(name, abar):
    table = S.from_betas(S.BETAS[name](1000)).alphas_cumprod[[0, 249, 499, 749, 999]]
    torch.testing.assert_close(table, torch.tensor(abar, dtype=torch.float64), rtol=0, atol=6e-3)


def test_sigmoid_abar_is_the_formula_of_its_paper():
    """gamma(t) = (sigmoid(e / tau) - sigmoid((t (e - s) + s) / tau)) / (sigmoid(e / tau) - sigmoid(s / tau)), 2212.11972."""

    def gamma(t, s=-3.0, e=3.0, tau=1.0):
        ends = [1 / (1 + math.exp(-x / tau)) for x in (s, t * (e - s) + s, e)]
        return (ends[2] - ends[1]) / (ends[2] - ends[0])

    abar = S.from_betas(S.BETAS["sigmoid-abar"](1000)).alphas_cumprod
    for k in (0, 1, 400, 900, 998):
        assert abar[k].item() == pytest.approx(gamma((k + 1) / 1000), rel=1e-9)
    assert "sigmoid_abar" in S.sigmoid.__doc__ and "`sigmoid`" in S.sigmoid_abar.__doc__


@pytest.mark.parametrize("t", [0, 1, 300, 700, 998, 999])
def test_one_error_of_z0_is_snr_times_as_much_of_eps_and_one_more_of_v(t):
    z_t, z0, error = randn(1, 4), randn(1, 4, k=1), randn(1, 4, k=2)
    snr = S.from_betas(S.scaled_linear(1000)).snr(t).double()
    for prediction, factor in (("epsilon", snr), ("sample", torch.ones_like(snr)), ("v_prediction", snr + 1)):
        schedule = S.from_betas(S.scaled_linear(1000), prediction)
        missed = schedule.from_z0(z_t, z0 + error, t) - schedule.from_z0(z_t, z0, t)
        torch.testing.assert_close(missed.square().sum(), factor * error.square().sum(), rtol=1e-6, atol=0)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start():
    betas = S.scaled_linear(1000)
    before, after = (S.from_betas(b).alphas_cumprod for b in (betas, S.rescale_zero_terminal_snr(betas)))
    assert after[-1] == 0
    assert (after[:-1] > 0).all()
    torch.testing.assert_close(after[0], before[0])


@pytest.mark.parametrize("prediction", S.PREDICTIONS)
def test_the_target_gives_back_z0_and_eps(prediction):
    schedule = S.from_betas(S.scaled_linear(1000), prediction)
    z0, eps, t = randn(4, 3, 2, 2), randn(4, 3, 2, 2, k=1), torch.tensor([0, 1, 500, 999])
    z_t, out = schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t)
    torch.testing.assert_close(schedule.to_z0(z_t, out, t), z0)
    torch.testing.assert_close(schedule.to_eps(z_t, out, t), eps)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_the_round_trip_holds_at_zero_terminal_snr(prediction):
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), prediction)
    z0, eps = randn(2, 3, 2, 2), randn(2, 3, 2, 2, k=1)
    z_t, out = schedule.add_noise(z0, eps, 999), schedule.target(z0, eps, 999)
    assert torch.equal(z_t, eps)
    torch.testing.assert_close(schedule.to_z0(z_t, out, 999), z0)
    torch.testing.assert_close(schedule.to_eps(z_t, out, 999), eps)


@pytest.mark.parametrize("prediction", S.PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("t", [0, 500, 957.375, 999])
def test_an_output_made_from_z0_says_that_z0(prediction, zero_snr, t):
    if zero_snr and prediction == "epsilon":
        return  # eps says nothing of z0 there
    betas = S.scaled_linear(1000)
    schedule = S.from_betas(S.rescale_zero_terminal_snr(betas) if zero_snr else betas, prediction)
    z_t, z0 = randn(2, 3, 2, 2), randn(2, 3, 2, 2, k=1)
    out = schedule.from_z0(z_t, z0, t)
    torch.testing.assert_close(schedule.to_z0(z_t, out, t), z0, rtol=0, atol=1e-12)
    noise = schedule.to_eps(z_t, out, t)
    torch.testing.assert_close(schedule.target(z0, noise, t), out, rtol=0, atol=1e-12)
    assert schedule.from_z0(z_t.half(), z0.float(), t).dtype == torch.float32
    assert torch.equal(schedule.from_z0(z_t, z0, float(t)), out)


def test_between_two_timesteps_the_noise_level_is_that_of_diffusers_euler():
    from diffusers import EulerDiscreteScheduler

    betas = S.rescale_zero_terminal_snr(S.scaled_linear(1000))
    abar = S.from_betas(betas).alphas_cumprod.clamp(min=S.TINY_ABAR)
    euler = EulerDiscreteScheduler(
        trained_betas=(1 - abar / torch.cat([torch.ones(1), abar[:-1]])).tolist(), timestep_spacing="linspace"
    )
    for steps in (7, 1500):
        euler.set_timesteps(steps)
        levels = [S.from_betas(betas).level(t) for t in euler.timesteps.tolist()[1:]]
        ratio = torch.tensor([sigma / alpha for alpha, sigma in levels])
        torch.testing.assert_close(ratio, euler.sigmas[1:-1], rtol=1e-3, atol=0)
        assert all(math.isclose(alpha**2 + sigma**2, 1) for alpha, sigma in levels)


def test_one_timestep_for_all_is_that_timestep_for_each():
    schedule = S.from_betas(S.linear(100))
    z0, eps = randn(3, 2, 2, 2), randn(3, 2, 2, 2, k=1)
    each = schedule.add_noise(z0, eps, torch.full((3,), 40))
    assert torch.equal(schedule.add_noise(z0, eps, 40), each)
    assert torch.equal(schedule.add_noise(z0, eps, torch.tensor(40)), each)


@pytest.mark.parametrize("prediction", S.PREDICTIONS)
def test_half_precision_outputs_are_read_in_float32(prediction):
    schedule = S.from_betas(S.linear(100), prediction)
    z = randn(2, 2, 2, 2).bfloat16()
    results = (schedule.to_z0(z, z, 5), schedule.to_eps(z, z, 5), schedule.target(z, z, 5))
    assert {result.dtype for result in results} == {torch.float32}


def test_snr_is_signal_power_over_noise_power():
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.linear(100)))
    t = torch.tensor([0, 50, 99])
    alpha, sigma = schedule.coefficients(t, randn(3, 1))
    torch.testing.assert_close(schedule.snr(t), (alpha / sigma).square().flatten().float())
    assert schedule.snr(99) == 0


@pytest.mark.parametrize(("t", "s"), [(1, 0), (40, 39), (90, 30), (99, 0)])
def test_the_posterior_is_bayes_rule_done_numerically(t, s):
    schedule = S.from_betas(S.linear(100, end=0.1))
    abar, z0, z_t = schedule.alphas_cumprod, 0.7, -0.4
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    forward = abar[t] / abar[s]
    log_prior = -(grid - abar[s].sqrt() * z0).square() / (2 * (1 - abar[s]))
    log_likelihood = -(z_t - forward.sqrt() * grid).square() / (2 * (1 - forward))
    weight = (log_prior + log_likelihood).softmax(0)
    expected = (weight * grid).sum()
    mean, variance = schedule.posterior(*torch.tensor([[z0], [z_t]], dtype=torch.float64), t, s)
    assert mean.item() == pytest.approx(expected.item(), abs=1e-9)
    assert variance == pytest.approx((weight * (grid - expected).square()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("t", [0, 50, 99])
def test_the_posterior_of_clean_data_is_z0_itself(t):
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.linear(100)), "v_prediction")
    z0 = randn(1, 2, 2, 2)
    mean, variance = schedule.posterior(z0, randn(1, 2, 2, 2, k=1), t, -1)
    torch.testing.assert_close(mean, z0)
    assert variance == 0


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 333, 999, 1000])
@pytest.mark.parametrize("spacing", S.SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_fall_and_are_as_many_as_asked_and_in_range(spacing, steps, offset):
    schedule = S.from_betas(S.linear(1000), spacing=spacing, steps_offset=offset)
    times = schedule.timesteps(steps)
    assert times.shape == (steps,) and times.dtype == torch.int64
    assert (times.diff() < 0).all()
    assert times[-1] >= 0 and times[0] <= 999
    if spacing != "leading":
        assert times[0] == 999


@pytest.mark.parametrize("steps", [2, 7, 20, 30, 50, 1000])
@pytest.mark.parametrize("spacing", S.SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert np.array_equal(S.from_betas(S.linear(1000)).timesteps(steps, spacing), theirs.timesteps)


@pytest.mark.parametrize("steps", [0, 101])
def test_more_steps_than_timesteps_is_the_users_error(steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps"):
        S.from_betas(S.linear(100)).timesteps(steps)


def test_a_schedule_with_another_spacing_is_one_replace_away():
    schedule = dataclasses.replace(S.from_betas(S.linear(100)), spacing="trailing")
    assert schedule.timesteps(3).tolist() == [99, 66, 32]
    assert math.isclose(schedule.alphas_cumprod[0].item(), 1 - 1e-4)


def test_tables_on_a_device_are_float32_and_those_of_the_host():
    """An MPS device has no float64; what it gets was computed in it on the host, so no bit depends on the device."""
    host, there = S.from_betas(S.scaled_linear(100)), S.from_betas(S.scaled_linear(100)).to("meta")
    assert there.alphas_cumprod.device.type == "cpu" and there.alphas_cumprod.dtype == torch.float64
    assert {(table.device.type, table.dtype) for table in there.tables} == {("meta", torch.float32)}
    t, like = torch.arange(100), torch.zeros(100, 1)
    alpha, sigma = host.coefficients(t, like)
    assert torch.equal(alpha[:, 0], host.alphas_cumprod.sqrt().float())
    assert torch.equal(sigma[:, 0], (1 - host.alphas_cumprod).sqrt().float())
    assert torch.equal(host.snr(t), (host.alphas_cumprod / (1 - host.alphas_cumprod)).float())
    assert torch.equal(alpha[7].reshape(1, 1), host.coefficients(7, like)[0])


def test_a_step_copies_no_table():
    """A schedule that is on its device is read by indexing alone."""
    schedule = S.from_betas(S.scaled_linear(100)).to("meta")
    z, t = torch.zeros(4, 1, 2, 2, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    moved = []
    original = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:

        def to(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            if out.device != self.device:
                moved.append(self.shape)
            return out

        patch.setattr(torch.Tensor, "to", to)
        (
            schedule.add_noise(z, z, t),
            schedule.target(z, z, t),
            schedule.snr(t),
            schedule.to_z0(z, z, 3),
            schedule.to_eps(z, z, 3),
        )
    assert not moved
