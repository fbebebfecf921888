"""`personalize photos`: the doctor. What is wrong with these photos, and what training will see of them? No model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.files import writing
from personalize.common.terminal import SILENT, Terminal
from personalize.data import photo_checks, photo_page
from personalize.data.crops import CROPS, Photo
from personalize.data.photo_checks import NOTE, OK, WARNING, Finding
from personalize.data.photos import find_photos, is_data_set, load_photos, read_photo


@dataclass(frozen=True)
class PhotosResult:
    """findings: of each photo, then of all together; sheet: the page that shows them."""

    findings: tuple[Finding, ...]
    sheet: Path


def run(
    source: str | Path | Sequence[str | Path], *, size: int, out: Path, crop: str = "center", screen: Terminal = SILENT
) -> PhotosResult:
    """Examine photos as they would be trained at `size` px, say what is found, and draw it on a page: the PNG `out`.

    A file that cannot be used is a finding and the others are examined. Errors: `UserError` for a source without
    any photo that can be used, an unknown crop, and an `out` that is a folder.
    """
    out = Path(out)
    if crop not in CROPS:
        raise UserError(f"unknown crop {crop!r}{nearest(crop, CROPS)}. Crops: {', '.join(CROPS)}.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the file that the page is written to, such as {out / 'photos.png'}.")
    photos, troubles = _gathered(source)
    report = photo_checks.check_photos(photos, size, how=crop, known=troubles)
    for finding in report.findings:
        screen.say(f"{finding.severity:7}  {finding.text}")
    if all(finding.severity == OK for finding in report.findings):
        screen.say("nothing to put right")
    with writing(out) as temporary:
        photo_page.page(report).save(temporary, format="PNG")
    return PhotosResult(report.findings, out)


def _gathered(source: str | Path | Sequence[str | Path]) -> tuple[list[Photo], list[Finding]]:
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
