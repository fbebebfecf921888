"""A folder of photos, a list of files, or an `hf:` data set  ->  checked, upright RGB pictures.

Everything that can be wrong with a photo is found here, before any training: what cannot be used is a
`UserError` that names the file, and what can be used but should be known is a notice in plain words.
Decoding, cropping, tensors and batches are in `crops`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from personalize.crops import Photo, crop_box, decode, square
from personalize.errors import UserError

JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})
HEIF_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".hif"})
SUFFIXES = JPEG_SUFFIXES | HEIF_SUFFIXES | {".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
ACCEPTED = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF, and HEIC with pillow-heif"

# Files that belong beside photos, or that systems leave there: skipped without a word.
SIDECARS = frozenset(
    {".txt", ".caption", ".toml", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md", ".xmp", ".aae", ".safetensors"}
)
LEFTOVERS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__"})

# Mean difference of the 16×16 RGB pictures, of 255. Measured on 13 photos: a copy at another size up to 0.1, the
# frame moved by 2 % 1.2 to 3.4; the closest two different photos 30, the closest Toyland scenes that differ 6.
SAME_PICTURE = 5.0
# Variance of the Laplacian in the sharpest of 4×4 parts at 512 px. Measured on 13 photos: 240 to 9400 as they
# are, 3 to 39 after a Gaussian blur of 2 px. The sharpest part, because a soft background is no fault.
BLURRED = 40.0
BLUR_MIN_SIDE = 256
NAMES_SHOWN = 4

CELL = 224  # px: side of each of the two pictures of a photo on the preview sheet
GAP = 12
LINE = 22
FRAME = (255, 45, 85)


def load(source: str | Path | Sequence[str | Path], *, min_size: int) -> tuple[list[Photo], list[str]]:
    """A folder, a file, a list of files or "hf:…"  ->  (photos in a fixed order, notices for the user).

    `min_size` is the least number of pixels of the short side. "hf:owner/name" and "hf:owner/name/config" are
    data sets of the Hub (split "train"); "hf:" before an existing folder reads it as an imagefolder.
    Errors: `UserError` for whatever cannot be found, read, or is too small.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        photos, notices = _load_hf(source), []
    else:
        paths, notices = find(source)
        photos = [_load_file(path) for path in paths]
    _check_sizes(photos, min_size)
    return photos, notices + health(photos)


