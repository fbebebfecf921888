"""A folder of photos, a list of files, or an `hf:` data set  ->  checked, upright RGB images.

A file that cannot be used is found here, before any training: a `UserError` names it. What a user should know of a file
that can be used is a notice, from `photo_checks`. A mask file beside a photo becomes its mask and is never a photo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from personalize.common.errors import UserError
from personalize.common.files import sha256
from personalize.common.image_size import Size, as_size
from personalize.common.untrusted import read_bytes
from personalize.data.captions import read_caption
from personalize.data.crops import Photo, cut, fixed_box
from personalize.data.decode import SUBJECT_FROM, decode, decode_mask
from personalize.data.image_grid import grid
from personalize.data.photo_checks import listed, notices

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".tif", ".tiff", ".bmp", ".gif"}
)
ACCEPTED = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF, and HEIC with pillow-heif"

# Files that belong beside photos, or that systems leave there: skipped without a word.
SIDECARS = frozenset(
    {".txt", ".caption", ".toml", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md", ".xmp", ".aae", ".safetensors"}
)
LEFTOVERS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__"})

# Beside `a.jpg`, a mask is `a.mask.png`, `a_mask.png` or `masks/a.png`, or an image of another format.
MASK_STEM = re.compile(r"(.+)[._]mask", re.IGNORECASE | re.DOTALL)
MASK_FOLDER = "masks"

PREVIEW_SIDE, PREVIEW_MOST = 256, 60


def load_photos(source: str | Path | Sequence[str | Path], *, min_size: int) -> tuple[list[Photo], list[str]]:
    """A folder, a file, a list of files or "hf:…"  ->  (photos in a fixed order, notices for the user).

    `min_size` is the least number of pixels of the short side. "hf:owner/name" and "hf:owner/name/config" are
    data sets of the Hub (split "train"); "hf:" before an existing folder reads it as an imagefolder.
    Errors: `UserError` for whatever cannot be found, read, or is too small.
    """
    if is_data_set(source):
        photos, skipped = _load_hf(source), []
    else:
        paths, skipped = find_photos(source)
        photos = [read_photo(path) for path in paths]
    _check_sizes(photos, min_size)
    return photos, skipped + notices(photos)


def is_data_set(source: str | Path | Sequence[str | Path]) -> bool:
    """Whether a source is an `hf:` data set, and not files."""
    return isinstance(source, str) and source.startswith("hf:")


def find_photos(source: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """A folder, a file or a list of files  ->  (paths of photos, notices about skipped files).

    A folder is read without its subfolders and sorted by name; a list keeps its order. Hidden files, sidecars
    such as captions, masks of photos and what systems leave behind are skipped silently, other foreign files and
    masks without a photo with a notice.
    Errors: `UserError` when the source does not exist or holds no photo.
    """
    if isinstance(source, (str, Path)):
        folder = _path(source)
        if not folder.exists():
            raise UserError(f"{source} does not exist. Give a folder of photos, photo files, or hf:<owner>/<name>.")
        listed_files = sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else [folder]
    else:
        folder, listed_files = None, [_named_file(path) for path in source]
    files = [path for path in listed_files if not path.is_dir() and not is_leftover(path)]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    foreign = [path.name for path in files if path.suffix.lower() not in SUFFIXES | SIDECARS]
    photos = [path for path in images if _masked(path) is None]
    if not photos:
        raise UserError(_nothing_found(folder, listed_files, foreign, masks=[path.name for path in images]))
    skipped = []
    if foreign:
        count = "1 file that is not a photo" if len(foreign) == 1 else f"{len(foreign)} files that are not photos"
        skipped.append(f"skipped {count}: {listed(foreign)}")
    if alone := _masks_alone(photos, images):
        masks = "the mask" if len(alone) == 1 else "the masks"
        skipped.append(f"no photo for {masks} {listed(alone)}: add the photo, or rename the file if it is a photo itself")
    return photos, skipped


def read_photo(path: Path) -> Photo:
    """One photo with the caption and the mask beside it. UserError names the file, or the mask, that cannot be used."""
    return _photo(read_bytes(path, "photo"), str(path), caption=read_caption(path), mask=_mask_beside(path))


def preview(photos: Sequence[Photo], sizes: int | Sequence[Size], *, crop: str = "center") -> Image.Image:
    """What training sees of the first photos, in a grid, each at most PREVIEW_SIDE px. sizes: of all, or of each."""
    each = [as_size(sizes)] * len(photos) if isinstance(sizes, int) else sizes
    shown = []
    for photo, size in zip(photos[:PREVIEW_MOST], each):
        small = tuple(round(edge * min(1, PREVIEW_SIDE / max(size))) for edge in size)
        shown.append(cut(photo, small, fixed_box(photo, crop, shape=size)))
    return grid(shown, columns=5)


def _path(text: str | Path) -> Path:
    """A path as it was typed. UserError for an empty one, which would be the folder one is in, and for an unknown ~user."""
    if not str(text).strip():
        raise UserError("the name of the photos is empty. Give a folder of photos, photo files, or hf:<owner>/<name>.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user here. Write the path out.") from None


def _named_file(path: str | Path) -> Path:
    """A file the user named one by one: unlike what a folder happens to hold, it must exist."""
    path = _path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder within a list of files. Give one folder, or photo files only.")
    if not path.exists():
        raise UserError(f"{path} does not exist. Check the name of this photo.")
    return path


def is_leftover(path: Path) -> bool:
    """Whether a file is hidden, or what systems leave in folders."""
    return path.name.startswith((".", "~$")) or path.name.lower() in LEFTOVERS


def _nothing_found(folder: Path | None, listed_files: Sequence[Path], foreign: Sequence[str], *, masks: Sequence[str]) -> str:
    """The message for a source without photos; it says what is there instead."""
    message = "the list of photos is empty or has none" if folder is None else f"no photos in {folder}"
    message += f". There is {listed(foreign)}." if foreign else "."
    message += f" By its name, {masks[0]} is a mask; rename it if it is a photo." if masks else ""
    subfolders = [path.name for path in listed_files if path.is_dir() and not is_leftover(path)]
    if subfolders:
        message += f" Subfolders are not searched; name the one you mean: {listed(subfolders)}."
    return f"{message} Photos are {ACCEPTED}."


def _masked(path: Path) -> str | None:
    """ "a" for `a.mask.png` and `a_mask.png`, the stem of the photo whose mask a file is by its name; None for photos."""
    match = MASK_STEM.fullmatch(path.stem)
    return match and match[1]


def _is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name, or by its folder and a photo above it."""
    above = path.parent.parent.glob("*") if path.parent.name == MASK_FOLDER else ()
    return _masked(path) is not None or any(other.stem == path.stem and other.is_file() for other in above)


