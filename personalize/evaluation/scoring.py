"""N images -> rows, one an image with every metric; a value that was not measured is None."""

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from personalize.data.crops import Crop, Photo, fixed_box, mask_tensor, photo_squares
from personalize.data.mask_coverage import mask_fault
from personalize.evaluation import image_cache
from personalize.evaluation.encoders import Encoders
from personalize.evaluation.image_cache import LOOK_ALIKES
from personalize.evaluation.metrics import diversity, foreground, measured, memorization, toyland_truth
from personalize.evaluation.metrics.inputs import Images, Reference
from personalize.evaluation.metrics.similarity import Embeddings, embed

Row = dict  # kind, template, prompt, index, unusable, and a number or None for each metric


def make_reference(
    encoders: Encoders, photos: Sequence[Photo], held_out: Sequence[Photo], *, size: int, crop: str, class_word: str,
    lpips: diversity.Lpips | None = None, probe: toyland_truth.Probe | None = None,
) -> Reference:  # fmt: skip
    """Photos as training crops them, at `size` px, seen by the encoders; one that is there twice counts once.

    A mask that `mask_fault` refuses counts as none.
    """
    photos = list({photo.sha256: photo for photo in photos}.values())
    masked = [photo.mask is not None and not mask_fault(photo) for photo in photos]
    masks = [mask_tensor([Crop(photo, fixed_box(photo, crop))], size)[0] if usable else None
             for photo, usable in zip(photos, masked, strict=True)]  # fmt: skip
    marks = foreground.marked(encoders, masks) if any(masked) else None
    images = image_cache.load_tensors(photo_squares(photos, size, crop))
    unseen = embed(encoders, image_cache.load_tensors(photo_squares(held_out, size, crop))) if held_out else None
    reading = toyland_truth.read_images(probe, images) if probe else None
    identity = toyland_truth.of_photos(reading) if probe else None
    return Reference(encoders, embed(encoders, images), unseen, marks, lpips, probe, identity, class_word, reading=reading)


def embed_images(reference: Reference, image_set: image_cache.ImageSet, loaded: Sequence[Image.Image]) -> Images:
    """The N images of a set, seen by the encoders."""
    pixels = image_cache.load_tensors(loaded)
    return Images(reference, pixels, embed(reference.encoders, pixels, image_set.plain), image_set)


def with_look_alikes(reference: Reference, images: Images, reasons: Sequence[str]) -> Reference:
    """The reference with the base's class images, those that can be used, as the subject's look-alikes."""
    rows = [
        k for k, (kind, why) in enumerate(zip(images.wanted.kinds, reasons, strict=True)) if kind == LOOK_ALIKES and not why
    ]
    dino, clip = images.embedded.dino[rows], images.embedded.clip[rows]
    return replace(reference, look_alikes=Embeddings(dino, clip) if rows else None)


def score_images(images: Images, reasons: Sequence[str]) -> list[Row]:
    """N images, and why some of them cannot be used -> N rows."""
    reference, embedded, image_set = images.reference, images.embedded, images.wanted
    columns = {key: metric.score(images) for key, metric in measured(reference).items()}
    columns["nearest"] = memorization.nearest_photo(embedded, reference.photos)
    columns["copied"] = memorization.is_copy(embedded, reference.photos)
    columns["photo"] = (embedded.dino @ reference.photos.dino.T).argmax(1)
    columns["authentic"] = memorization.authentic(embedded, reference.photos)
    values = {name: column.tolist() for name, column in columns.items() if column is not None}
    images_of_set = zip(image_set.kinds, image_set.templates, image_set.jobs, reasons, strict=True)
    return [
        {"kind": kind, "template": template, "prompt": prompt, "index": number, "unusable": why}
        | {name: column[k] if math.isfinite(column[k]) else None for name, column in values.items()}
        for k, (kind, template, (prompt, number), why) in enumerate(images_of_set)
    ]
