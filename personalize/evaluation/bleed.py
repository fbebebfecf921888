"""Bleed: do the words of a run of several subjects stay apart? Images of each word against the photos of each subject.

Images have a score against another subject's photos as against their own: DINO, and on Toyland the identity error. Beside it
stands what is no fault of the run: what the base draws of the class for the same prompts and noise, and how alike the photos of
both subjects are, whichever is nearer to the other's photos. From there to those photos among themselves bleed is a share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.evaluation import bootstrap, image_cache, scoring
from personalize.evaluation.metrics import similarity, toyland_truth
from personalize.evaluation.metrics.inputs import Images, Reference

LEAST = 0.05  # of a score between no fault of the run and the photos: below it a share would be noise
Values = dict[tuple, float]  # (template, number) of an image -> value
Row = Mapping


@dataclass(frozen=True)
class Drawn:
    """A subject: what its images are held against, and those by the base and by the run, from the same prompts and noise."""

    token: str
    reference: Reference
    base: Images
    run: Images

    @classmethod
    def of(cls, token: str, reference: Reference, base: image_cache.ImageSet, run: image_cache.ImageSet) -> "Drawn":
        images = [scoring.embed_images(reference, each, image_cache.load_images(each)[0]) for each in (base, run)]
        return cls(token, reference, *images)


def bleed_table(subjects: Sequence[Drawn]) -> dict:
    """Every word against every subject's photos -> {pairs: a row each, and the pair of the largest share: word, photos, share}.

    A row has word and photos (tokens), score, low and high, base, apart (photos of the first; None for one's own), top (photos
    of the second among themselves), and share, share_low and share_high, which are None where there is no scale. truth: the
    same of the identity error, where all photos were read.
    """
    pairs = [_pair(one, other) for one in subjects for other in subjects]
    between = [pair for pair in pairs if pair["word"] != pair["photos"] and pair["share"] is not None]
    worst = max(between, key=lambda pair: pair["share"], default={})
    return {name: worst.get(name) for name in ("word", "photos", "share", "share_low", "share_high")} | {"pairs": pairs}


def shares(values: Values, base: Values, *, apart: float | None, top: float) -> Values:
    """Images -> how far each is on the way from what is no fault of the run, 0, to the photos, 1; {} for a way below LEAST.

    apart: None for a subject's own photos, to which the way begins at the base.
    """
    keys = [key for key in values if key in base]
    floor = bootstrap.mean([base[key] for key in keys], [key[:-1] for key in keys])
    if floor is None:
        return {}
    nearer = apart is not None and (apart - floor) * (top - floor) > 0
    room = top - (apart if nearer else floor)
    if abs(room) < LEAST or room * (top - floor) < 0:
        return {}
    return {key: (values[key] - (apart if nearer else base[key])) / room for key in keys}


def others_of(rows: Sequence[dict], images: Images, references: Sequence[Reference]) -> list[dict]:
    """Rows of images, each with its mean cosines with the photos of every subject."""
    cosines = torch.stack([similarity.dino(images.embedded, each.photos) for each in references], 1).tolist()
    return [row | {"others": each} for row, each in zip(rows, cosines, strict=True)]


def bleed_of_rows(rows: Sequence[Row], base: Sequence[Row], k: int, references: Sequence[Reference]) -> dict[int, Values]:
    """What `others_of` gave of subject k, by the run and by the base -> the other subjects, and `shares` of their photos."""

    def towards(scored: Sequence[Row], kind: str, other: int) -> Values:
        return {(row["template"], row["index"]): row["others"][other] for row in scored if row["kind"] == kind}

    return {
        other: shares(
            towards(rows, "subject", other),
            towards(base, "base", other),
            apart=_apart(references[k], references[other]),
            top=_top(references[other]),
        )
        for other in range(len(references))
        if other != k
    }


def _pair(one: Drawn, other: Drawn) -> dict:
    own, at = one.token == other.token, other.reference
    by_run, by_base = (_keyed(each, similarity.dino(each.embedded, at.photos)) for each in (one.run, one.base))
    apart = None if own else _apart(one.reference, at)
    pair = {"word": one.token, "photos": other.token, **_cell(by_run, by_base, apart=apart, top=_top(at))}
    if one.reference.reading is None or at.reading is None:
        return pair | {"truth": None}
    by_run, by_base = (_keyed(each, _errors(each.reading, at)) for each in (one.run, one.base))
    apart = None if own else _errors(one.reference.reading, at).mean().item()
    return pair | {"truth": _cell(by_run, by_base, apart=apart, top=_errors(at.reading, at).mean().item())}


def _cell(values: Values, base: Values, *, apart: float | None, top: float) -> dict:
    score, way = _interval(values), _interval(shares(values, base, apart=apart, top=top))
    bounds = {"share": way and way.mean, "share_low": way and way.low, "share_high": way and way.high}
    floor = _interval(base)
    return {"score": score.mean, "low": score.low, "high": score.high, "base": floor.mean, "apart": apart, "top": top, **bounds}


def _interval(values: Values) -> bootstrap.Interval | None:
    return bootstrap.bootstrap_interval([*values.values()], [key[:-1] for key in values])


def _keyed(images: Images, values: Tensor) -> Values:
    """Those of the subject's prompts, without class images."""
    wanted = images.wanted
    rows = zip(wanted.kinds, wanted.templates, wanted.jobs, values.tolist(), strict=True)
    return {(template, number): value for kind, template, (_, number), value in rows if kind in ("subject", "base")}


def _apart(one: Reference, other: Reference) -> float:
    return similarity.dino(one.photos, other.photos).mean().item()


def _top(reference: Reference) -> float:
    """1 for a single photo, as for the drift of class images."""
    top = similarity.ceiling(reference.photos.dino)
    return 1.0 if top is None else top


def _errors(reading: toyland_truth.Reading, at: Reference) -> Tensor:
    return toyland_truth.identity_error(toyland_truth.errors(reading, at.identity, at.class_word))
