"""The bytes of an image file  ->  an upright sRGB image without metadata, and its alpha.

A user's file is either read as it looks or refused with its name and a remedy; masks are read the same way.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from personalize.common.errors import UserError

# Only these decoders: Pillow's others include PostScript, which runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
# The largest phone sensors give 12 240 × 16 320; Pillow's own limit of 179 million would refuse them.
MAX_PIXELS = 200_000_000
WIDE_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})  # several bytes a value, which are held as floats
LONGEST = 65_535  # px of a side
# No base trains above 1024 px. A short side of twice that leaves room, and 30 phone photos fit in memory.
KEEP_SIDE = 2048

# Pillow's name of a decoder that may be absent -> what users call the format, what to install, suffixes, `ftyp` brands.
OPTIONAL = {
    "HEIF": ("HEIC", "pillow-heif", (".heic", ".heif", ".hif"), (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")),
    "AVIF": ("AVIF", "-U pillow", (".avif",), (b"avif", b"avis")),
}
ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})

ORIENTATION_TAG = ExifTags.Base.Orientation
QUARTER_TURNS = (5, 6, 7, 8)  # the orientations that swap width and height

SUBJECT_FROM = 128  # of 255: from here on a mask's pixel is the subject
SAME_SHAPE = 0.01  # by which the aspect ratio of a mask may differ from its photo's: what rounding a size does


class Decoded(NamedTuple):
    """What `decode` gives.

    image        RGB; where the short side has 4096 px and more, at a whole fraction of its size
    alpha        "L" of the same size, 255 = opaque; None where the whole image is opaque
    size         (width, height) in pixels of the file, once upright
    orientation  the EXIF orientation 1 to 8 that was undone; 1 where there was nothing to turn
    """

    image: Image.Image
    alpha: Image.Image | None
    size: tuple[int, int]
    orientation: int


def decode(data: bytes, where: str) -> Decoded:
    """Bytes of a file, its name for messages  ->  the image upright, in sRGB, on white where it was transparent.

    Without metadata; the first frame of an animation. A short side of twice `KEEP_SIDE` and more is reduced by a
    whole factor. Errors: `UserError` for bytes that are no image, damaged, of more than `MAX_PIXELS`, or without
    a decoder.
    """
    with _strict_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except Exception as error:
            raise UserError(_unreadable(data, where, error)) from error
        size = image.size
        most = MAX_PIXELS // 8 if image.mode in WIDE_MODES else MAX_PIXELS
        if size[0] * size[1] > most:
            raise UserError(
                f"{where} says it is {size[0]}×{size[1]} px of mode {image.mode}, more than the {most // 10**6} million "
                f"pixels that are read. Save a smaller copy, or one of 8 bits."
            )
        if max(size) > LONGEST:
            raise UserError(f"{where} is {size[0]}×{size[1]} px; sides of up to {LONGEST} px are read. Use another photo.")
        try:
            image.draft(None, (KEEP_SIDE, KEEP_SIDE))
            image.load()
            orientation = _orientation(image)
            flat, alpha = _flatten(image)
        except Exception as error:  # Pillow's decoders raise whatever the damage leads them to
            raise UserError(_unreadable(data, where, error)) from error
    factor = max(1, min(flat.size) // KEEP_SIDE)
    alpha = None if alpha is None else _finish(alpha, factor, orientation)
    return Decoded(_finish(flat, factor, orientation), alpha, _turned(size, orientation), orientation)


def decode_mask(data: bytes, where: str, photo: Decoded, photo_name: str) -> Image.Image:
    """Bytes of a mask file, its name, the photo it belongs to and its name  ->  "L" of the photo's size, 255 = subject.

    The alpha of the file where it has some, its brightness where not. A mask without an orientation of its own that
    has the size of the photo's file as stored is turned with the photo; any other of the photo's shape is scaled.
    Errors: `UserError` for a file that cannot be read, a mask of another shape, and one without any subject.
    """
    mask = decode(data, where)
    marks = mask.alpha if mask.alpha is not None else mask.image.convert("L")
    stored = _turned(photo.size, photo.orientation)
    fits, fits_stored = _same_shape(mask.size, photo.size), _same_shape(mask.size, stored)
    if mask.orientation == 1 and fits_stored and (mask.size == stored or not fits):
        marks = _finish(marks, 1, photo.orientation)
    elif not fits:
        raise UserError(
            f"{where} is {mask.size[0]}×{mask.size[1]} px, but its photo {photo_name} is {photo.size[0]}×{photo.size[1]} px. "
            f"Make the mask from this very photo, or take it out."
        )
    if (brightest := marks.getextrema()[1]) < SUBJECT_FROM:
        raise UserError(
            f"{where}, the mask of {photo_name}, shows no subject: its brightest value is {brightest} of 255. "
            f"White marks the subject; make the mask anew, or take it out."
        )
    return marks if marks.size == photo.image.size else marks.resize(photo.image.size, Image.Resampling.BILINEAR)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow with this module's pixel limit in place of its own, with damage as errors and no warnings printed.
    Its settings are global, and other libraries change them."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _formats() -> list[str]:
    """The decoders that are there; HEIF is when pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unreadable(data: bytes, where: str, error: Exception) -> str:
    """The message for bytes that Pillow refuses. The bytes decide, not the suffix: phones' HEIC is often named .jpg."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    for decoder, (kind, package, suffixes, brands) in OPTIONAL.items():
        named = not brand and where.lower().endswith(suffixes)
        if decoder not in Image.OPEN and (named or brand in brands):
            return f"{where} is {kind}, which needs a decoder: pip install {package}, or convert the photo to JPEG."
    if not data:
        return f"{where} is an empty file. Copy the photo again, or take it out."
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{where} is no image in a format that can be read, whatever its name. Convert it to JPEG, or take it out."
    return f"{where} is damaged: {str(error) or type(error).__name__}. Copy the photo again, or take it out."


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1 to 8; 1 when the metadata is broken, which is no reason to refuse an image."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) in pixels of the file as stored, to that of the upright image, and back."""
    return size[::-1] if orientation in QUARTER_TURNS else size


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) <= SAME_SHAPE


def _flatten(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A decoded image of any mode  ->  (sRGB on white, alpha "L" or None when all is opaque)."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode in ("RGBA", "P"):
        image = image.convert("RGB")
    image = _to_srgb(image, profile).convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return image, None
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white, alpha


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit integers and floats  ->  "L", scaled where `convert` would clip.

    The mode "I;16" is 0…65535. "I" and "F" do not say their range: the least usual one (1 for floats, 255, 65535)
    that holds the values is taken, and beyond those their own maximum.
    """
    values = np.asarray(image).astype(np.float32)
    values = np.where(np.isfinite(values), values, 0.0).clip(min=0)
    top = float(values.max())
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    scale = next((limit for limit in usual if top <= limit), top)
    return Image.fromarray(np.rint(values * (255.0 / scale)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours by the embedded ICC profile  ->  sRGB. A profile that is broken or of another mode is ignored."""
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _finish(image: Image.Image, factor: int, orientation: int) -> Image.Image:
    """Reduced, upright, and as a new image, which carries none of the old one's metadata."""
    image = image.reduce(factor) if factor > 1 else image
    clean = Image.new(image.mode, image.size)
    clean.paste(image)
    if orientation != 1:
        clean.getexif()[ORIENTATION_TAG] = orientation
        clean = ImageOps.exif_transpose(clean)
    return clean
