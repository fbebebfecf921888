"""Losses per image, their weights, and DreamBooth's sum of two means.

B images, C channels, h w latent size. Everything stays a tensor: nothing here waits for the device.
"""

from typing import Literal

import torch
from torch import Tensor


def denoising_loss(out: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,C,h,w), (B,C,h,w) -> (B,): mean squared error per image, reduced in float32.

    mask: weights >= 0 that broadcast to (B,C,h,w), such as (B,1,h,w); the mean becomes a weighted mean, so the loss
    does not shrink with the masked area. An image whose mask is all zero has loss 0.
    """
    error = (out.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.float().expand_as(error).flatten(1)
    total = weight.sum(1)
    return (weight * error.flatten(1)).sum(1) / torch.where(total > 0, total, 1)


def sharpened(target: Tensor, out: Tensor, weak: Tensor, scale: float | Tensor) -> Tensor:
    """target, out, weak (B,C,h,w) -> target + scale (out - weak), no gradient: autoguidance learned, not sampled with.

    weak is a worse network's output. A network that learns from this target tends to E[target] + s (E[target] - weak) with
    s = scale / (1 - scale), which is what guidance by the worse one (Karras et al. 2406.02507) would sample with; in the
    form of Tang et al. 2502.12154. scale: below 1, a number or (B,1,1,1); 0 leaves the target as it is.
    """
    return target + scale * (out - weak).detach()


def min_snr_weight(snr: Tensor, gamma: float, prediction: Literal["epsilon", "sample", "v_prediction"]) -> Tensor:
    """snr (B,) -> weights (B,) of Min-SNR-gamma (Hang et al. 2303.09556, section 3.4).

    min(snr, gamma) for z0, over snr for eps, over snr + 1 for v (not `+ 1` afterwards: diffusers #5654). At snr 0 the
    eps weight is its limit 1, the other two are 0.
    """
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction == "sample":
        return snr.clamp(max=gamma)
    assert prediction == "v_prediction", prediction
    return snr.clamp(max=gamma) / (snr + 1)


def dreambooth_loss(
    per_image: Tensor,
    is_prior: Tensor,
    prior_weight: float,
    *,
    counts: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """per_image (B,), is_prior (B,) bool -> loss, subject mean, prior mean, each () (Ruiz et al. 2208.12242, eq. 2).

    loss = mean(subject) + prior_weight * mean(prior): two means, so the mix of a batch does not change the balance.
    Per-image weights are in `per_image` already. A batch with no images of one kind has 0 for that mean.
    counts: (subjects, priors) of the global batch, where these B rows are a part of it; the parts' losses then add up.
    """
    assert per_image.shape == is_prior.shape and is_prior.dtype == torch.bool, (per_image.shape, is_prior.dtype)
    subject = torch.where(is_prior, 0, per_image).sum()
    prior = torch.where(is_prior, per_image, 0).sum()
    if counts is None:
        subject = subject / (~is_prior).sum().clamp(min=1)
        prior = prior / is_prior.sum().clamp(min=1)
    else:
        subject, prior = subject / max(counts[0], 1), prior / max(counts[1], 1)
    return subject + prior_weight * prior, subject, prior
