"""What is to be said about photos before anything is trained on them, in plain words.

A finding names the photo, the value and the remedy; where nothing is wrong it states the values. `exam` measures,
`photosheet` shows a report as a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from personalize.data.crops import Photo, largest_box
from personalize.data.decode import QUARTER_TURNS
from personalize.data.photo_stats import PhotoStats, background_distance, lost, measure_photo, picture_distance

OK, NOTE, WARNING = "ok", "note", "warning"

# Thresholds, with what was measured of 13 photos of three real subjects at 512 px, and of Toyland's pictures.
# Mean difference at 16×16 px: a copy at another size up to 0.1, the frame moved by 2 % 1.2 to 3.4; the closest two
# different photos 30, the closest Toyland scenes that differ 6.
SAME_PICTURE = 5.0
# Sharpness: 240 to 9400 as they are, 3 to 39 after a Gaussian blur of 2 px.
BLURRED = 40.0
# Colours not in common: of windows of one place 0.02 to 0.52, at least 60% of the pairs below; of different places
# 0.23 to 1.00, at most 17% below. So a pair alone says nothing, and most pairs do.
SAME_COLOURS = 0.40
ALIKE_PAIRS = 0.5  # of all pairs
# Lightest: 157 to 255 as they are, 61 to 99 with an eighth of the light.
DARK = 80.0
# White share of the middle: 0 as they are, up to 0.52 with four times the light, 0.02 to 1 with eight times.
BURNT = 0.3
MUCH_CUT_OFF = 0.45  # of the photo: more than a 16:9 one loses
SUBJECT_CUT_OFF = 0.05  # of the subject
SMALL_SUBJECT, ALL_SUBJECT = 0.05, 0.98  # of the crop
EDGE_IS_SUBJECT = 0.8  # of the edge: whoever fills the frame touches three of its sides at most
USUAL = (3, 5)  # photos

NAMES_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """severity: "ok", "note" or "warning"; text: a plain sentence or two; path: the photo's, "" for all together."""

    severity: str
    text: str
    path: str = ""


