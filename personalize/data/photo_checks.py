"""What is to be said about photos before anything is trained on them, in plain words.

A finding names the photo, the value and the remedy; where nothing is wrong it states the values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from personalize.common.image_size import Size, in_words
from personalize.data.crops import Photo, largest_box
from personalize.data.decode import QUARTER_TURNS
from personalize.data.mask_coverage import MOST, mask_fault
from personalize.data.photo_stats import PhotoStats, background_distance, image_distance, lost, measure_photo

OK, NOTE, WARNING = "ok", "note", "warning"

# Thresholds, with what was measured of 13 photos of three real subjects at 512 px, and of Toyland's images.
# Mean difference at 16×16 px: a copy at another size up to 0.1, the frame moved by 2 % 1.2 to 3.4; the closest two
# different photos 30, the closest Toyland scenes that differ 6.
SAME_IMAGE = 5.0
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
SMALL_SUBJECT = 0.05  # of the crop
EDGE_IS_SUBJECT = 0.8  # of the edge: whoever fills the frame touches three of its sides at most
USUAL = (3, 5)  # photos

NAMES_SHOWN = 4

Fault = tuple[str, str]  # severity and text of a finding about one photo


@dataclass(frozen=True)
class Finding:
    """severity: "ok", "note" or "warning"; text: a plain sentence or two; path: the photo's, "" for all together."""

    severity: str
    text: str
    path: str = ""


