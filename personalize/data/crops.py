"""One photo  ->  a square crop  ->  a tensor, its mask the same way; and the order photos are used in.

Shapes: B images, 3 channels, H = W = size in pixels. Random crops and flips are drawn at each step from the generator
that is passed in, never once at load, and once for an image and its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from personalize.core.rng import generator as seeded
from personalize.data.decode import SUBJECT_FROM

CROPS = ("center", "random", "subject")

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Photo:
    """One upright RGB image without metadata.

    path         as the user wrote it: "my_dog/a.jpg", or "hf:google/dreambooth/dog[3]"
    image        PIL "RGB"; photos with a short side of 4096 px and more are kept at a whole fraction of their size
    sha256       of the file's bytes: the photo's identity
    caption      the words in the `.txt` beside it, or in the data set's "text" column
    size         (width, height) in pixels of the file, once upright
    mask         PIL "L" of the same size as `image`, 255 = subject, from a mask file or the photo's own alpha; None
                 where there is neither
    mask_sha256  of the mask file's bytes, which belong to what identifies a run; None without such a file
    orientation  the EXIF orientation 1 to 8 that was undone
    """

    path: str
    image: Image.Image
    sha256: str
    caption: str | None
    size: tuple[int, int]
    mask: Image.Image | None = None
    mask_sha256: str | None = None
    orientation: int = 1

    @property
    def name(self) -> str:
        """The last part of the path: "a.jpg"."""
        return Path(self.path).name

    @cached_property
    def subject(self) -> Box | None:
        """The box around the subject in pixels of `image`; None without a mask."""
        return None if self.mask is None else binary_mask(self.mask).getbbox()

    @cached_property
    def covered(self) -> float | None:
        """The share of the photo that its mask marks as the subject; None without a mask."""
        return None if self.mask is None else binary_mask(self.mask).histogram()[255] / (self.mask.width * self.mask.height)


class Crop(NamedTuple):
    """The part of a photo that training sees; mirrored: left to right."""

    photo: Photo
    box: Box
    mirrored: bool = False


def binary_mask(mask: Image.Image) -> Image.Image:
    """ "L" in shades  ->  0 and 255, the subject."""
    return mask.point([255 * (value >= SUBJECT_FROM) for value in range(256)])


def crop_box(
    size_wh: tuple[int, int], crop: str = "center", generator: Generator | None = None, *, subject: Box | None = None
) -> Box:
    """(width, height)  ->  (left, top, right, bottom) of the largest square, in the same pixels.

    "center" takes the middle. "subject" takes the place whose middle is nearest to that of the box `subject`; without
    such a box, the middle. "random" draws its place from `generator`, always with one number per axis, so that what
    is drawn after it does not depend on the image's size.
    """
    assert crop in CROPS, crop
    side = min(size_wh)
    room = (size_wh[0] - side, size_wh[1] - side)
    if crop == "random":
        assert generator is not None, "a random crop draws from a generator"
        shares = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        left, top = (int(share * (most + 1)) for share, most in zip(shares, room, strict=True))
    else:
        around = subject if crop == "subject" and subject else (0, 0, *size_wh)
        left, top = (min(max((around[k] + around[k + 2] - side) // 2, 0), room[k]) for k in (0, 1))
    return left, top, left + side, top + side


def largest_box(photo: Photo, crop: str = "center", generator: Generator | None = None) -> Box:
    """The largest square of a photo, in pixels of its image, at the place that the crop says."""
    return crop_box(photo.image.size, crop, generator, subject=photo.subject)


def fixed_box(photo: Photo, crop: str) -> Box:
    """The largest square where nothing may be random: a random crop is looked at in its middle."""
    return largest_box(photo, "center" if crop == "random" else crop)


def square(photo: Photo, size: int, box: Box) -> Image.Image:
    """A photo, the side to give it, a box in its pixels  ->  RGB image of size × size, resized with Lanczos."""
    return photo.image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def square_mask(photo: Photo, size: int, box: Box) -> Image.Image:
    """The same box of a photo's mask  ->  "L" of size × size, 255 = subject; all subject without a mask."""
    if photo.mask is None:
        return Image.new("L", (size, size), 255)
    return photo.mask.resize((size, size), Image.Resampling.BILINEAR, box=box)  # Lanczos would ring at the outline


def photo_squares(photos: Sequence[Photo], size: int, crop: str) -> list[Image.Image]:
    """Photos as training sees them, at `size` px; a random crop by its middle."""
    return [square(photo, size, fixed_box(photo, crop)) for photo in photos]


def draw_crops(
    photos: Sequence[Photo], crop: str = "center", *, flip: bool = False, generator: Generator | None = None
) -> list[Crop]:
    """Where each photo is cut: its largest square, mirrored in half of the cases with `flip`; one generator serves all."""
    assert generator is not None or not flip, "a flip draws from a generator"
    crops = []
    for photo in photos:
        box = largest_box(photo, crop, generator)
        crops.append(Crop(photo, box, flip and torch.rand((), generator=generator, dtype=torch.float64).item() < 0.5))
    return crops


def corner(crop: Crop, size: int) -> tuple[int, int]:
    """Left, top of a square crop, in px of the photo once its short side is `size`; of the mirrored photo if it is mirrored."""
    left, top, right, bottom = crop.box
    scale = size / (bottom - top)
    left = crop.photo.image.width - right if crop.mirrored else left
    return round(left * scale), round(top * scale)


def image_tensor(crops: Sequence[Crop], size: int) -> Tensor:
    """B crops  ->  (B,3,H,W) float32 in [-1,1] with H = W = size, resized with Lanczos."""
    return (_pixels(square, crops, size) / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()


def mask_tensor(crops: Sequence[Crop], size: int) -> Tensor:
    """B crops  ->  (B,1,H,W) float32 in [0,1], 1 = subject; ones without a mask."""
    return _pixels(square_mask, crops, size)[:, None] / 255.0


def epoch_order(count: int, batch: int, step: int, *, seed: int, purpose: str = "subject") -> list[int]:
    """The `batch` indices in range(count) that step `step` = 0, 1, 2, … uses.

    A function of its arguments alone, so that resuming needs no state. The steps walk over one endless row of
    permutations, one an epoch: each epoch uses every index exactly once, whatever the batch size, and none is dropped.
    """
    assert count > 0 and batch > 0 and step >= 0, (count, batch, step)
    epochs = range(step * batch // count, ((step + 1) * batch - 1) // count + 1)
    permutations = (torch.randperm(count, generator=seeded(seed, f"order/{purpose}", epoch)) for epoch in epochs)
    start = step * batch - epochs.start * count
    return torch.cat([*permutations])[start : start + batch].tolist()


def epochs_of(count: int, batch: int, step: int) -> list[int]:
    """The epoch that each index of `epoch_order` is in: how often its image was used before."""
    return [(step * batch + k) // count for k in range(batch)]


def _pixels(cut: Callable, crops: Sequence[Crop], size: int) -> Tensor:
    """B crops, `square` or `square_mask`  ->  (B,H,W,3) or (B,H,W) float32 in [0,255]."""
    arrays = [
        np.asarray(cut(photo, size, box), dtype=np.float32)[:, :: -1 if mirrored else 1] for photo, box, mirrored in crops
    ]
    return torch.from_numpy(np.stack(arrays))