def find(source: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """A folder, a file or a list of files  ->  (paths of photos, notices about skipped files).

    A folder is read without its subfolders and sorted by name; a list keeps its order. Hidden files, sidecars
    such as captions, and what systems leave behind are skipped silently, other foreign files with a notice.
    Errors: `UserError` when the source does not exist or holds no photo.
    """
    if isinstance(source, (str, Path)):
        place = Path(source).expanduser()
        if not place.exists():
            raise UserError(f"{source} does not exist. Give a folder of photos, photo files, or hf:<owner>/<name>.")
        listed = sorted(place.iterdir(), key=lambda path: path.name) if place.is_dir() else [place]
    else:
        place, listed = None, [_named_file(path) for path in source]
    files = [path for path in listed if not path.is_dir() and not _is_leftover(path)]
    photos = [path for path in files if path.suffix.lower() in SUFFIXES]
    foreign = [path.name for path in files if path.suffix.lower() not in SUFFIXES | SIDECARS]
    if not photos:
        raise UserError(_nothing_found(place, listed, foreign))
    if not foreign:
        return photos, []
    what = "1 file that is not a photo" if len(foreign) == 1 else f"{len(foreign)} files that are not photos"
    return photos, [f"skipped {what}: {_names(foreign)}"]


def health(photos: Sequence[Photo]) -> list[str]:
    """Notices about photos that can be used but may not be what the user wants: transparency, copies, blur."""
    notices = []
    if clear := [photo.name for photo in photos if photo.mask is not None]:
        notices.append(f"transparent parts were put on white: {_names(clear)}")
    notices += _copies(photos)
    if blurred := [photo.name for photo in photos if _is_blurred(photo.image)]:
        remedy = "The model will learn the blur too; leave out what is out of focus."
        notices.append(f"nothing is sharp in {_names(blurred)}. {remedy}")
    return notices


def preview(photos: Sequence[Photo], size: int) -> Image.Image:
    """A sheet for the eye: each photo with its center crop framed, beside it what training at `size` px sees.

    The result is shown at its true resolution: a small `size` looks as coarse as it is.
    """
    columns = math.ceil(math.sqrt(len(photos) / 2))
    rows = math.ceil(len(photos) / columns)
    width, height = 2 * CELL + 3 * GAP, CELL + LINE + 2 * GAP
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    font = ImageFont.load_default(size=13)
    for i, photo in enumerate(photos):
        x, y = i % columns * width + GAP, i // columns * height + GAP
        framed, result = _framed(photo), _result(photo, size)
        sheet.paste(framed, (x + (CELL - framed.width) // 2, y + (CELL - framed.height) // 2))
        sheet.paste(result, (x + CELL + GAP, y))
        words = f"{_shortened(photo.name)}   {photo.size[0]}x{photo.size[1]} px, becomes {size}x{size}"
        ImageDraw.Draw(sheet).text((x, y + CELL + 4), words, fill="black", font=font)
    return sheet


def _named_file(path: str | Path) -> Path:
    """A file the user named one by one: unlike what a folder happens to hold, it must exist."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder within a list of files. Give one folder, or photo files only.")
    if not path.exists():
        raise UserError(f"{path} does not exist. Check the name of this photo.")
    return path


def _is_leftover(path: Path) -> bool:
    return path.name.startswith((".", "~$")) or path.name.lower() in LEFTOVERS


def _nothing_found(place: Path | None, listed: Sequence[Path], foreign: Sequence[str]) -> str:
    """The message for a source without photos; it says what is there instead."""
    where = "the list of photos is empty or has none" if place is None else f"no photos in {place}"
    there = f" There is {_names(foreign)}." if foreign else ""
    folders = [path.name for path in listed if path.is_dir() and not _is_leftover(path)]
    if folders:
        there += f" Subfolders are not searched; name the one you mean: {_names(folders)}."
    return f"{where}.{there} Photos are {ACCEPTED}."


def _load_file(path: Path) -> Photo:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). Check that it is there and yours.") from error
    return _photo(data, str(path), caption=_caption(path))


def _photo(data: bytes, where: str, *, caption: str | None) -> Photo:
    image, mask, size = decode(data, where)
    return Photo(where, image, hashlib.sha256(data).hexdigest(), caption, size, mask)


def _caption(photo: Path) -> str | None:
    """The words of `a.txt` beside `a.jpg`, on one line; None without such a file or when it is empty."""
    beside = photo.with_suffix(".txt")
    if not beside.is_file():
        return None
    return " ".join(beside.read_text(encoding="utf-8-sig", errors="replace").split()) or None


def _load_hf(source: str) -> list[Photo]:
    """The photos of a `datasets` data set. The files' own bytes are decoded here, so that they get the same
    checks, and the same sha256, as in a folder."""
    rows = _open_dataset(source)
    column = next((name for name, kind in rows.features.items() if type(kind).__name__ == "Image"), None)
    if column is None or not len(rows):
        held = f"columns {_names(list(rows.features))}" if len(rows) else "no rows"
        raise UserError(f"{source} has no pictures in its train split ({held}). Name a data set of pictures.")
    rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    photos = []
    for i, row in enumerate(rows):
        picture, text = row[column], row.get("text")
        if picture is None:
            raise UserError(f"{source}[{i}] has no picture in its column {column!r}. Remove that row.")
        data = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
        photos.append(_photo(data, f"{source}[{i}]", caption=text.strip() or None if isinstance(text, str) else None))
    return photos


def _open_dataset(source: str):
    """ "hf:…"  ->  `datasets.Dataset` of its train split. Code from the Hub is never run."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets.") from error
    name = source.removeprefix("hf:").rstrip("/")
    if not name:
        raise UserError(f"{source} names no data set. Write hf:<owner>/<name>/<config>, or hf:<folder>.")
    folder = Path(name).expanduser()
    owner_name, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    try:
        if folder.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        return datasets.load_dataset(owner_name, config, split="train")
    except Exception as error:  # the Hub, the network, the cache and the data set can each fail in their own way
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{source} could not be loaded: {why}. Check the id (hf:<owner>/<name>/<config>) and the network; with "
            f"HF_HUB_OFFLINE=1 only what was downloaded before is found. Or give a local folder of photos."
        ) from error


def _check_sizes(photos: Sequence[Photo], min_size: int) -> None:
    small = [photo for photo in photos if min(photo.size) < min_size]
    if not small:
        return
    least = min(small, key=lambda photo: min(photo.size))
    others = "" if len(small) == 1 else f" ({len(small) - 1} more too)"
    raise UserError(
        f"{least.path} is {least.size[0]}×{least.size[1]} px, smaller than the {min_size} px this base trains at"
        f"{others}. Use a larger photo, or --set photos.min_size={min(least.size)}."
    )


def _copies(photos: Sequence[Photo]) -> list[str]:
    """Notices about files that are the same, or that show almost the same picture."""
    signatures = [_signature(photo.image) for photo in photos]
    pairs = []
    for (a, of_a), (b, of_b) in combinations(zip(photos, signatures, strict=True), 2):
        if a.sha256 == b.sha256:
            pairs.append(f"{a.name} and {b.name} are the same file")
        elif np.abs(of_a - of_b).mean() < SAME_PICTURE:
            pairs.append(f"{a.name} and {b.name} are almost the same picture")
    more = [f"{len(pairs) - NAMES_SHOWN} more pairs are the same or almost"] if len(pairs) > NAMES_SHOWN else []
    return [f"{pair}: it counts twice in training" for pair in pairs[:NAMES_SHOWN]] + more


def _signature(image: Image.Image) -> np.ndarray:
    """(16,16,3) in [0,255]: what is left of a picture at 16×16; colours too, as flat pictures differ by them."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32)


def _is_blurred(image: Image.Image) -> bool:
    """Whether no part of the picture is sharp. Pictures under 256 px are not judged."""
    if min(image.size) < BLUR_MIN_SIDE:
        return False
    gray = image.convert("L")
    gray.thumbnail((512, 512), Image.Resampling.LANCZOS)
    g = np.asarray(gray, dtype=np.float32)
    edges = g[1:-1, :-2] + g[1:-1, 2:] + g[:-2, 1:-1] + g[2:, 1:-1] - 4 * g[1:-1, 1:-1]
    parts = [part for band in np.array_split(edges, 4, axis=0) for part in np.array_split(band, 4, axis=1)]
    return max(float(part.var()) for part in parts if part.size) < BLURRED


def _names(names: Sequence[str]) -> str:
    """["a", "b", …]  ->  "a, b, c, d and 3 more"."""
    shown, more = ", ".join(names[:NAMES_SHOWN]), len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _framed(photo: Photo) -> Image.Image:
    """The whole photo within CELL × CELL, the outside of its crop faded and the crop framed."""
    scale = CELL / max(photo.image.size)
    small = photo.image.resize(tuple(max(1, round(s * scale)) for s in photo.image.size), Image.Resampling.LANCZOS)
    box = crop_box(small.size, min(small.size))
    faded = Image.blend(small, Image.new("RGB", small.size, "white"), 0.6)
    faded.paste(small.crop(box), box[:2])
    ImageDraw.Draw(faded).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=FRAME, width=2)
    return faded


def _result(photo: Photo, size: int) -> Image.Image:
    """What training sees, at CELL × CELL; enlarged without smoothing."""
    seen = square(photo, size, crop_box(photo.image.size, min(photo.image.size)))
    return seen.resize((CELL, CELL), Image.Resampling.NEAREST if size < CELL else Image.Resampling.LANCZOS)


def _shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}...{name[-most // 2 :]}"
