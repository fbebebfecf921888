"""Pictures -> rows, one a picture with every metric; a value that was not measured is None.

N pictures, K photos. What rows say together, with intervals, is in `summary`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.data.crops import Photo, largest_box, square, square_mask
from personalize.evaluation import image_cache
from personalize.evaluation.encoders import Encoders
from personalize.evaluation.metrics import METRICS, diversity, foreground, memorization, toyland_truth
from personalize.evaluation.metrics.similarity import Embeddings, ceiling, embed

Row = dict  # kind, template, prompt, index, unusable, and a number or None for each metric


@dataclass(frozen=True)
class Reference:
    """What pictures of a subject are compared with.

    photos, held_out  those that it was trained on and those that it was not, embedded; held_out None where there are none
    foreground        (K,P) bool, patches of the subject; None where no photo has a mask
    lpips             the distance of DIV; None: the patch distance
    probe, reference  Toyland's truth, and the identity parameters read from the photos; None for other bases
    """

    encoders: Encoders
    photos: Embeddings
    held_out: Embeddings | None
    foreground: Tensor | None
    lpips: diversity.Lpips | None = None
    probe: toyland_truth.Probe | None = None
    reference: toyland_truth.Identity | None = None
    class_word: str = ""

    @property
    def ceilings(self) -> dict[str, float | None]:
        """What perfect copies of the subject would score: photos against the other photos."""
        top = ceiling(self.photos)
        if self.foreground is not None:
            top["dino_fg"] = foreground.ceiling(self.photos, self.foreground)
        if self.held_out is not None:
            top["held_out"] = METRICS["dino"](self.held_out, self.photos).mean().item()
        return top


def make_reference(
    encoders: Encoders, photos: Sequence[Photo], held_out: Sequence[Photo], *, size: int, crop: str, class_word: str,
    lpips: diversity.Lpips | None = None, probe: toyland_truth.Probe | None = None,
) -> Reference:  # fmt: skip
    """Photos as training crops them, at `size` px, seen by the encoders; one that is there twice counts once."""
    photos = list({photo.sha256: photo for photo in photos}.values())
    marks = None
    if any(photo.mask is not None for photo in photos):
        marks = foreground.marked(encoders, [_mask(photo, size, fixed_crop(crop)) for photo in photos])
    images = image_cache.load_tensors(photo_squares(photos, size, crop))
    return Reference(
        encoders,
        embed(encoders, images),
        embed(encoders, image_cache.load_tensors(photo_squares(held_out, size, crop))) if held_out else None,
        marks,
        lpips,
        probe,
        toyland_truth.of_photos(toyland_truth.read_images(probe, images)) if probe else None,
        class_word,
    )


def photo_squares(photos: Sequence[Photo], size: int, crop: str) -> list[Image.Image]:
    """Photos as training sees them, px of the side."""
    return [square(photo, size, largest_box(photo, fixed_crop(crop))) for photo in photos]


def fixed_crop(crop: str) -> str:
    """A random crop is looked at in its middle."""
    return "center" if crop == "random" else crop


def score_images(by: Reference, sat: image_cache.ImageSet, pictures: Sequence[Image.Image], bad: dict[int, str]) -> list[Row]:
    """A sitting's N pictures, and why some cannot be used, -> N rows."""
    images = image_cache.load_tensors(pictures)
    seen = embed(by.encoders, images, sat.plain)
    columns = {name: metric(seen, by.photos) for name, metric in METRICS.items()}
    columns["nearest"] = memorization.nearest_photo(seen, by.photos)
    columns["copied"] = memorization.is_copy(seen, by.photos)
    if by.held_out is not None:
        columns["held_out"] = METRICS["dino"](seen, by.held_out)
    if by.foreground is not None:
        columns["dino_fg"] = foreground.dino_fg(seen, by.photos, by.foreground)
    distance, what = (by.lpips, images) if by.lpips else (diversity.patch_distance, seen.patches)
    columns["diversity"] = diversity.pairwise(distance, what, list(zip(sat.kinds, sat.templates, strict=True)))
    columns["photo"] = (seen.dino @ by.photos.dino.T).argmax(1)
    columns["authentic"] = memorization.authentic(seen, by.photos)
    if by.probe:
        reading = toyland_truth.read_images(by.probe, images)
        columns |= {f"true_{k}": v for k, v in toyland_truth.prompt_adherence(reading, sat.plain, by.class_word).items()}
        columns["identity_error"] = toyland_truth.identity_error(reading, by.reference, by.class_word)
    plainly = {name: [_number(v) for v in values.tolist()] for name, values in columns.items() if values is not None}
    asked = zip(sat.kinds, sat.templates, sat.jobs, strict=True)
    return [
        {"kind": kind, "template": template, "prompt": prompt, "index": number, "unusable": bad.get(k, "")}
        | {name: values[k] for name, values in plainly.items()}
        for k, (kind, template, (prompt, number)) in enumerate(asked)
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mask(photo: Photo, size: int, how: str) -> Tensor | None:
    """(1,size,size) in [0,1], cut as the photo is."""
    if photo.mask is None:
        return None
    mask = square_mask(photo, size, largest_box(photo, how))
    return torch.from_numpy(np.asarray(mask).copy())[None].float() / 255
