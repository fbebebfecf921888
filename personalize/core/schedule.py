"""Noise schedules, the forward process, and what a network's raw output says about z0 and eps.

B images, T training timesteps; t in 0..T-1 is a (B,) integer tensor, or one number for the whole batch, which may lie
between two timesteps where `coefficients` are all that is asked for.
abar = alphas_cumprod[t], alpha = sqrt(abar), sigma = sqrt(1 - abar): z_t = alpha z0 + sigma eps (Ho et al. 2006.11239,
eq. 4). Any shape (B, ...) will do for z; latents are (B,C,h,w). Results are float32, or float64 when given float64.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from personalize.common.errors import UserError

Prediction = Literal["epsilon", "sample", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
TINY_ABAR = 2**-24  # what diffusers puts in place of zero terminal SNR, where sigma / alpha is infinite


def linear(T: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Betas (T,) float64, evenly spaced (Ho et al. 2006.11239, section 4)."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear(T: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Betas (T,) float64 whose square roots are evenly spaced (Stable Diffusion; Rombach et al. 2112.10752)."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64).square()


def cosine(T: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas (T,) float64 of a squared cosine abar (Nichol & Dhariwal 2102.09672, eq. 17), capped at `max_beta`."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    abar = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)


def sigmoid(T: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Betas (T,) float64 rising as a sigmoid over [-6, 6] (GeoDiff 2203.02923; diffusers' "sigmoid"); see `sigmoid_abar`."""
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (end - start) + start


def sigmoid_abar(T: int, start: float = -3.0, end: float = 3.0, max_beta: float = 0.999) -> Tensor:
    """Betas (T,) float64 of an abar that falls as a sigmoid (Jabri et al. 2212.11972), almost the cosine's; not `sigmoid`."""
    value = torch.linspace(start, end, T + 1, dtype=torch.float64).sigmoid()
    abar = (value[-1] - value) / (value[-1] - value[0])
    return (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)


