"""One photo: the bytes of a file  ->  an upright sRGB picture  ->  a square crop  ->  a tensor; and their order.

Shapes: B pictures, 3 channels, H = W = size in pixels. Random crops and flips are drawn at each call from the
generator that is passed in, never once at load. Folders and data sets of photos are in `photos`.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from torch import Generator, Tensor

from personalize.core.rng import generator as seeded
from personalize.errors import UserError

# Only these decoders: Pillow's others include PostScript, which runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
# The largest phone sensors give 12 240 × 16 320; Pillow's own limit of 179 million would refuse them.
MAX_PIXELS = 200_000_000
# No base trains above 1024 px. A short side of twice that leaves room, and 30 phone photos fit in memory.
KEEP_SIDE = 2048

# Pillow's name of a decoder that may be absent -> what users call the format, what to install, suffixes, `ftyp` brands.
OPTIONAL = {
    "HEIF": ("HEIC", "pillow-heif", (".heic", ".heif", ".hif"), (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")),
    "AVIF": ("AVIF", "-U pillow", (".avif",), (b"avif", b"avis")),
}
ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})

# EXIF tag 0x0112 -> what makes the picture upright.
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

CROPS = ("center", "random")


@dataclass(frozen=True)
class Photo:
    """One upright RGB picture without metadata.

    path     as the user wrote it: "my_dog/a.jpg", or "hf:google/dreambooth/dog[3]"
    image    PIL "RGB"; photos with a short side of 4096 px and more are kept at a whole fraction of their size
    sha256   of the file's bytes: the photo's identity
    caption  the words in the `.txt` beside it, or in the data set's "text" column
    size     (width, height) in pixels of the file, once upright
    mask     PIL "L" of the same size as `image`, 255 = opaque; None where the whole picture is opaque
    """

    path: str
    image: Image.Image
    sha256: str
    caption: str | None
    size: tuple[int, int]
    mask: Image.Image | None = None

    @property
    def name(self) -> str:
        """The last part of the path: "a.jpg"."""
        return Path(self.path).name


def decode(data: bytes, where: str) -> tuple[Image.Image, Image.Image | None, tuple[int, int]]:
    """Bytes of a file, its name for messages  ->  (RGB picture, alpha "L" or None, (width, height) of the file).

    Upright, in sRGB, on white where it was transparent, without metadata; the first frame of an animation.
    A short side of twice `KEEP_SIDE` and more is reduced by a whole factor; the size returned is the file's, upright.
    Errors: `UserError` for bytes that are no picture, damaged, of more than `MAX_PIXELS`, or without a decoder.
    """
    with _strict_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except Exception as error:
            raise UserError(_unreadable(data, where, error)) from error
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise UserError(
                f"{where} says it is {size[0]}×{size[1]} px, more than the {MAX_PIXELS // 10**6} million pixels "
                f"that are read. Save a smaller copy."
            )
        try:
            image.draft(None, (KEEP_SIDE, KEEP_SIDE))
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            picture, alpha = _flatten(image)
        except Exception as error:  # Pillow's decoders raise whatever the damage leads them to
            raise UserError(_unreadable(data, where, error)) from error
    factor = max(1, min(picture.size) // KEEP_SIDE)
    alpha = None if alpha is None else _finish(alpha, factor, turn)
    swapped = turn in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8])
    return _finish(picture, factor, turn), alpha, size[::-1] if swapped else size


def crop_box(
    size_wh: tuple[int, int], side: int, how: str = "center", generator: Generator | None = None
) -> tuple[int, int, int, int]:
    """(width, height), side of a square in the same pixels  ->  (left, top, right, bottom) inside the picture.

    "center" takes the middle. "random" draws its place from `generator`, always with one number per axis, so
    that what is drawn after it does not depend on the picture's size.
    """
    assert how in CROPS, how
    room = (size_wh[0] - side, size_wh[1] - side)
    assert min(room) >= 0, f"a crop of {side} px does not fit in {size_wh}"
    if how == "center":
        left, top = room[0] // 2, room[1] // 2
    else:
        assert generator is not None, "a random crop draws from a generator"
        at = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        left, top = (int(a * (r + 1)) for a, r in zip(at, room, strict=True))
    return left, top, left + side, top + side


def square(photo: Photo, size: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A photo, the side to give it, a box in its pixels  ->  RGB picture of size × size, resized with Lanczos."""
    return photo.image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def to_tensor(
    photo: Photo, size: int, *, how: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """A photo  ->  (3,H,W) float32 in [-1,1] with H = W = size.

    The largest square of the photo, resized with Lanczos: the same as resizing the short side to `size` and
    cropping, without the large picture between. `flip` mirrors left to right in half of the calls.
    """
    side = min(photo.image.size)
    image = square(photo, size, crop_box(photo.image.size, side, how, generator))
    if flip:
        assert generator is not None, "a flip draws from a generator"
        if torch.rand((), generator=generator, dtype=torch.float64).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def batch(
    photos: Sequence[Photo], size: int, *, how: str = "center", flip: bool = False, generator: Generator | None = None
) -> Tensor:
    """B photos  ->  (B,3,H,W) float32 in [-1,1]; one generator serves them in turn."""
    return torch.stack([to_tensor(photo, size, how=how, flip=flip, generator=generator) for photo in photos])


def order(count: int, batch: int, step: int, *, seed: int, purpose: str = "subject") -> list[int]:
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
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
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
        return f"{where} is no picture in a format that is read, whatever its name. Convert it to JPEG, or take it out."
    return f"{where} is damaged: {str(error) or type(error).__name__}. Copy the photo again, or take it out."


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1 to 8; 1 when the metadata is broken, which is no reason to refuse a picture."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1


def _flatten(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A decoded picture of any mode  ->  (sRGB on white, alpha "L" or None when all is opaque)."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode == "P":
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


def _finish(image: Image.Image, factor: int, turn: Image.Transpose | None) -> Image.Image:
    """Reduced, upright, and on a new picture, which carries none of the old one's metadata."""
    image = image.reduce(factor) if factor > 1 else image
    image = image.transpose(turn) if turn is not None else image
    clean = Image.new(image.mode, image.size)
    clean.paste(image)
    return clean


def _epoch(count: int, epoch: int, *, seed: int, purpose: str) -> list[int]:
    return torch.randperm(count, generator=seeded(seed, f"order/{purpose}", epoch)).tolist()
