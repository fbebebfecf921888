"""What is measured of a photo before training: pixels, sharpness, light, what the crop keeps, and likeness to others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from personalize.common.image_size import Size, as_size
from personalize.data.crops import Box, Photo, cut, cut_mask, fixed_box, largest_sides, share_kept

SHARPNESS_SIDE = 512  # px of the long side that sharpness is measured at
SHARPNESS_LEAST = 256  # px of the short side, below which it is not
LIGHT_SIDE = 64  # px at which light and coverage are measured
WHITE = 250  # of 255, from which a channel is burnt out
BACKGROUND_SIDE = 32  # px at which backgrounds are compared
BACKGROUND_LEAST = 0.05  # of the crop; less than that is not compared
BORDER = 0.2  # of the side: what is taken for background where no mask says it
BINS = 6  # of each colour channel
GAINS = (1.0, 0.85, 0.92, 1.09, 1.18)  # of light, by which two photos of one place may differ


@dataclass(frozen=True)
class PhotoStats:
    """What was measured of a photo that is trained on at `size` px, or at that width and height.

    box        its crop in pixels of `photo.image`
    enlarged   size / what the crop has in the file: above 1 the photo has too few pixels
    cut_off    share of the photo outside the crop
    sharpness  variance of the Laplacian, luma², in the sharpest of 4×4 parts; None below SHARPNESS_LEAST px
    lightest   of 255: 95% of the crop's pixels have no channel above it
    burnt      share of the crop's middle half, or with a mask of the subject, whose channels are all at WHITE
    coverage   share of the crop that is subject; None without a mask
    lost       share of the subject outside the crop; None without a mask
    edge       share of the photo's outermost pixels that are subject; None without a mask
    thumbnail  (16,16,3) in [0,255]: with colours, as flat images differ by them
    colours    (5,216): how often each colour is in the background, in shares, were its light multiplied by each of
               GAINS; None where there is too little of it
    """

    photo: Photo
    size: int | Size
    box: Box
    enlarged: float
    cut_off: float
    sharpness: float | None
    lightest: float
    burnt: float
    coverage: float | None
    lost: float | None
    edge: float | None
    thumbnail: np.ndarray
    colours: np.ndarray | None


def measure_photo(photo: Photo, size: int | Size, crop: str) -> PhotoStats:
    """A photo, what it is trained at in px, its crop  ->  PhotoStats. A random crop is measured at its middle."""
    box = fixed_box(photo, crop, shape=size)
    pixels = np.asarray(cut(photo, LIGHT_SIDE, box))
    marks = None if photo.mask is None else np.asarray(cut_mask(photo, LIGHT_SIDE, box)) / 255.0
    judged = pixels.min(2)[~_border(LIGHT_SIDE, 0.25) if marks is None else marks >= 0.5]
    return PhotoStats(
        photo=photo,
        size=size,
        box=box,
        enlarged=max(edge / side for edge, side in zip(as_size(size), largest_sides(photo.size, size), strict=True)),
        cut_off=1 - share_kept(photo.image.size, size),
        sharpness=sharpness(photo.image),
        lightest=float(np.quantile(pixels.max(2), 0.95)),
        burnt=float((judged >= WHITE).mean()) if judged.size else 0.0,
        coverage=None if marks is None else float(marks.mean()),
        lost=lost(photo, box),
        edge=_edge(photo),
        thumbnail=np.asarray(photo.image.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32),
        colours=_colours(photo, box),
    )


def sharpness(image: Image.Image) -> float | None:
    """RGB image  ->  the largest variance of the Laplacian among 4×4 parts; None for a small image.

    The sharpest part, because a soft background is no fault.
    """
    if min(image.size) < SHARPNESS_LEAST:
        return None
    gray = image.convert("L")
    gray.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.LANCZOS)
    g = np.asarray(gray, dtype=np.float32)
    edges = g[1:-1, :-2] + g[1:-1, 2:] + g[:-2, 1:-1] + g[2:, 1:-1] - 4 * g[1:-1, 1:-1]
    parts = [part for band in np.array_split(edges, 4, axis=0) for part in np.array_split(band, 4, axis=1)]
    return max(float(part.var()) for part in parts if part.size)


def lost(photo: Photo, box: Box) -> float | None:
    """The share of a photo's subject outside a box; None without a mask."""
    if photo.mask is None:
        return None
    left, top, right, bottom = box
    marks = np.asarray(photo.mask, dtype=np.float32)
    return float(1 - marks[top:bottom, left:right].sum() / marks.sum())


def image_distance(a: PhotoStats, b: PhotoStats) -> float:
    """Mean difference of two photos at 16×16 px, of 255."""
    return float(np.abs(a.thumbnail - b.thumbnail).mean())


def background_distance(a: PhotoStats, b: PhotoStats) -> float | None:
    """The share of their backgrounds' colours that two photos do not have in common; None where one has none.

    In the light that makes it the least: cameras set their exposure for each photo.
    """
    if a.colours is None or b.colours is None:
        return None
    return float(1 - np.minimum(a.colours[0], b.colours).sum(1).max())


def _edge(photo: Photo) -> float | None:
    if photo.mask is None:
        return None
    marks = np.asarray(photo.mask.resize((LIGHT_SIDE, LIGHT_SIDE), Image.Resampling.BILINEAR)) / 255.0
    return float(marks[_border(LIGHT_SIDE, 1 / LIGHT_SIDE)].mean())


def _border(side: int, share: float) -> np.ndarray:
    """(side,side) bool: whether a pixel is within this share of the side from an edge."""
    inside = np.zeros((side, side), dtype=bool)
    width = round(side * share)
    inside[width : side - width, width : side - width] = True
    return ~inside


def _colours(photo: Photo, box: Box) -> np.ndarray | None:
    """The background is what is outside the mask, or the border without one."""
    pixels = np.asarray(cut(photo, BACKGROUND_SIDE, box), dtype=np.float32)
    outside = _border(BACKGROUND_SIDE, BORDER) if photo.mask is None else np.asarray(cut_mask(photo, BACKGROUND_SIDE, box)) < 25
    if outside.mean() < BACKGROUND_LEAST:
        return None
    return np.stack([_histogram(pixels[outside] * gain) for gain in GAINS])


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """(N,3) in [0,255]  ->  (216,), sums to 1. Each pixel is shared between neighbouring bins: without that, flat
    backgrounds that hardly differ could have no bin in common."""
    positions = np.clip(pixels / 256 * BINS - 0.5, 0, BINS - 1)
    low = np.minimum(positions.astype(int), BINS - 2)
    counts = np.zeros((BINS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weights = np.where(corner, positions - low, 1 - (positions - low)).prod(axis=1)
        np.add.at(counts, tuple((low + corner).T), weights)
    return counts.ravel() / len(pixels)