@dataclass(frozen=True)
class Report:
    """size, how: of the training; exams: of the photos in their order; each: the findings of each, beginning with what
    was measured; together: those about all photos."""

    size: int
    how: str
    exams: tuple[PhotoStats, ...]
    each: tuple[tuple[Finding, ...], ...]
    together: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them: photo by photo, then those about all together."""
        return (*(finding for found in self.each for finding in found), *self.together)


def check_photos(photos: Sequence[Photo], size: int, *, how: str = "center", known: Sequence[Finding] = ()) -> Report:
    """Photos, the side in px they are trained at, their crop  ->  Report. A random crop is judged by its middle.

    known: findings about all photos that were made before, such as files that could not be used.
    """
    exams = tuple(measure_photo(photo, size, how) for photo in photos)
    checks = (_stated, *SIZED, *UNSIZED)
    each = tuple(
        tuple(finding for finding in (*(check(exam) for check in checks), copy) if finding)
        for exam, copy in zip(exams, _copies(exams), strict=True)
    )
    return Report(size, how, exams, each, (_number(exams), *_masks(exams, how), *_same_place(exams), *known))


def notices(photos: Sequence[Photo]) -> list[str]:
    """The sentences that hold at whatever size and crop the photos are trained; of many alike, the first only."""
    exams = [measure_photo(photo, 1, "center") for photo in photos]
    groups = [[finding for exam in exams if (finding := check(exam))] for check in UNSIZED]
    lines = []
    for found in [*groups, [copy for copy in _copies(exams) if copy], _same_place(exams)]:
        lines += [finding.text for finding in found[:NAMES_SHOWN]]
        if len(found) > NAMES_SHOWN:
            lines.append(f"{len(found) - NAMES_SHOWN} more photos like that")
    return lines


def listed(names: Sequence[str]) -> str:
    """["a", "b", …]  ->  "a, b, c, d and 3 more"."""
    shown, more = ", ".join(names[:NAMES_SHOWN]), len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _stated(exam: PhotoStats) -> Finding:
    photo = exam.photo
    turned = f", turned upright (EXIF orientation {photo.orientation})" if photo.orientation != 1 else ""
    kept = f"the crop keeps {1 - exam.cut_off:.0%} of it" if exam.cut_off else "kept whole"
    subject = "" if exam.coverage is None else f", the subject is {exam.coverage:.0%} of the crop"
    return Finding(OK, f"{photo.name}: {_pixels(photo)}{turned}, {kept}{subject}", photo.path)


def _few_pixels(exam: PhotoStats) -> Finding | None:
    if exam.enlarged <= 1:
        return None
    photo, least = exam.photo, min(exam.photo.size)
    return _warning(
        photo,
        f"{photo.name} is {_pixels(photo)}, smaller than the {exam.size} px it is trained at: it is enlarged "
        f"{exam.enlarged:.2g} times and looks soft. Use a larger photo; training takes this one only with "
        f"--set photos.min_size={least}.",
    )


def _much_cut_off(exam: PhotoStats) -> Finding | None:
    if exam.cut_off <= MUCH_CUT_OFF or exam.lost is not None:
        return None
    return Finding(
        NOTE,
        f"the crop cuts {exam.cut_off:.0%} off {exam.photo.name}, {_pixels(exam.photo)}. See that the subject is whole; if "
        f"it is not, cut the photo to a square yourself, or put a mask beside it and use the crop 'subject'.",
        exam.photo.path,
    )


def _subject_cut_off(exam: PhotoStats) -> Finding | None:
    if exam.lost is None or exam.lost <= SUBJECT_CUT_OFF:
        return None
    best = lost(exam.photo, largest_box(exam.photo, "subject"))
    remedy = "Use a photo with more room around it."
    if best < exam.lost - 0.01:
        remedy = f"With --set photos.crop=subject it is {best:.0%}."
    return _warning(exam.photo, f"the crop cuts {exam.lost:.0%} of the subject off {exam.photo.name}. {remedy}")


def _small_subject(exam: PhotoStats) -> Finding | None:
    if exam.coverage is None or exam.coverage >= SMALL_SUBJECT:
        return None
    return _warning(
        exam.photo,
        f"the subject is only {exam.coverage:.1%} of the crop of {exam.photo.name}: few pixels to learn from. Cut the photo "
        f"down to it, or take one from nearer.",
    )


def _no_background(exam: PhotoStats) -> Finding | None:
    if exam.coverage is None or exam.coverage <= ALL_SUBJECT:
        return None
    said = f"the mask of {exam.photo.name} marks {exam.coverage:.0%} of the crop as the subject: it sets nothing aside"
    return Finding(NOTE, said, exam.photo.path)


def _inverted(exam: PhotoStats) -> Finding | None:
    if exam.edge is None or exam.edge < EDGE_IS_SUBJECT or exam.coverage > ALL_SUBJECT:
        return None
    return _warning(
        exam.photo,
        f"the mask of {exam.photo.name} is white along {exam.edge:.0%} of the photo's edge, as if it were inverted. White "
        f"marks the subject.",
    )


def _turned_mask(exam: PhotoStats) -> Finding | None:
    """Where the size of a mask cannot tell whether it was made of the photo as stored or as it is seen."""
    photo = exam.photo
    sizes_tell = photo.orientation in QUARTER_TURNS and photo.size[0] != photo.size[1]
    if photo.mask_sha256 is None or photo.orientation == 1 or sizes_tell:
        return None
    said = f"{photo.name} and its mask were turned upright by the photo's EXIF orientation: see that the mask lies right"
    return Finding(NOTE, said, photo.path)


def _transparent(exam: PhotoStats) -> Finding | None:
    photo = exam.photo
    if photo.mask is None or photo.mask_sha256 is not None:
        return None
    said = f"transparent parts of {photo.name} were put on white; what is not transparent is its mask"
    return Finding(NOTE, said, photo.path)


def _blurred(exam: PhotoStats) -> Finding | None:
    if exam.sharpness is None or exam.sharpness >= BLURRED:
        return None
    return _warning(
        exam.photo,
        f"nothing is sharp in {exam.photo.name} (sharpness {exam.sharpness:.0f}; photos in focus have over {BLURRED:.0f}). "
        f"The model will learn the blur too; leave it out.",
    )


def _dark(exam: PhotoStats) -> Finding | None:
    if exam.lightest >= DARK:
        return None
    said = f"{exam.photo.name} is very dark: 95% of it is below {exam.lightest:.0f} of 255. Lighten it, or use another."
    return _warning(exam.photo, said)


def _burnt(exam: PhotoStats) -> Finding | None:
    if exam.burnt <= BURNT:
        return None
    if exam.photo.mask is not None:
        return _warning(
            exam.photo,
            f"{exam.burnt:.0%} of the subject of {exam.photo.name} is pure white: nothing can be learned there. Use a photo "
            f"with less light.",
        )
    said = f"{exam.burnt:.0%} of the middle of {exam.photo.name} is pure white: if that is the subject, use another photo"
    return Finding(NOTE, said, exam.photo.path)


SIZED = (_few_pixels, _much_cut_off, _subject_cut_off, _small_subject, _no_background, _inverted, _turned_mask)
UNSIZED = (_transparent, _blurred, _dark, _burnt)  # do not depend on the size and the crop of the training, or hardly


def _copies(exams: Sequence[PhotoStats]) -> list[Finding | None]:
    """For each photo, a warning where it shows what an earlier one does."""
    return [_copy(exam, exams[:k]) for k, exam in enumerate(exams)]


def _copy(exam: PhotoStats, earlier: Sequence[PhotoStats]) -> Finding | None:
    same = next((other for other in earlier if _alike(other, exam)), None)
    if same is None:
        return None
    a, b = same.photo, exam.photo
    what = "the same file" if a.sha256 == b.sha256 else "almost the same picture"
    return _warning(b, f"{a.name} and {b.name} are {what}: it counts twice in training. Take one out.")


def _alike(a: PhotoStats, b: PhotoStats) -> bool:
    return a.photo.sha256 == b.photo.sha256 or picture_distance(a, b) < SAME_PICTURE


def _number(exams: Sequence[PhotoStats]) -> Finding:
    count, (least, most) = len(exams), USUAL
    if count < least:
        photos = "1 photo is" if count == 1 else f"{count} photos are"
        return Finding(WARNING, f"{photos} few: take {least} to {most}, from several sides and in several places.")
    usual = f"{least} to {most} are usual"
    return Finding(OK, f"{count} photos: {usual}" + (", more are fine" if count > most else ""))


def _masks(exams: Sequence[PhotoStats], how: str) -> list[Finding]:
    """What is odd about having masks for some photos, or none."""
    without = [exam.photo.name for exam in exams if exam.photo.mask is None]
    if how == "subject" and len(without) == len(exams):
        told = "no photo has a mask, so the crop 'subject' is the middle. Put masks beside the photos, such as a.mask.png."
        return [Finding(WARNING, told)]
    if without and len(without) < len(exams):
        return [Finding(NOTE, f"no mask for {listed(without)}: of these, the whole picture counts as the subject")]
    return []


def _same_place(exams: Sequence[PhotoStats]) -> list[Finding]:
    """At most one warning: when most pairs of photos that are no copies have backgrounds of the same colours."""
    pairs = [(a, b) for a, b in combinations(exams, 2) if not _alike(a, b)]
    compared = [(a, b, distance) for a, b in pairs if (distance := background_distance(a, b)) is not None]
    near = [(a, b) for a, b, distance in compared if distance < SAME_COLOURS]
    if len(near) <= ALIKE_PAIRS * len(compared):
        return []
    names = {exam.photo.path: exam.photo.name for pair in near for exam in pair}
    who = f"all {len(exams)} photos" if len(names) == len(exams) > 2 else listed(list(names.values()))
    masked = all(exam.photo.mask is not None for exam in exams)
    remedy = "take some elsewhere" + ", or train with --set photos.background=0" * masked
    return [Finding(WARNING, f"{who} have almost the same background: it will be learned with the subject; {remedy}.")]


def _warning(photo: Photo, text: str) -> Finding:
    return Finding(WARNING, text, photo.path)


def _pixels(photo: Photo) -> str:
    return f"{photo.size[0]}×{photo.size[1]} px"
