"""`personalize photos`: what is wrong with photos, and what training will see of them. Only captions and masks need weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personalize.commands.photo_masks import add_masks
from personalize.common.errors import UserError, nearest
from personalize.common.files import writing
from personalize.common.image_size import Size, require_multiple
from personalize.common.terminal import SILENT, Terminal
from personalize.data.buckets import SHAPES, sizes_of
from personalize.data.captions import write_caption
from personalize.data.crops import CROPS, Photo, cut, fixed_box
from personalize.data.photo_checks import NOTE, OK, WARNING, Finding, examine_photos
from personalize.data.photo_page import photo_page
from personalize.data.photos import find_photos, is_data_set, load_photos, read_photo
from personalize.evaluation.captioner import captioner_of
from personalize.models.locate import base_downscale, base_size


@dataclass(frozen=True)
class PhotosResult:
    """findings: of each photo, then of all together; page: the HTML file that shows them; unusable: files that training
    would refuse; captions: those that were written, by the path of their file.
    """

    findings: tuple[Finding, ...]
    page: Path
    unusable: int = 0
    captions: dict[str, str] = field(default_factory=dict)


def check_photos(
    source: str | Path | Sequence[str | Path],
    *,
    size: int = 0,
    base: str = "toyland",
    crop: str = "center",
    shape: str = "square",
    out: str | Path = "photos.html",
    mask: str = "",
    caption: bool = False,
    class_word: str = "",
    captioner: str | Path = "",
    screen: Terminal = SILENT,
) -> PhotosResult:
    """Examine photos as they would be trained at `size` px (0: what `base` trains at), and write the page `out`.

    shape: of photos.shape; the buckets are in steps of what `base` needs.

    A file that cannot be used is a finding, and the others are examined. caption: one is written beside each photo that has
    none, by `captioner`, a folder of CLIP, BLIP or Florence-2, or by the base's CLIP. mask: how photos without a mask get one,
    in masks/ beside them: "word:dog", where `base` attends to this word, or the path of U²-Net or IS-Net, an ONNX file.
    Errors: `UserError` for a source without any photo that can be used, an unknown crop or shape, an `out` that is no HTML
    file, a base, captioner or mask model that cannot be found or used.
    """
    out = Path(out)
    if caption:
        _require_captionable(source, class_word)
    elif class_word or captioner:
        raise UserError("--class and --captioner are for captions, which --caption writes. Give it too, or leave them out.")
    _require_options(out, crop, shape)
    if mask and is_data_set(source):
        raise UserError(f"masks are written beside photo files, and {source} has none. Give a folder of photos.")
    size = size or base_size(base, screen.say)
    photos, known = _usable_photos(source)
    photos, of_masks = add_masks(photos, mask, base=base, screen=screen) if mask else (photos, [])
    sizes = _bucket_sizes(photos, size, base) if shape == "buckets" else []
    report = examine_photos(photos, size, crop=crop, sizes=sizes, known=[*known, *of_masks])
    for finding in report.findings:
        screen.say(f"{finding.severity:7}  {finding.text}")
    if all(finding.severity == OK for finding in report.findings):
        screen.say("nothing to put right")
    with writing(out) as temporary:
        temporary.write_text(photo_page(report), encoding="utf-8", errors="replace")  # file names may be no Unicode
    written = _write_captions(photos, size, crop, base, class_word, captioner, screen) if caption else {}
    return PhotosResult(report.findings, out, sum(finding.severity == WARNING for finding in known), written)


def _require_options(out: Path, crop: str, shape: str) -> None:
    if crop not in CROPS:
        raise UserError(f"unknown crop {crop!r}{nearest(crop, CROPS)}. Crops: {', '.join(CROPS)}.")
    if shape not in SHAPES:
        raise UserError(f"unknown shape {shape!r}{nearest(shape, SHAPES)}. Shapes: {', '.join(SHAPES)}.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the file that the page is written to, such as {out / 'photos.html'}.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} is no name for the page, which is HTML. Give --out {out.with_suffix('.html')}.")


def _require_captionable(source: str | Path | Sequence[str | Path], class_word: str) -> None:
    if is_data_set(source):
        raise UserError(f"{source} is a data set, and captions are written beside photo files. Give a folder of photos.")
    if not class_word.strip():
        raise UserError("what do the photos show? Give its class, as in: personalize photos PHOTOS --caption --class dog")


def _write_captions(
    photos: Sequence[Photo], size: int, crop: str, base: str, class_word: str, captioner: str | Path, screen: Terminal
) -> dict[str, str]:
    """A file beside each photo that has no caption; what is written is said."""
    bare, written = [photo for photo in photos if photo.caption is None], {}
    texts = captioner_of(base, class_word, captioner)([cut(p, size, fixed_box(p, crop)) for p in bare]) if bare else []
    for photo, text in zip(bare, texts, strict=True):
        path = write_caption(Path(photo.path), text, others=[other.name for other in photos])
        screen.say(f"{photo.name}: {text!r}, in {path.name}" if path else f"{photo.name} has an empty caption, which stays")
        written |= {str(path): text} if path else {}
    if kept := len(photos) - len(bare):
        screen.say(f"{kept} {'photo has a caption, which stays' if kept == 1 else 'photos have captions, which stay'}")
    if written:
        screen.say(
            "read them before training: each is to say what is true of the photo, and nothing of what the subject is like"
        )
    return written


def _bucket_sizes(photos: Sequence[Photo], size: int, base: str) -> list[Size]:
    """The bucket of each photo. UserError for a size that the base cannot train at."""
    step = 8 * base_downscale(base)
    require_multiple(size, step, what="size", base=base)
    return sizes_of(photos, "buckets", edge=size, step=step)


def _usable_photos(source: str | Path | Sequence[str | Path]) -> tuple[list[Photo], list[Finding]]:
    """The photos that can be used, and findings about the files that cannot."""
    if is_data_set(source):
        return load_photos(source, min_size=1)[0], []
    paths, skipped = find_photos(source)
    photos, refused = [], []
    for path in paths:
        try:
            photos.append(read_photo(path))
        except UserError as error:
            refused.append(str(error))
    if not photos:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(f"none of these photos can be used{more}: {refused[0]}")
    return photos, [*(Finding(WARNING, text) for text in refused), *(Finding(NOTE, text) for text in skipped)]
