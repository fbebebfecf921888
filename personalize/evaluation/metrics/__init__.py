"""The metrics, a row each: images and photos, embedded once -> one number per image. Whoever calls one aggregates.

Scoring, summary, report, comparison and model card read this table: a new metric is a file with its function, and a row.
What tells copies of the photos (`memorization`) is no score of a run and stands beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.evaluation.image_cache import LOOK_ALIKES
from personalize.evaluation.metrics import background, diversity, foreground, similarity, toyland_truth
from personalize.evaluation.metrics.inputs import Images, Reference


@dataclass(frozen=True)
class Metric:
    """title: as reports have it; better: "higher" or "lower"; score: N images -> (N,), NaN or None where it says nothing.

    needs    the field of `Reference` without which it is not measured, or ""
    ceiling  what perfect copies of the subject would score: photos against the other photos; None where nothing says it
    truth    whether it is read back by Toyland's probe, which metrics.json keeps apart
    """

    title: str
    better: str
    needs: str
    score: Callable[[Images], Tensor | None]
    ceiling: Callable[[Reference], float | None] | None = None
    truth: bool = False


def _diversity(images: Images) -> Tensor:
    groups = list(zip(images.wanted.kinds, images.wanted.templates, strict=True))
    if images.reference.lpips:
        return diversity.pairwise(images.reference.lpips, images.pixels, groups)
    return diversity.pairwise(diversity.patch_distance, images.embedded.patches, groups)


def _first(images: Images) -> Tensor:
    """NaN for the base's class images, which are the look-alikes."""
    first = similarity.first(images.embedded, images.reference.photos, images.reference.look_alikes)
    return first.masked_fill(torch.tensor([kind == LOOK_ALIKES for kind in images.wanted.kinds]), torch.nan)


def _background(images: Images) -> Tensor | None:
    reference = images.reference
    if not reference.foreground.any():
        return None
    places = [background.where(prompt, reference.class_word) for prompt in images.wanted.plain]
    subject = background.subject_patches(images.embedded, reference.photos, reference.foreground)
    return background.clip_bg(reference.encoders, images.pixels, places, subject)


METRICS = {
    "dino": Metric(
        "DINO: same subject", "higher", "",
        lambda images: similarity.dino(images.embedded, images.reference.photos),
        lambda reference: similarity.ceiling(reference.photos.dino),
    ),
    "held_out": Metric(
        "DINO on held-out photos", "higher", "held_out",
        lambda images: similarity.dino(images.embedded, images.reference.held_out),
        lambda reference: similarity.dino(reference.held_out, reference.photos).mean().item(),
    ),
    "dino_fg": Metric(
        "DINO-fg: same subject, background apart", "higher", "foreground",
        lambda images: foreground.dino_fg(images.embedded, images.reference.photos, images.reference.foreground),
        lambda reference: foreground.ceiling(reference.photos, reference.foreground),
    ),
    "first": Metric(
        "First among look-alikes", "higher", "look_alikes",
        _first,
        lambda reference: similarity.first_ceiling(reference.photos, reference.look_alikes),
    ),
    "clip_i": Metric(
        "CLIP-I: same content", "higher", "",
        lambda images: similarity.clip_i(images.embedded, images.reference.photos),
        lambda reference: similarity.ceiling(reference.photos.clip),
    ),
    "clip_t": Metric("CLIP-T: follows the prompt", "higher", "", lambda images: similarity.clip_t(images.embedded)),
    "clip_bg": Metric("CLIP-bg: follows the prompt's place, subject apart", "higher", "foreground", _background),
    "diversity": Metric("DIV: patch distance", "higher", "", _diversity),
    **{
        f"true_{part}": Metric(part, "higher", "probe", lambda images, part=part: images.adherence[part], truth=True)
        for part in toyland_truth.SCORED
    },
    "identity_error": Metric(
        "identity error", "lower", "probe",
        lambda images: toyland_truth.identity_error(images.errors),
        truth=True,
    ),
    **{
        f"off_{part}": Metric(f"{part} off", "lower", "probe", lambda images, part=part: images.errors.get(part), truth=True)
        for part in toyland_truth.PARTS
    },
}  # fmt: skip


def measured(reference: Reference) -> dict[str, Metric]:
    """The metrics that these photos, masks and probe allow."""
    return {key: metric for key, metric in METRICS.items() if not metric.needs or getattr(reference, metric.needs) is not None}


def ceilings(reference: Reference) -> dict[str, float | None]:
    """What perfect copies of the subject would score, by metric."""
    return {key: metric.ceiling(reference) for key, metric in measured(reference).items() if metric.ceiling}
