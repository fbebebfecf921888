"""Images -> rows, one an image with every metric; a value that was not measured is None.

N images, K photos. What rows say together, with intervals, is in `summary`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.data.crops import Photo, fixed_box, photo_squares, square_mask
from personalize.evaluation import image_cache
from personalize.evaluation.encoders import Encoders
from personalize.evaluation.metrics import diversity, foreground, measured, memorization, toyland_truth
from personalize.evaluation.metrics.inputs import Images, Reference
from personalize.evaluation.metrics.similarity import embed

Row = dict  # kind, template, prompt, index, unusable, and a number or None for each metric


def make_reference(
    encoders: Encoders, photos: Sequence[Photo], held_out: Sequence[Photo], *, size: int, crop: str, class_word: str,
    lpips: diversity.Lpips | None = None, probe: toyland_truth.Probe | None = None,
) -> Reference:  # fmt: skip
    """Photos as training crops them, at `size` px, seen by the encoders; one that is there twice counts once."""
    photos = list({photo.sha256: photo for photo in photos}.values())
    marks = None
    if any(photo.mask is not None for photo in photos):
        marks = foreground.marked(encoders, [_mask(photo, size, crop) for photo in photos])
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


def score_images(
    reference: Reference, image_set: image_cache.ImageSet, drawn: Sequence[Image.Image], bad: dict[int, str]
) -> list[Row]:
    """The N images of a set, and why some of them cannot be used -> N rows."""
    pixels = image_cache.load_tensors(drawn)
    embedded = embed(reference.encoders, pixels, image_set.plain)
    images = Images(reference, pixels, embedded, image_set.kinds, image_set.templates, image_set.plain)
    columns = {key: metric.score(images) for key, metric in measured(reference).items()}
    columns["nearest"] = memorization.nearest_photo(embedded, reference.photos)
    columns["copied"] = memorization.is_copy(embedded, reference.photos)
    columns["photo"] = (embedded.dino @ reference.photos.dino.T).argmax(1)
    columns["authentic"] = memorization.authentic(embedded, reference.photos)
    values = {name: [_number(v) for v in column.tolist()] for name, column in columns.items() if column is not None}
    jobs = zip(image_set.kinds, image_set.templates, image_set.jobs, strict=True)
    return [
        {"kind": kind, "template": template, "prompt": prompt, "index": number, "unusable": bad.get(k, "")}
        | {name: column[k] for name, column in values.items()}
        for k, (kind, template, (prompt, number)) in enumerate(jobs)
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mask(photo: Photo, size: int, crop: str) -> Tensor | None:
    """(1,size,size) in [0,1], cut as the photo is."""
    if photo.mask is None:
        return None
    mask = square_mask(photo, size, fixed_box(photo, crop))
    return torch.from_numpy(np.asarray(mask).copy())[None].float() / 255
