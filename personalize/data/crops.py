"""One photo  ->  a crop of the shape it is trained in  ->  a tensor, its mask the same way; and the order photos are used in.

Shapes: B images, 3 channels, H W pixels: of a size that is one number, H = W. A crop's shape is any size of its
aspect. Random crops and flips are drawn at each step from the generator that is passed in, never once at load, and once for an
image and its mask.
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

from personalize.common.image_size import Size, as_size
from personalize.core.rng import generator as seeded
from personalize.data.decode import SUBJECT_FROM

CROPS = ("center", "random", "subject")

SQUARE = (1, 1)  # a crop's shape

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
    size_wh: Size, crop: str = "center", generator: Generator | None = None, *, subject: Box | None = None,
    shape: int | Size = SQUARE,
) -> Box:  # fmt: skip
    """(width, height)  ->  (left, top, right, bottom) of the largest box of a shape, in the same pixels.

    "center" takes the middle. "subject" takes the place whose middle is nearest to that of the box `subject`; without
    such a box, the middle. "random" draws its place from `generator`, always with one number per axis, so that what
    is drawn after it does not depend on the image's size.
    """
    assert crop in CROPS, crop
    sides = largest_sides(size_wh, shape)
    room = (size_wh[0] - sides[0], size_wh[1] - sides[1])
    if crop == "random":
        assert generator is not None, "a random crop draws from a generator"
        shares = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        left, top = (int(share * (most + 1)) for share, most in zip(shares, room, strict=True))
    else:
        around = subject if crop == "subject" and subject else (0, 0, *size_wh)
        left, top = (min(max((around[k] + around[k + 2] - sides[k]) // 2, 0), room[k]) for k in (0, 1))
    return left, top, left + sides[0], top + sides[1]


def largest_sides(size_wh: Size, shape: int | Size) -> Size:
    """(width, height)  ->  those of the largest box of a shape in it."""
    (width, height), (across, down) = size_wh, as_size(shape)
    if width * down > height * across:
        return max(1, round(height * across / down)), height
    return width, max(1, round(width * down / across))


def share_kept(size_wh: Size, shape: int | Size) -> float:
    """The share of a photo's area inside the largest box of a shape."""
    (width, height), (across, down) = size_wh, as_size(shape)
    return min(width * down, height * across) / max(width * down, height * across)


def largest_box(
    photo: Photo, crop: str = "center", generator: Generator | None = None, *, shape: int | Size = SQUARE
) -> Box:  # fmt: skip
    """The largest box of a shape in a photo, in pixels of its image, at the place that the crop says."""
    return crop_box(photo.image.size, crop, generator, subject=photo.subject, shape=shape)


def fixed_box(photo: Photo, crop: str, *, shape: int | Size = SQUARE) -> Box:
    """The largest box of a shape where nothing may be random: a random crop is looked at in its middle."""
    return largest_box(photo, "center" if crop == "random" else crop, shape=shape)


def cut(photo: Photo, size: int | Size, box: Box) -> Image.Image:
    """A photo, the size to give it, a box in its pixels  ->  RGB image of that size, resized with Lanczos."""
    return photo.image.resize(as_size(size), Image.Resampling.LANCZOS, box=box)


def cut_mask(photo: Photo, size: int | Size, box: Box) -> Image.Image:
    """The same box of a photo's mask  ->  "L" of that size, 255 = subject; all subject without a mask."""
    if photo.mask is None:
        return Image.new("L", as_size(size), 255)
    return photo.mask.resize(as_size(size), Image.Resampling.BILINEAR, box=box)  # Lanczos would ring at the outline


def photo_squares(photos: Sequence[Photo], size: int, crop: str) -> list[Image.Image]:
    """The squares of photos as training cuts them, at `size` px; a random crop by its middle."""
    return [cut(photo, size, fixed_box(photo, crop)) for photo in photos]


def draw_crops(
    photos: Sequence[Photo], crop: str = "center", *, flip: bool = False, generator: Generator | None = None,
    shape: int | Size = SQUARE,
) -> list[Crop]:  # fmt: skip
    """Where each photo is cut: its largest box of a shape, mirrored in half of the cases with `flip`; one generator serves
    all.
    """
    assert generator is not None or not flip, "a flip draws from a generator"
    crops = []
    for photo in photos:
        box = largest_box(photo, crop, generator, shape=shape)
        crops.append(Crop(photo, box, flip and torch.rand((), generator=generator, dtype=torch.float64).item() < 0.5))
    return crops


def corner(crop: Crop, size: int | Size) -> tuple[int, int]:
    """Left, top of a crop, in px of the photo once the crop is of that size; of the mirrored photo if it is mirrored."""
    left, top, right, bottom = crop.box
    scale = as_size(size)[1] / (bottom - top)
    left = crop.photo.image.width - right if crop.mirrored else left
    return round(left * scale), round(top * scale)


def image_tensor(crops: Sequence[Crop], size: int | Size) -> Tensor:
    """B crops  ->  (B,3,H,W) float32 in [-1,1] of that size, resized with Lanczos."""
    return (_pixels(cut, crops, size) / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()


def mask_tensor(crops: Sequence[Crop], size: int | Size) -> Tensor:
    """B crops  ->  (B,1,H,W) float32 in [0,1], 1 = subject; ones without a mask."""
    return _pixels(cut_mask, crops, size)[:, None] / 255.0


def epoch_order(count: int, batch: int, step: int, *, seed: int, purpose: str = "subject") -> list[int]:
    """The `batch` indices in range(count) that step `step` = 0, 1, 2, … uses.

    A function of its arguments alone, so that resuming needs no state. The steps walk over one endless row of
    permutations, one an epoch: each epoch uses every index exactly once, whatever the batch size, and none is dropped.
    """
    assert count > 0 and batch > 0 and step >= 0, (count, batch, step)
    epochs = range(step * batch // count, ((step + 1) * batch - 1) // count + 1)
    generators = [seeded(seed, f"order/{purpose}", epoch) for epoch in epochs]
    row = [i for generator in generators for i in torch.randperm(count, generator=generator).tolist()]
    start = step * batch - epochs.start * count
    return row[start : start + batch]


def epochs_of(count: int, batch: int, step: int) -> list[int]:
    """The epoch that each index of `epoch_order` is in: how often its image was used before."""
    return [(step * batch + k) // count for k in range(batch)]


def _pixels(of: Callable, crops: Sequence[Crop], size: int | Size) -> Tensor:
    """B crops, `cut` or `cut_mask`  ->  (B,H,W,3) or (B,H,W) float32 in [0,255]."""
    arrays = [np.asarray(of(photo, size, box), dtype=np.float32)[:, :: -1 if mirrored else 1] for photo, box, mirrored in crops]
    return torch.from_numpy(np.stack(arrays))