@dataclass(frozen=True)
class Report:
    """size, crop: of the training; stats: of the photos in their order; each: the findings of each, the first of them with
    what was measured; together: the findings about all photos."""

    size: int
    crop: str
    stats: tuple[PhotoStats, ...]
    each: tuple[tuple[Finding, ...], ...]
    together: tuple[Finding, ...]

    @property
    def keeps_shape(self) -> bool:
        return not isinstance(self.stats[0].size, int)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them: photo by photo, then those about all together."""
        return (*(finding for findings in self.each for finding in findings), *self.together)


def examine_photos(
    photos: Sequence[Photo], size: int, *, crop: str = "center", sizes: Sequence[Size] = (), known: Sequence[Finding] = ()
) -> Report:
    """Photos, the side in px they are trained at, their crop  ->  Report. A random crop is judged by its middle.

    sizes: of each, where they keep their shape. known: findings about all photos that were made before, such as files that
    could not be used.
    """
    stats = tuple(measure_photo(photo, own, crop) for photo, own in zip(photos, sizes or [size] * len(photos), strict=True))
    each = tuple(
        (*(finding for check in (_measured, *SIZED, *UNSIZED) for finding in _check(check, stat)), *_copy(stat, stats[:k]))
        for k, stat in enumerate(stats)
    )
    return Report(size, crop, stats, each, (_number(stats), *_sizes(stats), *_masks(stats, crop), *_same_place(stats), *known))


def notices(photos: Sequence[Photo]) -> list[str]:
    """The findings that hold at any size and crop of the training, as sentences; of many alike, the first few."""
    stats = [measure_photo(photo, 1, "center") for photo in photos]
    groups = [[finding for stat in stats for finding in _check(check, stat)] for check in UNSIZED]
    copies = [finding for k, stat in enumerate(stats) for finding in _copy(stat, stats[:k])]
    lines = []
    for findings in [*groups, copies, _same_place(stats)]:
        lines += [finding.text for finding in findings[:NAMES_SHOWN]]
        if len(findings) > NAMES_SHOWN:
            lines.append(f"{len(findings) - NAMES_SHOWN} more photos like that")
    return lines


def listed(names: Sequence[str]) -> str:
    """["a", "b", …]  ->  "a, b, c, d and 3 more"."""
    shown, more = ", ".join(names[:NAMES_SHOWN]), len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _measured(stat: PhotoStats) -> Fault:
    photo = stat.photo
    turned = f", turned upright (EXIF orientation {photo.orientation})" if photo.orientation != 1 else ""
    crop = f"the crop keeps {1 - stat.cut_off:.0%} of it" if stat.cut_off else "kept whole"
    crop = crop if isinstance(stat.size, int) else f"becomes {stat.size[0]}×{stat.size[1]} px, {crop}"
    subject = "" if stat.coverage is None else f", the subject is {stat.coverage:.0%} of the crop"
    return OK, f"{photo.name}: {_pixels(photo)}{turned}, {crop}{subject}"


def _few_pixels(stat: PhotoStats) -> Fault | None:
    if stat.enlarged > 1:
        return WARNING, (
            f"{stat.photo.name} is {_pixels(stat.photo)}, smaller than the {in_words(stat.size)} px it is trained at: it is "
            f"enlarged {stat.enlarged:.2g} times and looks soft. Use a larger photo; training takes this one only with "
            f"--set photos.min_size={min(stat.photo.size)}."
        )


def _much_cut_off(stat: PhotoStats) -> Fault | None:
    shape = "a square" if isinstance(stat.size, int) else "that shape"
    if stat.cut_off > MUCH_CUT_OFF and stat.lost is None:
        return NOTE, (
            f"the crop cuts {stat.cut_off:.0%} off {stat.photo.name}, {_pixels(stat.photo)}. See that the subject is whole; if "
            f"it is not, cut the photo to {shape} yourself, or put a mask beside it and use the crop 'subject'."
        )


def _subject_cut_off(stat: PhotoStats) -> Fault | None:
    if stat.lost is not None and stat.lost > SUBJECT_CUT_OFF:
        best = lost(stat.photo, largest_box(stat.photo, "subject", shape=stat.size))
        better = f"With --set photos.crop=subject it is {best:.0%}."
        remedy = better if best < stat.lost - 0.01 else "Use a photo with more room around it."
        return WARNING, f"the crop cuts {stat.lost:.0%} of the subject off {stat.photo.name}. {remedy}"


def _small_subject(stat: PhotoStats) -> Fault | None:
    if stat.coverage is not None and stat.coverage < SMALL_SUBJECT and not mask_fault(stat.photo):
        return WARNING, (
            f"the subject is only {stat.coverage:.1%} of the crop of {stat.photo.name}: few pixels to learn from. Cut the "
            f"photo down to it, or take one from nearer."
        )


def _no_background(stat: PhotoStats) -> Fault | None:
    if stat.coverage is not None and stat.coverage > MOST and not mask_fault(stat.photo):
        return (
            NOTE,
            f"the mask of {stat.photo.name} marks {stat.coverage:.0%} of the crop as the subject: it sets nothing aside",
        )


def _inverted(stat: PhotoStats) -> Fault | None:
    if stat.edge is not None and stat.edge >= EDGE_IS_SUBJECT and stat.coverage <= MOST and not mask_fault(stat.photo):
        return WARNING, (
            f"the mask of {stat.photo.name} is white along {stat.edge:.0%} of the photo's edge, as if it were inverted. White "
            f"marks the subject."
        )


def _useless_mask(stat: PhotoStats) -> Fault | None:
    if fault := mask_fault(stat.photo):
        return WARNING, (
            f"{fault}: where training uses masks it refuses this one. White marks the subject; make it anew, or take it out."
        )


def _turned_mask(stat: PhotoStats) -> Fault | None:
    """Where the size of a mask cannot tell whether it was made of the photo as stored or as it is seen."""
    photo = stat.photo
    sizes_tell = photo.orientation in QUARTER_TURNS and photo.size[0] != photo.size[1]
    if photo.mask_sha256 is not None and photo.orientation != 1 and not sizes_tell:
        return NOTE, (
            f"{photo.name} and its mask were turned upright by the photo's EXIF orientation: see that the mask lies right"
        )


def _transparent(stat: PhotoStats) -> Fault | None:
    if stat.photo.mask is not None and stat.photo.mask_sha256 is None:
        return NOTE, f"transparent parts of {stat.photo.name} were put on white; what is not transparent is its mask"


def _blurred(stat: PhotoStats) -> Fault | None:
    if stat.sharpness is not None and stat.sharpness < BLURRED:
        return WARNING, (
            f"nothing is sharp in {stat.photo.name} (sharpness {stat.sharpness:.0f}; photos in focus have over {BLURRED:.0f}). "
            f"The model will learn the blur too; leave it out."
        )


def _dark(stat: PhotoStats) -> Fault | None:
    if stat.lightest < DARK:
        return WARNING, (
            f"{stat.photo.name} is very dark: 95% of it is below {stat.lightest:.0f} of 255. Lighten it, or use another."
        )


def _burnt(stat: PhotoStats) -> Fault | None:
    share, name = f"{stat.burnt:.0%}", stat.photo.name
    if stat.burnt <= BURNT:
        return None
    if stat.photo.mask is None:
        return NOTE, f"{share} of the middle of {name} is pure white: if that is the subject, use another photo"
    return (
        WARNING,
        f"{share} of the subject of {name} is pure white: nothing can be learned there. Use a photo with less light.",
    )


SIZED = (_few_pixels, _much_cut_off, _subject_cut_off, _small_subject, _no_background, _inverted, _turned_mask)
UNSIZED = (
    _transparent,
    _useless_mask,
    _blurred,
    _dark,
    _burnt,
)  # do not depend on the size and the crop of the training, or hardly


def _check(check: Callable[[PhotoStats], Fault | None], stat: PhotoStats) -> list[Finding]:
    """What one check finds about a photo: nothing or one thing."""
    fault = check(stat)
    return [Finding(*fault, stat.photo.path)] if fault else []


def _copy(stat: PhotoStats, earlier: Sequence[PhotoStats]) -> list[Finding]:
    """A warning where a photo shows what an earlier one does."""
    same = next((other.photo for other in earlier if _alike(other, stat)), None)
    if same is None:
        return []
    likeness = "the same file" if same.sha256 == stat.photo.sha256 else "almost the same image"
    text = f"{same.name} and {stat.photo.name} are {likeness}: it counts twice in training. Take one out."
    return [Finding(WARNING, text, stat.photo.path)]


def _alike(a: PhotoStats, b: PhotoStats) -> bool:
    return a.photo.sha256 == b.photo.sha256 or image_distance(a, b) < SAME_IMAGE


def _number(stats: Sequence[PhotoStats]) -> Finding:
    count, (least, most) = len(stats), USUAL
    if count < least:
        photos = "1 photo is" if count == 1 else f"{count} photos are"
        return Finding(WARNING, f"{photos} few: take {least} to {most}, from several sides and in several places.")
    more = ", more are fine" if count > most else ""
    return Finding(OK, f"{count} photos: {least} to {most} are usual{more}")


def _sizes(stats: Sequence[PhotoStats]) -> list[Finding]:
    """How many photos are of which size, where they keep their shape."""
    counts = Counter(stat.size for stat in stats if not isinstance(stat.size, int))
    each = ", ".join(f"{width}×{height} ({count})" for (width, height), count in sorted(counts.items()))
    return [Finding(OK, f"they keep their shape, in {len(counts)} size{'s'[: len(counts) > 1]}: {each}")] if counts else []


def _masks(stats: Sequence[PhotoStats], crop: str) -> list[Finding]:
    """Findings where only some photos have masks, or none has."""
    without = [stat.photo.name for stat in stats if stat.photo.mask is None]
    if crop == "subject" and len(without) == len(stats):
        text = "no photo has a mask, so the crop 'subject' is the middle. Put masks beside the photos, such as a.mask.png."
        return [Finding(WARNING, text)]
    if without and len(without) < len(stats):
        return [Finding(NOTE, f"no mask for {listed(without)}: of these, the whole image counts as the subject")]
    return []


def _same_place(stats: Sequence[PhotoStats]) -> list[Finding]:
    """At most one warning: when most pairs of photos that are no copies have backgrounds of the same colours."""
    pairs = [(a, b) for a, b in combinations(stats, 2) if not _alike(a, b)]
    compared = [(a, b, distance) for a, b in pairs if (distance := background_distance(a, b)) is not None]
    near = [(a, b) for a, b, distance in compared if distance < SAME_COLOURS]
    if len(near) <= ALIKE_PAIRS * len(compared):
        return []
    names = {stat.photo.path: stat.photo.name for pair in near for stat in pair}
    named = f"all {len(stats)} photos" if len(names) == len(stats) > 2 else listed(list(names.values()))
    masked = all(stat.photo.mask is not None for stat in stats)
    remedy = "take some elsewhere" + ", or train with --set photos.background=0" * masked
    return [Finding(WARNING, f"{named} have almost the same background: it will be learned with the subject; {remedy}.")]


def _pixels(photo: Photo) -> str:
    return f"{photo.size[0]}×{photo.size[1]} px"
