"""The loss of a batch of latents: what every method minimizes. B images, C latent channels, h w latent size."""

from torch import Tensor

from personalize.core import losses
from personalize.core.guidance import Cond
from personalize.core.schedule import Schedule
from personalize.models.interface import LatentModel


def per_image_loss(
    model: LatentModel, z0: Tensor, cond: Cond, *, t: Tensor, eps: Tensor, target: Tensor | None = None,
    mask: Tensor | None = None, noise: Tensor | None = None, snr_gamma: float = 0.0,
) -> Tensor:  # fmt: skip
    """z0, cond, t, eps -> (B,) float32: squared error of the base's own target, min-SNR weighted if gamma > 0.

    target (B,C,h,w) in place of that target; mask (B,1,h,w): weights of the squared error's mean; noise (B,C,h,w): added to z0
    in place of eps, of which the target is made.
    """
    out = model.predict(model.schedule.add_noise(z0, eps if noise is None else noise, t), t, cond)
    return loss_of_output(model.schedule, out, z0, t=t, eps=eps, target=target, mask=mask, snr_gamma=snr_gamma)


def loss_of_output(
    schedule: Schedule, out: Tensor, z0: Tensor, *, t: Tensor, eps: Tensor, target: Tensor | None = None,
    mask: Tensor | None = None, snr_gamma: float = 0.0,
) -> Tensor:  # fmt: skip
    """`per_image_loss` by the raw output (B,C,h,w) of the network."""
    loss = losses.denoising_loss(out, schedule.target(z0, eps, t) if target is None else target, mask)
    return loss * losses.min_snr_weight(schedule.snr(t), snr_gamma, schedule.prediction) if snr_gamma else loss
