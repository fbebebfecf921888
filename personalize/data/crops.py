"""One photo  ->  a square crop  ->  a tensor, its mask the same way; and the order photos are used in.

Shapes: B images, 3 channels, H = W = size in pixels. Random crops and flips are drawn at each call from the generator
that is passed in, never once at load; a generator in the same state draws the same for images and masks.
Folders and data sets of photos are in `photos`, their decoding in `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
        if self.mask is None:
            return None
        return self.mask.point([255 * (value >= SUBJECT_FROM) for value in range(256)]).getbbox()


def crop_box(
    size_wh: tuple[int, int],
    side: int,
    crop: str = "center",
    generator: Generator | None = None,
    *,
    subject: Box | None = None,
) -> Box:
    """(width, height), side of a square in the same pixels  ->  (left, top, right, bottom) inside the image.

    "center" takes the middle. "subject" takes the place whose middle is nearest to that of the box `subject`; without
    such a box, the middle. "random" draws its place from `generator`, always with one number per axis, so that what
    is drawn after it does not depend on the image's size.
    """
    assert crop in CROPS, crop
    room = (size_wh[0] - side, size_wh[1] - side)
    assert min(room) >= 0, f"a crop of {side} px does not fit in {size_wh}"
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
    return crop_box(photo.image.size, min(photo.image.size), crop, generator, subject=photo.subject)


def square(photo: Photo, size: int, box: Box) -> Image.Image:
    """A photo, the side to give it, a box in its pixels  ->  RGB image of size × size, resized with Lanczos."""
    return photo.image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def square_mask(photo: Photo, size: int, box: Box) -> Image.Image:
    """The same box of a photo's mask  ->  "L" of size × size, 255 = subject; all subject without a mask."""
    if photo.mask is None:
        return Image.new("L", (size, size), 255)
    return photo.mask.resize((size, size), Image.Resampling.BILINEAR, box=box)  # Lanczos would ring at the outline


def to_tensor(
    photo: Photo, size: int, *, crop: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """A photo  ->  (3,H,W) float32 in [-1,1] with H = W = size.

    The largest square of the photo, resized with Lanczos: the same as resizing the short side to `size` and
    cropping, without the large image between. `flip` mirrors left to right in half of the calls.
    """
    box, mirrored = _drawn(photo, crop, flip=flip, generator=generator)
    pixels = torch.from_numpy(np.array(square(photo, size, box), dtype=np.float32))
    image = (pixels / 127.5 - 1.0).permute(2, 0, 1)
    return (image.flip(-1) if mirrored else image).contiguous()


def mask_to_tensor(
    photo: Photo, size: int, *, crop: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """A photo's mask  ->  (1,H,W) float32 in [0,1], 1 = subject; ones without a mask.

    Cut and mirrored as `to_tensor` does with a generator in the same state.
    """
    box, mirrored = _drawn(photo, crop, flip=flip, generator=generator)
    marks = torch.from_numpy(np.array(square_mask(photo, size, box), dtype=np.float32))[None] / 255.0
    return (marks.flip(-1) if mirrored else marks).contiguous()


def photo_batch(
    photos: Sequence[Photo], size: int, *, crop: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """B photos  ->  (B,3,H,W) float32 in [-1,1]; one generator serves them in turn."""
    return torch.stack([to_tensor(photo, size, crop=crop, flip=flip, generator=generator) for photo in photos])


def mask_batch(
    photos: Sequence[Photo], size: int, *, crop: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """B photos  ->  (B,1,H,W) float32 in [0,1], 1 = subject; pixel for pixel those of `photo_batch`.

    Where crop or flip are random, pass a generator in the state that `photo_batch` got its own in; it is left in the
    same state afterwards. `size` may be smaller than the images', such as the latents'.
    """
    return torch.stack([mask_to_tensor(photo, size, crop=crop, flip=flip, generator=generator) for photo in photos])


def epoch_order(count: int, batch: int, step: int, *, seed: int, purpose: str = "subject") -> list[int]:
    """The `batch` indices in range(count) that step `step` = 0, 1, 2, … uses.

    A function of its arguments alone, so that resuming needs no state. The steps walk over one endless row of
    permutations, one an epoch: each epoch uses every index exactly once, whatever the batch size, and none is dropped.
    """
    assert count > 0 and batch > 0 and step >= 0, (count, batch, step)
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    row = [i for epoch in epochs for i in _epoch(count, epoch, seed=seed, purpose=purpose)]
    start = first - epochs.start * count
    return row[start : start + batch]


def _drawn(photo: Photo, crop: str, *, flip: bool, generator: Generator | None) -> tuple[Box, bool]:
    """Where a photo is cut and whether it is mirrored: all that is random about it, drawn in one order for all."""
    box = largest_box(photo, crop, generator)
    if not flip:
        return box, False
    assert generator is not None, "a flip draws from a generator"
    return box, torch.rand((), generator=generator, dtype=torch.float64).item() < 0.5


def _epoch(count: int, epoch: int, *, seed: int, purpose: str) -> list[int]:
    return torch.randperm(count, generator=seeded(seed, f"order/{purpose}", epoch)).tolist()
