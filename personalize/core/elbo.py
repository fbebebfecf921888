"""The variational bound of a diffusion model, term by term (Ho et al. 2006.11239, eq. 5; Sohl-Dickstein et al. 1503.03585).

-log p(z0) <= L_T + the sum of L_t over a path of timesteps + L_0, in nats. B images of D dimensions; z0, z_t (B, ...); each
term is (B,), summed over the dimensions. s < t are timesteps of a path, and -1 is clean data, of which L_0 speaks.
Below them what a VAE's posterior costs, and which of its latents are used.
"""

import math

import torch
from torch import Tensor

from personalize.core.schedule import Schedule


def prior_term(schedule: Schedule, z0: Tensor) -> Tensor:
    """L_T: KL from q(z_T | z0) to N(0, 1), exactly 0 at zero terminal SNR."""
    abar = schedule.alphas_cumprod[-1].item()
    return _summed(0.5 * (abar * z0.square() - abar - math.log1p(-abar)))


def step_term(
    schedule: Schedule, error: Tensor, t: int, s: int, *, variance: float | None = None
) -> Tensor:  # fmt: skip
    """L_t: KL from q(z_s | z_t, z0) to N(mean of the posterior of the predicted z0, variance); error (B, ...) of that z0.

    variance: that of the posterior where not given; L_t is then half (snr(s) - snr(t)) times the squared error.
    """
    assert s >= 0, "the step to clean data is `data_term`"
    mean_error, posterior = schedule.posterior(error, torch.zeros_like(error), t, s)
    variance = posterior if variance is None else variance
    ratio = posterior / variance
    return _summed(0.5 * (mean_error.square() / variance + ratio - 1 - math.log(ratio)))


def data_term(error: Tensor, variance: float) -> Tensor:
    """L_0 of latents: -log N(z0; mean, variance), error (B, ...) of the mean. For continuous data, not for 256 levels."""
    return _summed(0.5 * (error.square() / variance + math.log(2 * math.pi * variance)))


def analytic_variance(schedule: Schedule, mean_square: float, t: int, s: int) -> float:
    """The best single variance of a step (Analytic-DPM, Bao et al. 2201.06503) for the mean square error of z0 at t.

    It is the posterior's and what the mean of the posterior misses: the tightest bound, exact for Gaussian data.
    """
    ends = torch.ones(1, dtype=torch.float64)
    share, posterior = schedule.posterior(ends, torch.zeros_like(ends), t, s)
    return posterior + share.item() ** 2 * mean_square


def latent_term(mean: Tensor, std: Tensor) -> Tensor:
    """KL from N(mean, std squared) to N(0, 1), nats of each latent, of their shape (Kingma & Welling 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + std.square() - 1) - std.log()


def active_units(mean: Tensor, least: float = 0.01) -> Tensor:
    """Posterior means (N, ...) of N images -> (...) bool: those that differ from image to image (Burda et al. 1509.00519)."""
    return mean.var(0) > least


def used_directions(std: Tensor, noise: float = 1.0, least: float = 0.01) -> Tensor:
    """Posterior deviations (N, ...) -> (...) bool: the latents that a linear VAE would use (Lucas et al. 1911.02469).

    Such a VAE is probabilistic PCA: a direction of variance L is used where it exceeds the decoder's variance V, and its
    posterior then has the variance V / L, where the others keep the prior's 1. noise: as many times the V that it was
    trained with. In a linear VAE `active_units` are the same ones.
    """
    return std.square().mean(0) * noise < 1 - least


def _summed(nats: Tensor) -> Tensor:
    return nats.flatten(1).sum(1)
