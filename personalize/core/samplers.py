"""Samplers: guided prediction + noise -> z0. They know no model.

B images; noise, z, out (B,C,h,w); t the timestep left and s the one reached, s = -1 for clean data. abar_t and abar_s
are float64 numbers, alpha = sqrt(abar), sigma = sqrt(1 - abar).

Every row of SAMPLERS (and of `generation.diffusers_samplers.DIFFUSERS`) is called as

    sampler(guided, noise, schedule, steps, *, generators=None, on_step=None, first=0, start=None, <its own options>) -> z0

guided:     (z, t) -> raw output; t is one number for the whole batch
noise:      (B,C,h,w) standard normal, float32 or float64, on the device to work on; z0 has its dtype
generators: one CPU generator per image, for stochastic samplers. Where the caller drew `noise` from the same ones
            (`rng.normal`), images are those of a diffusers pipeline and do not depend on their batch neighbours.
on_step:    called with 0, 1, ... after each step
first:      steps left out at the beginning, 0 to `steps`
start:      (B,C,h,w), the z0 of images to begin with (SDEdit 2108.01073): `noise` is added to it, as much as belongs to
            step `first`. Without it `noise` is itself z at that step, which for a row of diffusers' is allowed at 0 only
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from torch import Generator, Tensor

from personalize.core import rng
from personalize.core.guidance import Guided
from personalize.core.schedule import Schedule

OnStep = Callable[[int], None]


class Step(NamedTuple):
    t: int
    s: int
    abar_t: float
    abar_s: float


def ddpm(
    guided: Guided,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generators: list[Generator] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
    start: Tensor | None = None,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    visits: int = 1,
    residuals: Tensor | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2006.11239, algorithm 2) over any subset of the timesteps; calls as above.

    variance: that of q(z_s|z_t,z0), or the larger 1 - abar_t / abar_s (section 3.2). The last step adds no noise.
    visits: how often each step but the last is made, going back between by the forward process (RePaint 2201.09865):
    where `guided` holds a region fixed, the rest is brought in line with it. Repeating the noiseless last one would sharpen.
    residuals: of `inversion.ddpm_residuals`, added in place of fresh noise, by the last step too.
    """
    assert variance in ("fixed_small", "fixed_large"), variance
    assert residuals is None or (visits == 1 and len(residuals) == steps - first), "a residual belongs to one step of one path"
    z = _begin(noise, start, schedule, steps, first)
    for k, step in enumerate(_path(schedule, steps, first, 1.0, on_step)):
        kept = step.abar_t / step.abar_s
        for visit in range(visits if step.s >= 0 else 1):
            if visit > 0:
                z = math.sqrt(kept) * z + math.sqrt(1 - kept) * _fresh(z, generators)
            z0 = schedule.to_z0(z, guided(z, step.t), step.t)
            z, spread = schedule.posterior(z0, z, step.t, step.s)
            if variance == "fixed_large":
                spread = 1 - kept
            if residuals is not None:
                z = z + residuals[k]
            elif step.s >= 0:
                z = z + math.sqrt(spread) * _fresh(z, generators)
    return z


def ddim(
    guided: Guided,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generators: list[Generator] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
    start: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2010.02502, eq. 12 and 16); calls as above. Ends at abar[0] where `final_alpha_one` is false.

    eta: 0 is deterministic and needs no generators, 1 is as noisy as ddpm with "fixed_small".
    """
    end = 1.0 if schedule.final_alpha_one else schedule.alphas_cumprod[0].item()
    z = _begin(noise, start, schedule, steps, first)
    for t, _, abar_t, abar_s in _path(schedule, steps, first, end, on_step):
        out = guided(z, t)
        z0, eps = schedule.to_z0(z, out, t), schedule.to_eps(z, out, t)
        spread = eta * math.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
        z = math.sqrt(abar_s) * z0 + math.sqrt(max(1 - abar_s - spread**2, 0)) * eps
        if eta > 0:
            z = z + spread * _fresh(z, generators)
    return z


def dpmpp_2m(
    guided: Guided,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generators: list[Generator] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2), deterministic; calls as above, `generators` are not used.

    First order on the first step and on the last, which reaches clean data. Written without exp(-h), which is
    alpha_t sigma_s / (alpha_s sigma_t), so that lambda = -inf at zero terminal SNR is an ordinary first-order step.
    """
    z, z0_before, h_before = _begin(noise, start, schedule, steps, first), None, math.inf
    for t, _, abar_t, abar_s in _path(schedule, steps, first, 1.0, on_step):
        z0 = schedule.to_z0(z, guided(z, t), t)
        h = _log_ratio(abar_s) - _log_ratio(abar_t)
        estimate = z0
        if z0_before is not None and h < math.inf:
            estimate = z0 + h / (2 * h_before) * (z0 - z0_before)
        keep = math.sqrt((1 - abar_s) / (1 - abar_t))
        z = keep * z + (math.sqrt(abar_s) - math.sqrt(abar_t) * keep) * estimate
        z0_before, h_before = z0, h
    return z


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpmpp_2m}


def _begin(noise: Tensor, start: Tensor | None, schedule: Schedule, steps: int, first: int) -> Tensor:
    """z at step `first`; after the last one that is `start` itself."""
    assert 0 <= first <= steps, (first, steps)
    if start is None or first == steps:
        return noise if start is None else start
    return schedule.add_noise(start, noise, schedule.timesteps(steps)[first].item())


def _path(schedule: Schedule, steps: int, first: int, end: float, on_step: OnStep | None) -> Iterator[Step]:
    """The steps from step `first` to data, the last one to abar = `end`; reports each when the next is asked for."""
    times = schedule.timesteps(steps).tolist()[first:]
    abar = schedule.alphas_cumprod.tolist()
    for i, (t, s) in enumerate(zip(times, [*times, -1][1:], strict=True)):
        yield Step(t, s, abar[t], abar[s] if s >= 0 else end)
        if on_step is not None:
            on_step(i)


def _log_ratio(abar: float) -> float:
    """lambda = log(alpha / sigma), -inf for pure noise and inf for clean data."""
    if abar in (0.0, 1.0):
        return math.inf if abar else -math.inf
    return 0.5 * math.log(abar / (1 - abar))


def _fresh(z: Tensor, generators: list[Generator] | None) -> Tensor:
    assert generators is not None and len(generators) == len(z), "a stochastic sampler needs one generator per image"
    return rng.normal(generators, z.shape[1:]).to(z)
