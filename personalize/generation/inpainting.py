"""Images to begin with: img2img (SDEdit 2108.01073), and inpainting with any base, trained for it or not.

B images, C latent channels, h w latent size, H W px; pixels in [-1,1]. In a mask 1 is painted anew and 0 is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.core.steering import known
from personalize.models.interface import LatentModel


@dataclass(frozen=True)
class Canvas:
    """An image that others begin with.

    pixels    (3,H,W)
    mask      (1,H,W), 0 or 1; None: all of it is drawn anew
    strength  0 to 1, the share of the sampling steps that is made: 0 gives the image as the VAE shows it
    visits    how often each step is made, as in `core.samplers.ddpm`
    """

    pixels: Tensor
    mask: Tensor | None = None
    strength: float = 1.0
    visits: int = 1


def sampling_options(model: LatentModel, canvas: Canvas, steps: int) -> Callable[[int], dict]:
    """B -> what `sample_latents` is given to draw B images on the canvas, which is encoded here, once."""
    z0 = model.encode_images(canvas.pixels[None])[0]
    first = steps - round(canvas.strength * steps)
    options: dict = {"first": first, "visits": canvas.visits}
    if canvas.mask is not None:
        if model.inpaints:
            options["masked"] = masked_condition(model, canvas.pixels[None], canvas.mask[None])
        else:
            mask = painted_cells(canvas.mask, model.downscale)[None].to(z0)
            options["steer"] = lambda guided, rows: known(guided, model.schedule, z0, mask)
        if first == 0:  # noise alone, as a plain image begins: with `start` some of what was there is left at T
            return lambda count: options
    return lambda count: options | {"start": z0.expand(count, -1, -1, -1)}


def masked_condition(model: LatentModel, pixels: Tensor, mask: Tensor) -> Tensor:
    """(B,3,H,W), (B,1,H,W) -> MASKED (B,1+C,h,w), in float32. Painted pixels are grey before they are encoded, so that no
    cell beside the mask knows of them; inpainting bases were trained so.
    """
    z0 = model.encode_images(pixels * (1 - mask))[0]
    return torch.cat([painted_cells(mask, model.downscale).to(z0), z0], 1)


def painted_cells(mask: Tensor, downscale: int) -> Tensor:
    """(…,H,W) -> (…,h,w): a latent cell is painted anew if any pixel of it is."""
    return max_pool2d(mask, downscale)


def paste_kept(images: Tensor, canvas: Canvas, width: int) -> Tensor:
    """(B,3,H,W) -> the same with the canvas's own pixels where its mask is 0, exactly: the VAE changes them all a little.

    Inside the mask the image takes over within `width` px of its edge.
    """
    if canvas.mask is None:
        return images
    return torch.lerp(canvas.pixels.to(images), images, feathered(canvas.mask, width).to(images))


def feathered(mask: Tensor, width: int) -> Tensor:
    """(1,H,W) of 0 and 1 -> 0 where it is 0, rising to 1 within `width` px inside it; sooner where it is narrower."""
    depth, inside = torch.zeros_like(mask), mask
    for _ in range(width):
        depth = depth + inside
        inside = 1 - max_pool2d(1 - inside, 3, stride=1, padding=1)
    return depth / max_pool2d(depth, 2 * width + 1, stride=1, padding=width).clamp(min=1)
