"""`personalize photos`: what is wrong with photos, and what training will see of them. No weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.files import writing
from personalize.common.image_size import Size, require_multiple
from personalize.common.terminal import SILENT, Terminal
from personalize.data.buckets import SHAPES, sizes_of
from personalize.data.crops import CROPS, Photo
from personalize.data.photo_checks import NOTE, OK, WARNING, Finding, examine_photos
from personalize.data.photo_page import photo_page
from personalize.data.photos import find_photos, is_data_set, load_photos, read_photo
from personalize.models.locate import base_downscale, base_size


@dataclass(frozen=True)
class PhotosResult:
    """findings: of each photo, then of all together; page: the HTML file that shows them; unusable: files that training
    would refuse.
    """

    findings: tuple[Finding, ...]
    page: Path
    unusable: int = 0


def check_photos(
    source: str | Path | Sequence[str | Path],
    *,
    size: int = 0,
    base: str = "toyland",
    crop: str = "center",
    shape: str = "square",
    out: str | Path = "photos.html",
    screen: Terminal = SILENT,
) -> PhotosResult:
    """Examine photos as they would be trained at `size` px (0: what `base` trains at), and write the page `out`.

    shape: of photos.shape; the buckets are in steps of what `base` needs.

    A file that cannot be used is a finding, and the others are examined. Errors: `UserError` for a source without
    any photo that can be used, an unknown crop or shape, an `out` that is no HTML file, and a base that cannot be found.
    """
    out = Path(out)
    if crop not in CROPS:
        raise UserError(f"unknown crop {crop!r}{nearest(crop, CROPS)}. Crops: {', '.join(CROPS)}.")
    if shape not in SHAPES:
        raise UserError(f"unknown shape {shape!r}{nearest(shape, SHAPES)}. Shapes: {', '.join(SHAPES)}.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the file that the page is written to, such as {out / 'photos.html'}.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} is no name for the page, which is HTML. Give --out {out.with_suffix('.html')}.")
    size = size or base_size(base, screen.say)
    photos, known = _usable_photos(source)
    sizes = _bucket_sizes(photos, size, base) if shape == "buckets" else []
    report = examine_photos(photos, size, crop=crop, sizes=sizes, known=known)
    for finding in report.findings:
        screen.say(f"{finding.severity:7}  {finding.text}")
    if all(finding.severity == OK for finding in report.findings):
        screen.say("nothing to put right")
    with writing(out) as temporary:
        temporary.write_text(photo_page(report), encoding="utf-8", errors="replace")  # file names may be no Unicode
    return PhotosResult(report.findings, out, sum(finding.severity == WARNING for finding in known))


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
