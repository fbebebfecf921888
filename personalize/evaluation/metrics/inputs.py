"""What a metric looks at: N images of one model, and the subject's photos that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from personalize.evaluation.encoders import Encoders
from personalize.evaluation.image_cache import ImageSet
from personalize.evaluation.metrics import diversity, toyland_truth
from personalize.evaluation.metrics.similarity import Embeddings


@dataclass(frozen=True)
class Reference:
    """What images of a subject are compared with: K photos.

    photos, held_out  those that it was trained on and those that it was not, embedded; held_out None where there are none
    foreground        (K,P) bool, patches of the subject; None where no photo has a mask
    look_alikes       others of the subject's class: the base's class images; None where none were drawn
    lpips             the distance of DIV; None: the patch distance
    probe, identity   Toyland's truth, and the identity parameters read from the photos; None for other bases
    reading           the photos as that probe reads them
    """

    encoders: Encoders
    photos: Embeddings
    held_out: Embeddings | None
    foreground: Tensor | None
    lpips: diversity.Lpips | None = None
    probe: toyland_truth.Probe | None = None
    identity: toyland_truth.Identity | None = None
    class_word: str = ""
    look_alikes: Embeddings | None = None
    reading: toyland_truth.Reading | None = None


@dataclass(frozen=True)
class Images:
    """N images that are scored together. pixels (N,3,H,W) in [-1,1]; wanted: what each should show."""

    reference: Reference
    pixels: Tensor
    embedded: Embeddings
    wanted: ImageSet

    @cached_property
    def reading(self) -> toyland_truth.Reading:
        return toyland_truth.read_images(self.reference.probe, self.pixels)

    @cached_property
    def adherence(self) -> dict[str, Tensor]:
        return toyland_truth.prompt_adherence(self.reading, self.wanted.plain, self.reference.class_word)

    @cached_property
    def errors(self) -> dict[str, Tensor]:
        return toyland_truth.errors(self.reading, self.reference.identity, self.reference.class_word)
