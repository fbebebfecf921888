"""Masks that are made, as files beside their photos: with a soft edge, turned as the photos are, never over another file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from personalize.common.files import writing
from personalize.data.crops import Photo
from personalize.data.decode import ORIENTATION_TAG
from personalize.data.mask_coverage import mask_fault
from personalize.data.photo_checks import NOTE, WARNING, Finding, listed
from personalize.data.photos import MASK_FOLDER, SUFFIXES

FEATHER = 0.004  # of the short side: the edge's standard deviation, 2 px at 512
INVERSE = {6: 8, 8: 6}  # of EXIF orientations; the others undo themselves

# N RGB images of any sizes -> for each of them (h,w) in [0,1] of any size, 1 = subject, or None where none is seen
Find = Callable[[Sequence[Image.Image]], Iterable[np.ndarray | None]]


def make_masks(photos: Sequence[Photo], find: Find, by: str) -> tuple[list[Path], list[Finding]]:
    """Writes masks/NAME.png beside each photo that has no mask -> the photos that got one, findings about all.

    by: what `find` is, for people. A mask that `mask_fault` refuses is not written, nor one that would be another photo's too.
    """
    without = [photo for photo in photos if photo.mask is None]
    taken = [photo for photo in without if _target(Path(photo.path)).exists() or _has_twin(Path(photo.path))]
    findings = [
        Finding(
            WARNING,
            f"no mask is made for {photo.name}: {MASK_FOLDER}/{_target(Path(photo.path)).name} is there or would be of two "
            "photos. Rename the photo.",
            photo.path,
        )
        for photo in taken
    ]
    asked, made = [photo for photo in without if photo not in taken], []
    for photo, shares in zip(asked, find([photo.image for photo in asked]), strict=True):
        mask = None if shares is None else feathered(shares, photo.image.size)
        fault = f"{by} finds nothing in {photo.name}" if mask is None else mask_fault(replace(photo, mask=mask))
        if fault:
            findings.append(Finding(WARNING, f"{fault}: no mask is kept. Draw one, or use another photo.", photo.path))
            continue
        write_mask(mask, Path(photo.path), photo.orientation)
        made.append(Path(photo.path))
    if made:
        text = f"{MASK_FOLDER}/ has masks by {by} for {listed([path.name for path in made])}: see that their outlines are right"
        findings.append(Finding(NOTE, text))
    return made, findings


def feathered(shares: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """(h,w) in [0,1], (width, height) -> "L" of that size with a soft edge."""
    mask = Image.fromarray(np.rint(255 * shares).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return mask.filter(ImageFilter.GaussianBlur(FEATHER * min(size)))


def _target(path: Path) -> Path:
    return path.parent / MASK_FOLDER / f"{path.stem}.png"


def _has_twin(path: Path) -> bool:
    """Whether another photo beside this one has its name but for the suffix, and so the same mask."""
    beside = (other for other in path.parent.iterdir() if other.suffix.lower() in SUFFIXES)
    return any(other.stem == path.stem and other.name != path.name for other in beside)


def write_mask(mask: Image.Image, photo: Path, orientation: int) -> None:
    """An upright mask beside its photo, turned as the photo is stored, with the same EXIF orientation: so no reader can take
    it the other way.
    """
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    mask.getexif()[ORIENTATION_TAG] = INVERSE.get(orientation, orientation)
    stored = ImageOps.exif_transpose(mask)
    with writing(_target(photo)) as temporary:
        stored.save(temporary, exif=exif if orientation != 1 else b"")
