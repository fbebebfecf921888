"""The findings about photos as an HTML page: each photo with its crop framed, what training sees of it, and its findings."""

from PIL import Image, ImageChops, ImageFilter

from personalize.common.html import LARGEST, render
from personalize.data.crops import binary_mask, cut
from personalize.data.photo_checks import NOTE, OK, WARNING, Finding, Report
from personalize.data.photo_stats import PhotoStats

SHOWN = 60  # photos whose images are in the page; of more, only the findings are
MARKS = {OK: "good", NOTE: "info", WARNING: "warn"}
CROP_PLACES = {"center": "the middle", "subject": "around the subject", "random": "the middle; training cuts at random places"}
INK, OUTLINE = (26, 28, 34), (40, 215, 120)


def photo_page(report: Report) -> str:
    """A report  ->  the page, which holds its images and loads nothing."""
    return render(
        "data/photo_page.html.j2",
        count=len(report.stats),
        size=report.size,
        sizes=f"{report.size}×{report.size} px" + ", each in its own shape of that area" * report.keeps_shape,
        place=CROP_PLACES[report.crop],
        has_masks=any(stats.photo.mask is not None for stats in report.stats),
        shown=SHOWN,
        verdict=_verdict(report),
        rows=[_row(*photo, k < SHOWN) for k, photo in enumerate(zip(report.stats, report.each, strict=True))],
    )


def _verdict(report: Report) -> list[tuple[str, str]]:
    """(mark, sentence): what is to be done; then what holds of all photos together, the worst first."""
    faulty = sum(any(finding.severity == WARNING for finding in findings) for findings in report.each)
    together = [finding for severity in (WARNING, NOTE) for finding in report.together if finding.severity == severity]
    if faulty:
        needs = "needs" if faulty == 1 else "need"
        first = ("warn", f"{faulty} of {len(report.stats)} photos {needs} to be replaced or put right.")
    elif any(finding.severity == WARNING for finding in together):
        first = ("info", "Each of these photos can be used as it is.")
    else:
        first = ("good", "Nothing to put right.")
    return [first, *((MARKS[finding.severity], _sentence(finding)) for finding in together)]


def _row(stats: PhotoStats, findings: tuple[Finding, ...], has_images: bool) -> dict:
    """What the template shows of a photo. `crop`: left, top, width and height of the crop in percent of the photo."""
    (width, height), (left, top, right, bottom) = stats.photo.image.size, stats.box
    measured, *faults = findings
    return {
        "name": stats.photo.name,
        "measured": measured.text.removeprefix(f"{stats.photo.name}: "),
        "faults": [(MARKS[finding.severity], _sentence(finding)) for finding in faults],
        "photo": _outlined(stats) if has_images else None,
        "seen": cut(stats.photo, stats.size, stats.box) if has_images else None,
        "aspect": round(width / height, 4),
        "crop": [100 * left / width, 100 * top / height, 100 * (right - left) / width, 100 * (bottom - top) / height],
    }


def _sentence(finding: Finding) -> str:
    """The text with a capital, unless it begins with a file's name, and a full stop."""
    first_word = finding.text.partition(" ")[0]
    is_name = bool({".", "_", "/"} & set(first_word))
    return (finding.text if is_name else finding.text[:1].upper() + finding.text[1:]).rstrip(".") + "."


def _outlined(stats: PhotoStats) -> Image.Image:
    """The whole photo, small; with a mask, the background darker and the subject's edge drawn."""
    image, mask = stats.photo.image.copy(), stats.photo.mask
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    if mask is None:
        return image
    mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    marked = Image.composite(image, Image.blend(image, Image.new("RGB", image.size, INK), 0.55), mask)
    subject = binary_mask(mask)
    marked.paste(OUTLINE, (0, 0), ImageChops.subtract(subject.filter(ImageFilter.MaxFilter(5)), subject))
    return marked
