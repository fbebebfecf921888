"""Training an inpainting base: random masks, and images as such a base is told them.

A mask is a pure function of (seed, image, pass over the images), drawn in the crop: photo, mask and masked
photo cannot be cut apart (huggingface/diffusers#1529). V masks of each image, C latent channels, h w latent size, px sizes H W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from personalize.common.image_size import Size, as_size
from personalize.core import rng
from personalize.generation.inpainting import masked_condition
from personalize.models.devices import take_rows
from personalize.models.interface import LatentModel

MASKS = 32  # of an image; later passes over the images use them again in turn, so that they can be encoded once
WHOLE = 0.25  # share of masks that paint the whole image, as Stable Diffusion's inpainting base was trained
SIDES = 0.25, 1.0  # shortest and longest height or width of a shape, shares of the image's edge


@dataclass(frozen=True)
class Masks:
    """The masks of `count` images. purpose: "subject" or "prior", as in `epoch_order`, whose passes they follow."""

    seed: int
    purpose: str
    count: int

    def of(self, images: Sequence[int], passes: Sequence[int], size: int | Size) -> Tensor:
        """B images by number, and which pass each is in -> (B,1,H,W) of 0 and 1, which is painted."""
        numbers = [p % MASKS * self.count + i for i, p in zip(images, passes, strict=True)]
        return torch.stack([random_mask(rng.generator(self.seed, f"mask/{self.purpose}", k), size) for k in numbers])


def random_mask(generator: Generator, size: int | Size) -> Tensor:
    """(1,H,W) of 0 and 1: all ones in WHOLE of the cases, else an upright rectangle or ellipse that lies inside."""
    whole, kind, *shares = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    if whole < WHOLE:
        return torch.ones(1, *as_size(size)[::-1])
    away = []
    for extent, place, edge in zip(shares[:2], shares[2:], as_size(size)[::-1]):
        cells = (torch.arange(edge, dtype=torch.float64) + 0.5) / edge
        extent = SIDES[0] + (SIDES[1] - SIDES[0]) * extent
        away.append((cells - (extent / 2 + (1 - extent) * place)).abs() / (extent / 2))  # 1 at the shape's edge
    down, across = away[0][:, None], away[1][None]
    inside = torch.maximum(down, across) if kind < 0.5 else down.square() + across.square()
    return (inside <= 1).float()[None]


def masks_needed(steps: int, batch: int, count: int) -> int:
    """V, the masks of each of `count` images that `steps` steps of `batch` images use."""
    return min(MASKS, -(-steps * batch // count))


def encode_versions(
    model: LatentModel, pixels: Callable[[int], Tensor], masks: Masks, versions: int, advance: Callable[[], None]
) -> Tensor:
    """MASKED of each image under its first V masks, (count,V,1+C,h,w) on the device. pixels: number -> (1,3,H,W).

    One image at a time: large ones fill a GPU. `advance` is called after each.
    """
    rows = []
    for i in range(masks.count):
        image = pixels(i)
        for version in range(versions):
            rows.append(masked_condition(model, image, masks.of([i], [version], (image.shape[-1], image.shape[-2]))))
            advance()
    return torch.cat(rows).unflatten(0, (masks.count, versions))


def of_passes(encoded: Tensor, images: Sequence[int], passes: Sequence[int]) -> Tensor:
    """What `encode_versions` gave, B images and their passes -> MASKED (B,1+C,h,w)."""
    versions = encoded.shape[1]
    return take_rows(encoded.flatten(0, 1), [i * versions + p % versions for i, p in zip(images, passes, strict=True)])
