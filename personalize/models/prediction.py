"""What a U-Net predicts, told by what it does: one pass on noised images, held against both targets.

An image is encoded and noised to abar = 0.1, where eps and v = alpha eps - sigma z0 are almost at right angles, and the
squared error of the output is taken relative to each target's own square. A network without training, or with an
output of zeros, is near 1 for both.
"""

import torch
from torch import Tensor

from personalize.core import rng
from personalize.models.interface import LatentModel

ABAR = 0.1
IMAGES, SIZE = 2, 256  # SIZE: most px of an edge; what is told does not need the size of training
FITS, BETTER = 0.75, 0.7  # largest error of the target that fits, and share of the other's that it may have


def fitting_prediction(model: LatentModel) -> tuple[str, dict[str, float]]:
    """ "epsilon", "v_prediction" or, where neither fits, ""; and the relative squared error of each."""
    errors = prediction_errors(model)
    best, other = sorted(errors, key=errors.get)
    is_told = errors[best] < FITS and errors[best] < BETTER * errors[other]
    return best if is_told else "", errors


@torch.no_grad()
def prediction_errors(model: LatentModel) -> dict[str, float]:
    """{"epsilon": |out - eps|² / |eps|², "v_prediction": |out - v|² / |v|²} of one pass."""
    z0, _ = model.encode_images(_discs(IMAGES, min(model.size, SIZE)))
    eps = torch.randn(z0.shape, generator=rng.generator(0, "prediction")).to(z0)
    t = int((model.schedule.alphas_cumprod - ABAR).abs().argmin())
    alpha, sigma = model.schedule.coefficients(t, z0)
    cond = model.encode_prompts([""] * IMAGES)
    out = model.predict(model.schedule.add_noise(z0, eps, t), torch.full((IMAGES,), t, device=z0.device), cond).float()
    targets = {"epsilon": eps, "v_prediction": alpha * eps - sigma * z0}
    return {name: float((out - target).square().sum() / target.square().sum()) for name, target in targets.items()}


def _discs(count: int, size: int) -> Tensor:
    """(count,3,size,size) in [-1,1]: a disc before a gradient of two colours, as plain as an image can be."""
    g = rng.generator(0, "discs")
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    colours = torch.rand(count, 3, 3, 1, 1, generator=g) * 2 - 1
    backdrop = colours[:, 0] + (colours[:, 1] - colours[:, 0]) * (y + 1) / 2
    centres = torch.rand(count, 2, 1, 1, 1, generator=g) * 0.6 - 0.3
    inside = (x - centres[:, 0]).square() + (y - centres[:, 1]).square() < 0.25
    return torch.where(inside, colours[:, 2], backdrop)
