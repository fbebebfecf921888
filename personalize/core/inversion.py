"""Inversion: from an image to the noise that a sampler makes it of. It knows no model.

B images; z0, z, out (B,C,h,w); t the timestep left and s the one reached, s = -1 for clean data.
To edit an image take `ddpm_residuals`; the noise of `ddim_inverse` is for going between images.
"""

import math

import torch
from torch import Generator, Tensor

from personalize.core import rng
from personalize.core.guidance import Guided
from personalize.core.schedule import Schedule


def ddpm_residuals(
    guided: Guided, z0: Tensor, schedule: Schedule, steps: int, generators: list[Generator], *, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Edit-friendly inversion (Huberman-Spiegelglas et al. 2304.06140) -> z at step `first`, residuals (steps - first,B,C,h,w).

    Every z_t of the path is drawn from q(z_t | z0) by itself, and what the posterior mean of `guided` lacks to the next one is
    its residual. `ddpm` with these in place of its noise returns z0, whatever `guided`, its scale and the schedule are: with
    the last residual too, where ddpm adds no noise. With another `guided` it draws an image of the same layout.
    One evaluation a step.
    """
    assert 0 <= first < steps and len(generators) == len(z0), (first, steps, len(generators), len(z0))
    times = schedule.timesteps(steps).tolist()[first:]
    path = [schedule.add_noise(z0, rng.normal(generators, z0.shape[1:]).to(z0), t) for t in times]
    residuals = []
    for t, s, z, z_next in zip(times, [*times, -1][1:], path, [*path, z0][1:], strict=True):
        mean, _ = schedule.posterior(schedule.to_z0(z, guided(z, t), t), z, t, s)
        residuals.append(z_next - mean)
    return path[0], torch.stack(residuals)


def ddim_inverse(guided: Guided, z0: Tensor, schedule: Schedule, steps: int, *, iterations: int = 8) -> Tensor:
    """The noise (B,C,h,w) from which `ddim` with eta 0 comes back to z0, nearly.

    A step from t to s turns z by d = phi_t - phi_s, phi = arccos(alpha): z_s = cos d z_t - sin d v(z_t, t) with v = alpha eps
    - sigma z0, finite at zero terminal SNR. Its inverse is an equation for z_t, solved by iteration from z_s (AIDI 2309.04907),
    one evaluation each. It contracts while tan d times the slope of v is below 1, not at large guidance scales.
    """
    assert iterations > 0, iterations
    z, phi = z0, math.acos(1.0 if schedule.final_alpha_one else schedule.level(0)[0])
    for t in reversed(schedule.timesteps(steps).tolist()):
        alpha, sigma = schedule.level(t)
        turn, begun = math.acos(alpha) - phi, z
        for _ in range(iterations):
            out = guided(z, t)
            v = alpha * schedule.to_eps(z, out, t) - sigma * schedule.to_z0(z, out, t)
            z = (begun + math.sin(turn) * v) / math.cos(turn)
        phi += turn
    return z