BETAS = {
    "linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid, "sigmoid-abar": sigmoid_abar,
}  # fmt: skip


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) -> betas (T,) with abar[T-1] = 0 exactly and abar[0] kept (Lin et al. 2305.08891, algorithm 1)."""
    alpha = (1 - betas.double()).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    abar = alpha.square()
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


@dataclass(frozen=True, eq=False)
class Schedule:
    """A forward process and how the network's output is to be read. Made by `from_betas`, or from any abar table.

    An "epsilon" schedule must not have zero terminal SNR: there z_t is pure noise and eps says nothing of z0.
    """

    alphas_cumprod: Tensor  # (T,) float64, falling, on the host: an MPS device has no float64
    prediction: Prediction = "epsilon"  # what the network was trained to output
    spacing: Spacing = "leading"  # which timesteps a sampler visits
    steps_offset: int = 0  # added to "leading" timesteps; Stable Diffusion 1 and 2 have 1
    final_alpha_one: bool = True  # DDIM ends at abar 1, or at abar[0] (diffusers' set_alpha_to_one)
    device: torch.device = torch.device("cpu")  # of the float32 tables, which every step reads
    tables: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)  # alpha, sigma, SNR (T,) float32

    def __post_init__(self) -> None:
        assert self.prediction in PREDICTIONS, self.prediction
        assert self.spacing in SPACINGS, self.spacing
        assert self.alphas_cumprod.ndim == 1 and self.alphas_cumprod.dtype == torch.float64
        tables = *self._roots(), self.alphas_cumprod / (1 - self.alphas_cumprod)
        object.__setattr__(self, "tables", tuple(table.float().to(self.device) for table in tables))

    def _roots(self) -> tuple[Tensor, Tensor]:
        return self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()

    @property
    def T(self) -> int:
        """Number of training timesteps."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on `device`, so that no step copies them from the host."""
        return replace(self, device=torch.device(device))

    def level(self, t: float) -> tuple[float, float]:
        """One timestep -> alpha, sigma as numbers.

        Between two timesteps sigma / alpha is a straight line, as for diffusers' Euler and Heun samplers, which go there.
        """
        low = int(t)
        abar = self.alphas_cumprod[low].item()
        if t != low:
            ends = (1 / self.alphas_cumprod[low : low + 2].clamp(min=TINY_ABAR) - 1).sqrt()
            abar = 1 / (1 + torch.lerp(*ends, t - low).item() ** 2)
        return math.sqrt(abar), math.sqrt(1 - abar)

    def coefficients(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """t, like (B, ...) -> alpha, sigma, each (B, 1, ...) (or all ones for one t), on the device of `like`."""
        dtype = _wide(like)
        if isinstance(t, float):
            if not t.is_integer():
                alpha, sigma = (torch.full((1,) * like.ndim, x, dtype=dtype, device=like.device) for x in self.level(t))
                return alpha, sigma
            t = int(t)
        tables = self.tables[:2] if dtype == torch.float32 else self._roots()
        t = t if isinstance(t, int) else torch.as_tensor(t, device=like.device)
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (table.to(dtype).to(like.device)[t].reshape(shape) for table in tables)
        return alpha, sigma

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """A draw of q(z_t | z0) from eps ~ N(0, 1): (B, ...), (B, ...), t -> z_t (B, ...)."""
        alpha, sigma = self.coefficients(t, z0)
        return alpha * z0 + sigma * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """What the network should output (B, ...): eps, z0, or v = alpha eps - sigma z0 (2202.00512, appendix D)."""
        if self.prediction == "epsilon":
            return eps.to(_wide(eps))
        if self.prediction == "sample":
            return z0.to(_wide(z0))
        alpha, sigma = self.coefficients(t, z0)
        return alpha * eps - sigma * z0

    def to_z0(self, z_t: Tensor, out: Tensor, t: Tensor | float) -> Tensor:
        """z_t and raw output (B, ...) -> z0 (B, ...). From eps at zero SNR it is undefined: the result is not finite."""
        alpha, sigma = self.coefficients(t, z_t)
        if self.prediction == "sample":
            return out.to(alpha.dtype)
        if self.prediction == "epsilon":
            return (z_t - sigma * out) / alpha
        return alpha * z_t - sigma * out

    def from_z0(self, z_t: Tensor, z0: Tensor, t: Tensor | float) -> Tensor:
        """z_t and z0 (B, ...) -> the raw output that says so, the inverse of `to_z0`; finite at zero SNR."""
        alpha, sigma = self.coefficients(t, z_t)
        if self.prediction == "sample":
            return z0.to(alpha.dtype)
        if self.prediction == "epsilon":
            return (z_t - alpha * z0) / sigma
        return (alpha * z_t - z0) / sigma

    def to_eps(self, z_t: Tensor, out: Tensor, t: Tensor | float) -> Tensor:
        """z_t and raw output (B, ...) -> eps (B, ...); finite at zero SNR for every prediction."""
        alpha, sigma = self.coefficients(t, z_t)
        if self.prediction == "epsilon":
            return out.to(alpha.dtype)
        if self.prediction == "sample":
            return (z_t - alpha * out) / sigma
        return alpha * out + sigma * z_t

    def snr(self, t: Tensor | int) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar), float32, of the shape and on the device of t."""
        table = self.tables[2]
        return table[t] if isinstance(t, int) else table.to(t.device)[t]

    def posterior(self, z0: Tensor, z_t: Tensor, t: int, s: int | None = None) -> tuple[Tensor, float]:
        """q(z_s | z_t, z0) for s < t (2006.11239, eq. 6-7, for any stride) -> mean (B, ...), variance.

        s defaults to t - 1, and s = -1 is clean data: mean z0, variance 0. Finite at zero terminal SNR.
        """
        s = t - 1 if s is None else s
        assert -1 <= s < t < self.T, (s, t)
        abar_t = self.alphas_cumprod[t].item()
        abar_s = self.alphas_cumprod[s].item() if s >= 0 else 1.0
        ratio = abar_t / abar_s
        to_clean = math.sqrt(abar_s) * (1 - ratio) / (1 - abar_t)
        to_noisy = math.sqrt(ratio) * (1 - abar_s) / (1 - abar_t)
        return to_clean * z0 + to_noisy * z_t, (1 - abar_s) / (1 - abar_t) * (1 - ratio)

    def timesteps(self, steps: int, spacing: Spacing | None = None) -> Tensor:
        """The (steps,) timesteps a sampler visits, int64 on the CPU, falling (2305.08891, table 2).

        A step goes to the *next* of the list, the last one to clean data; never to t - T // steps, which is another
        number wherever steps do not divide T. "linspace" with one step starts at T - 1, where the noise is. UserError
        for more steps than T.
        """
        spacing, T = spacing or self.spacing, self.T
        assert spacing in SPACINGS, spacing
        if not 1 <= steps <= T:
            raise UserError(f"{steps} sampling steps: this base has timesteps for 1 to {T}. Ask for that many.")
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            return (T - i * (T / steps)).round().long() - 1
        if spacing == "linspace":
            return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
        stride = T // steps
        offset = min(self.steps_offset, T - 1 - (steps - 1) * stride)  # else t = T for steps = T
        return i.long().flip(0) * stride + offset


def from_betas(
    betas: Tensor,
    prediction: Prediction = "epsilon",
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    final_alpha_one: bool = True,
) -> Schedule:
    """Betas (T,) -> Schedule with abar = prod(1 - beta), computed in float64."""
    abar = (1 - betas.double()).cumprod(0)
    return Schedule(abar, prediction, spacing, steps_offset=steps_offset, final_alpha_one=final_alpha_one)


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
