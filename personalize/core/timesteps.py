"""Which timesteps a step trains at: a row each of TIMESTEPS.

(B, T, generator) -> t (B,) int64 in 0..T-1; u (B,) is uniform in [0,1). What a paper says of a flow's time is read as t / T.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

MODE_SCALE = 1.29  # rf/mode(1.29) of Esser et al. 2403.03206, and diffusers' default


def uniform(B: int, T: int, generator: Generator) -> Tensor:
    """Each for itself, as DDPM (Ho et al. 2006.11239, algorithm 1)."""
    return torch.randint(0, T, (B,), generator=generator)


def stratified(B: int, T: int, generator: Generator) -> Tensor:
    """One in each Bth part of 0..T-1 (after Kingma et al. 2107.00630, I.1), in random order: that of each image is uniform."""
    u = torch.rand(B, generator=generator)
    return _of_share((torch.randperm(B, generator=generator) + u) / B, T)


def low(B: int, T: int, generator: Generator) -> Tensor:
    """Density 2 (1 - x) of x = t / T: little noise more often."""
    return _of_share(1 - torch.rand(B, generator=generator).sqrt(), T)


def high(B: int, T: int, generator: Generator) -> Tensor:
    """Density 2 x of x = t / T: much noise more often."""
    return _of_share(torch.rand(B, generator=generator).sqrt(), T)


def mode(B: int, T: int, generator: Generator) -> Tensor:
    """Heavy tails and most in the middle (Esser et al. 2403.03206, eq. 20)."""
    u = torch.rand(B, generator=generator)
    return _of_share(1 - u - MODE_SCALE * ((math.pi / 2 * u).cos() ** 2 - 1 + u), T)


def logit_normal(B: int, T: int, generator: Generator) -> Tensor:
    """The sigmoid of a standard normal number (Esser et al. 2403.03206, eq. 19): few at either end."""
    return _of_share(torch.randn(B, generator=generator).sigmoid(), T)


TIMESTEPS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "uniform": uniform, "stratified": stratified, "low": low, "high": high, "mode": mode, "logit-normal": logit_normal,
}  # fmt: skip


def _of_share(x: Tensor, T: int) -> Tensor:
    """x (B,) in [0,1] -> the timestep that it falls in; what rounding puts at 1 is in the last."""
    return (T * x).long().clamp(0, T - 1)
