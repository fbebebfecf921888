"""CLIP-bg: does what stands around the subject follow the prompt, whatever the subject looks like?

After MaSC (arXiv 2605.22469, prompt following): the background alone against the prompt without the subject. MaSC takes the
subject's patches out of SigLIP's pooling by masks that it is given for both images; here the photos' masks say which patches
of an image are the subject, and CLIP sees it painted over. N images, P patches, D dimensions, H W pixels.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from personalize.evaluation.encoders import Encoders
from personalize.evaluation.metrics.similarity import Embeddings

LEAST = 0.1  # share of an image's patches that must be background; a frame that the subject fills says nothing of a place
PART = 64  # images that are compared at once
OUTFITS = "outfit|costume|uniform|suit|dress|clothes|coat|jacket|armou?r"
WHERE = re.compile(
    r"\bwith (?:(?!\bwith\b).)*? in the background\b.*"
    r"|\b(?:in|inside|on|at|under|above|over|near|by|beside|next to|behind|before|among|between|against|through)\b"
    rf"(?!(?: [\w-]+){{1,3}}? (?:{OUTFITS})\b).*",
    re.IGNORECASE | re.DOTALL,
)


def where(prompt: str, class_word: str) -> str:
    """The words of a prompt that say where the subject is, "in the snow"; "" where none do.

    From the first English word of place behind the class word on: what the subject does or wears is no background.
    """
    behind = re.split(rf"(?<![\w-]){re.escape(class_word)}(?![\w-])", prompt, maxsplit=1, flags=re.IGNORECASE)[-1]
    found = WHERE.search(behind)
    return found[0].strip(" ,.;") if found else ""


def subject_patches(images: Embeddings, photos: Embeddings, foreground: Tensor) -> Tensor:
    """N images, K photos, their (K,P) foreground  ->  (N,P) bool: which patches show the subject.

    Those whose nearest patch in the photos that have masks is one of the subject.
    """
    masked = foreground.any(1)
    patches, marks = photos.patches[masked].flatten(0, 1), foreground[masked].flatten()
    nearest = [(part @ patches.T).argmax(-1) for part in images.patches.split(PART)]
    return marks[torch.cat(nearest)]


def clip_bg(encoders: Encoders, pixels: Tensor, places: Sequence[str], subject: Tensor) -> Tensor:
    """N images (N,3,H,W) in [-1,1], where each should be, its (N,P) subject patches  ->  (N,): cosine of background and place.

    The subject is painted over with the mean colour of the rest. NaN for a prompt without a place, and for an image
    with less than LEAST of background.
    """
    scores = torch.full((len(pixels),), torch.nan)
    rows = [k for k, place in enumerate(places) if place and (~subject[k]).float().mean() >= LEAST]
    if rows:
        distinct = list(dict.fromkeys(places[k] for k in rows))
        text = encoders.clip_text(distinct)[[distinct.index(places[k]) for k in rows]]
        seen = encoders.clip_image(_without(pixels[rows], encoders.spread(subject[rows], pixels.shape[-2:])))
        scores[rows] = (seen * text).sum(1)
    return scores


def _without(pixels: Tensor, mask: Tensor) -> Tensor:
    """(N,3,H,W), (N,1,H,W) of 0 and 1  ->  the pixels, where the mask is 1 the mean of the others."""
    rest = 1 - mask
    mean = (pixels * rest).sum((2, 3), keepdim=True) / rest.sum((2, 3), keepdim=True)
    return pixels * rest + mean * mask
