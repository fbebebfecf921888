"""What personalize.core.elbo promises, on Gaussian data N(0, 0.6^2), whose likelihood and best network are known."""

import math

import pytest
import torch

from personalize.core import elbo
from personalize.core import schedule as S

SPREAD = 0.6


def gap(schedule, *, variance):
    """Bound minus -log p over all timesteps, nats of a dimension, with the best network. The errors are means, not draws."""
    abar = schedule.alphas_cumprod.tolist()
    total = elbo.prior_term(schedule, torch.full((1, 1), SPREAD, dtype=torch.float64)).item()
    for t in range(schedule.T):
        mean_square = SPREAD**2 * (1 - abar[t]) / (abar[t] * SPREAD**2 + 1 - abar[t])
        error = torch.full((1, 1), math.sqrt(mean_square), dtype=torch.float64)
        beta = 1 - abar[t] / (abar[t - 1] if t else 1.0)
        if t == 0:  # the step to clean data has no posterior to differ from: its best variance is the error itself
            total += elbo.data_term(error, mean_square if variance == "analytic" else beta).item()
            continue
        sigmas = {"small": None, "large": beta, "analytic": elbo.analytic_variance(schedule, mean_square, t, t - 1)}
        total += elbo.step_term(schedule, error, t, t - 1, variance=sigmas[variance]).item()
    return total - 0.5 * (1 + math.log(2 * math.pi * SPREAD**2))


GAPS = {"scaled_linear": 0.289, "cosine": 0.404, "linear": 0.459}


@pytest.mark.parametrize("name", GAPS)
def test_the_small_variance_is_loose_for_spread_out_data_and_the_analytic_one_is_exact(name):
    schedule = S.from_betas(S.BETAS[name](1000))
    small, large, analytic = (gap(schedule, variance=v) for v in ("small", "large", "analytic"))
    assert small == pytest.approx(GAPS[name], abs=2e-3)
    assert 1e-4 < large < 2e-3
    assert abs(analytic) < 1e-5


@pytest.mark.parametrize(("t", "s"), [(1, 0), (500, 499), (999, 40)])
def test_a_step_costs_half_the_snr_it_gains_times_the_squared_error(t, s):
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    error = torch.tensor([[0.3, -0.2], [0.0, 1.0]], dtype=torch.float64)
    expected = 0.5 * (snr[s] - snr[t]) * error.square().sum(1)
    torch.testing.assert_close(elbo.step_term(schedule, error, t, s), expected, rtol=1e-10, atol=0)


def test_a_step_is_the_divergence_of_two_normals():
    from torch.distributions import Normal, kl_divergence

    schedule, z0, error = S.from_betas(S.cosine(1000)), torch.tensor([[0.7]]).double(), torch.tensor([[0.2]]).double()
    z_t = torch.tensor([[-0.4]], dtype=torch.float64)
    (mean, posterior), (wrong, _) = (schedule.posterior(x, z_t, 300, 200) for x in (z0, z0 + error))
    for variance in (posterior, 2 * posterior):
        expected = kl_divergence(Normal(mean, math.sqrt(posterior)), Normal(wrong, math.sqrt(variance))).sum(1)
        torch.testing.assert_close(elbo.step_term(schedule, error, 300, 200, variance=variance), expected)


def test_for_one_point_of_data_the_small_variance_is_the_exact_one():
    schedule, none = S.from_betas(S.linear(1000)), torch.zeros(1, 1, dtype=torch.float64)
    beta = 1 - (schedule.alphas_cumprod[1] / schedule.alphas_cumprod[0]).item()
    assert elbo.step_term(schedule, none, 1, 0).item() == 0
    assert elbo.analytic_variance(schedule, 0.0, 1, 0) == schedule.posterior(none, none, 1, 0)[1]
    assert elbo.step_term(schedule, none, 1, 0, variance=beta).item() > 0.01


def test_what_the_prior_costs_is_what_the_last_timestep_leaves():
    data = torch.ones(1, 1, dtype=torch.float64)  # of unit variance, in the mean
    bits = {name: elbo.prior_term(S.from_betas(S.BETAS[name](1000)), data).item() / math.log(2) for name in S.BETAS}
    assert bits["scaled_linear"] == pytest.approx(3.4e-3, rel=0.05)
    assert bits["linear"] == pytest.approx(2.9e-5, rel=0.05)
    assert bits["cosine"] < 1e-8
    assert elbo.prior_term(S.from_betas(S.rescale_zero_terminal_snr(S.linear(1000)), "v_prediction"), data).item() == 0


VARIANCES, NOISE = (4.0, 1.0, 0.25, 0.04), 0.5  # of the data's directions, and of the decoder


def linear_vae(*, steps=200):
    """Trained on its bound, whose means over data and posterior are exact here -> encoder, posterior std, loss in nats."""
    g = torch.Generator().manual_seed(0)
    axes, spread = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0], torch.tensor(VARIANCES).double()
    root = axes * spread.sqrt()  # columns: the data are as if these were all the images
    start = 0.3 * torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    encoder, decoder, log_std = (x.clone().requires_grad_() for x in (*start, torch.zeros(4, dtype=torch.float64)))
    optimizer = torch.optim.Adam([encoder, decoder, log_std], lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        std, mean = log_std.exp(), (encoder @ root).T
        errors = torch.cat([root.T - mean @ decoder.T, (decoder * std).T])  # of the mean, and of what the posterior adds
        kl = elbo.latent_term(mean.square().sum(0).sqrt(), std).sum()
        loss = 2 * math.log(2 * math.pi * NOISE) + errors.square().sum() / (2 * NOISE) + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.detach() @ root, log_std.detach().exp(), loss.item()


def test_a_linear_vae_uses_a_direction_where_its_variance_exceeds_the_decoder_s_and_is_pca_there():
    mean, std, loss = linear_vae()
    likelihood = 0.5 * sum(
        math.log(2 * math.pi * max(v, NOISE)) + v / max(v, NOISE) for v in VARIANCES
    )  # of probabilistic PCA, whose covariance has nothing below the noise
    assert loss == pytest.approx(likelihood, rel=1e-4)
    images = torch.cat([2 * mean.T, -2 * mean.T])  # eight, whose covariance is the data's but for 8 / 7
    active, used = elbo.active_units(images), elbo.used_directions(std[None])
    assert active.sum() == 2 and torch.equal(active, used)
    kl = elbo.latent_term(mean.square().sum(1).sqrt(), std)
    assert kl[active].sum() == pytest.approx(0.5 * sum(math.log(v / NOISE) for v in VARIANCES if v > NOISE), rel=1e-3)
    assert kl[~active].max() < 1e-3


def test_more_noise_in_the_decoder_would_leave_fewer_latents_to_use():
    std = torch.tensor([[0.1, 0.5, 1.0]])
    assert [elbo.used_directions(std, noise).tolist() for noise in (1.0, 4.0, 200.0)] == [
        [True, True, False], [True, False, False], [False] * 3,
    ]  # fmt: skip


def test_what_a_posterior_costs_is_its_divergence_from_the_prior():
    from torch.distributions import Normal, kl_divergence

    mean, std = torch.tensor([[0.0, 1.0, -2.0]]).double(), torch.tensor([[1.0, 0.1, 3.0]]).double()
    torch.testing.assert_close(elbo.latent_term(mean, std), kl_divergence(Normal(mean, std), Normal(0.0, 1.0)))
