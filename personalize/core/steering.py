"""Steering: guided(z, t) -> raw output becomes another one that says an edited z0. Samplers and guidance stay as they are.

B images; z, z0, out (B,C,h,w); t one number for the whole batch; z_t = alpha z0 + sigma eps. Edits are made in float32, on
what `cfg` has combined, and wrap each other: the outer one sees the z0 of the inner one.

With g = grad log p(y | z_t) the score of z_t given y is that of z_t plus s g. That is eps - s sigma g, v - s sigma/alpha g
and z0 + s sigma^2/alpha g, the same change in three ways; written here is the last, for every prediction. In `ddpm` it moves
the mean as algorithm 1 of Dhariwal & Nichol 2105.05233 does with a variance of (1 - r) / sqrt(r), r = abar_t / abar_s.

Rows of STEERING are called as row(guided, schedule, gradient, scale): the gradient of log p, (B,C,h,w) and t -> (B,C,h,w),
knows the networks (`ascent` makes one); scale 0 never calls it and 1 is Bayes' rule.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from personalize.core.guidance import Guided
from personalize.core.schedule import Schedule

Gradient = Callable[[Tensor, float], Tensor]
LEAST_ALPHA = 0.02  # below it sigma^2 / alpha has no bounds, and a classifier sees nothing but noise


def edited(guided: Guided, schedule: Schedule, change: Callable[[Tensor, float, Tensor], Tensor]) -> Guided:
    """change(z_t, t, z0) -> z0, what the prediction is to say instead. Where that is z0 itself no bit of `guided` changes."""

    def steered(z: Tensor, t: float) -> Tensor:
        out = guided(z, t)
        z0 = schedule.to_z0(z, out, t)
        wanted = change(z, t, z0)
        return out if wanted is z0 else schedule.from_z0(z, wanted, t)

    return steered


def classified(guided: Guided, schedule: Schedule, gradient: Gradient, scale: float) -> Guided:
    """Classifier guidance (Dhariwal & Nichol 2105.05233); the classifier reads noisy z_t, so `gradient` gets z_t and t.

    The two terms of Bayes' rule are exact where alpha is at least LEAST_ALPHA; at earlier steps nothing is changed.
    """

    def change(z: Tensor, t: float, z0: Tensor) -> Tensor:
        alpha, sigma = schedule.level(t)
        return z0 if scale == 0 or alpha < LEAST_ALPHA else z0 + scale * sigma**2 / alpha * gradient(z, t)

    return edited(guided, schedule, change)


def toward(guided: Guided, schedule: Schedule, gradient: Gradient, scale: float, *, every: int = 1) -> Guided:
    """Guidance by what reads clean data, such as CLIP (GLIDE 2112.10741; MPGD 2311.16424): `gradient` gets z0 and t.

    For data of unit variance z0 moves by alpha with z_t, so that alpha cancels: z0 + s sigma^2 grad log p(y | z0), finite at
    zero SNR. every: only each so-many-th evaluation is guided, beginning with the first.
    """
    calls = itertools.count()

    def change(z: Tensor, t: float, z0: Tensor) -> Tensor:
        if scale == 0 or next(calls) % every:
            return z0
        return z0 + scale * schedule.level(t)[1] ** 2 * gradient(z0, t)

    return edited(guided, schedule, change)


STEERING = {"classified": classified, "toward": toward}


def known(guided: Guided, schedule: Schedule, z0: Tensor, mask: Tensor) -> Guided:
    """Inpainting with any base: where mask (B or 1,1,h,w) is 0 the prediction says `z0`, and where it is 1 its own.

    Every sampler then takes the known part along its own path, and ends at `z0` there. The rest leans on the known part less
    than it should (the bias of all replacement methods), least so with `ddpm` and its `visits`.
    """
    return edited(guided, schedule, lambda z, t, own: mask * own + (1 - mask) * z0)


def ascent(log_p: Callable[[Tensor, float], Tensor]) -> Gradient:
    """log_p(z, t) -> (B,) becomes its gradient in z, of the sum, so that no row's depends on the batch.

    Also inside `torch.inference_mode`, as long as nothing made there is an input of a layer whose gradient is needed.
    """

    def gradient(z: Tensor, t: float) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            return torch.autograd.grad(log_p(z, t).sum(), z)[0]

    return gradient