def _masks_in(folder: Path) -> list[Path]:
    """The files of a folder of masks that stands beside photos."""
    inside = folder / MASK_FOLDER
    files = sorted(inside.iterdir()) if inside.is_dir() else []
    return [path for path in files if path.suffix.lower() in SUFFIXES and not is_leftover(path)]


def _masks_alone(photos: Sequence[Path], images: Sequence[Path]) -> list[str]:
    """Names of mask files whose photo is not among these."""
    stems = {(path.parent, path.stem) for path in photos}
    alone = [path.name for path in images if (stem := _masked(path)) and (path.parent, stem) not in stems]
    for folder in sorted({path.parent for path in photos}):
        stems_here = {path.stem for path in folder.iterdir()}  # a list may name some of a folder's photos only
        alone += [f"{MASK_FOLDER}/{path.name}" for path in _masks_in(folder) if path.stem not in stems_here]
    return alone


def _mask_beside(photo: Path) -> Path | None:
    """The mask file of a photo. UserError where there are several."""
    beside = sorted(path for path in photo.parent.glob("*") if path.suffix.lower() in SUFFIXES)
    masks = [path for path in beside if _masked(path) == photo.stem]
    masks += [path for path in _masks_in(photo.parent) if path.stem == photo.stem]
    if len(masks) > 1:
        names = listed([str(path.relative_to(photo.parent)) for path in masks])
        raise UserError(f"{photo} has {len(masks)} masks: {names}. Keep one of them.")
    return masks[0] if masks else None


def _photo(data: bytes, where: str, *, caption: str | None, mask: Path | None = None) -> Photo:
    """A photo from a file's bytes; a mask file takes the place of the photo's own alpha."""
    decoded = decode(data, where)
    marks, mask_sha256 = decoded.alpha, None
    if mask is not None:
        mask_data = read_bytes(mask, "mask")
        marks, mask_sha256 = decode_mask(mask_data, str(mask), decoded, where), sha256(mask_data)
    elif marks is not None and marks.getextrema()[1] < SUBJECT_FROM:
        raise UserError(f"{where} is transparent all over: it shows no subject. Use the photo as it was, or another.")
    return Photo(where, decoded.image, sha256(data), caption, decoded.size, marks, mask_sha256, decoded.orientation)


def _load_hf(source: str) -> list[Photo]:
    """The photos of a `datasets` data set. The files' own bytes are decoded here, so that they get the same
    checks, and the same sha256, as in a folder."""
    rows = _open_dataset(source)
    column = next((name for name, kind in rows.features.items() if type(kind).__name__ == "Image"), None)
    if column is None or not len(rows):
        content = f"columns {listed(list(rows.features))}" if len(rows) else "no rows"
        raise UserError(f"{source} has no images in its train split ({content}). Name a data set of images.")
    rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    photos = []
    for i, row in enumerate(rows):
        image, text = row[column], row.get("text")
        if image is None:
            raise UserError(f"{source}[{i}] has no image in its column {column!r}. Remove that row.")
        path = Path(image["path"] or "")
        local = path.is_file()  # a data set read from a folder: its masks are rows too
        if local and _is_mask(path):
            continue
        data = image["bytes"] if image["bytes"] is not None else read_bytes(path, "photo")
        caption = text.strip() or None if isinstance(text, str) else None
        photos.append(_photo(data, f"{source}[{i}]", caption=caption, mask=_mask_beside(path) if local else None))
    if not photos:
        raise UserError(f"{source} holds masks without their photos. Name a data set of images.")
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
