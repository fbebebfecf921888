"""DINO-fg: is the subject of the photos found in the images, whatever stands around it?

Masked matching of patches after MaSC (arXiv 2605.22469, concept preservation), by DINO's patches where MaSC has SigLIP's:
only photos need masks, and a copied background is no gain, since no patch of it is looked for. N images, K photos,
P patches, D dimensions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from personalize.evaluation.encoders import Encoders
from personalize.evaluation.metrics.similarity import Embeddings

COVERED = 0.5  # share of a patch that the mask must cover
PART = 64  # images that are matched at once


def marked(encoders: Encoders, masks: Iterable[Tensor | None]) -> Tensor:
    """K masks (1,H,W) in [0,1], 1 = subject, cut as the photos were that were embedded  ->  (K,P) bool: foreground.

    None for a photo without a mask: its row, like that of a subject too small for any patch, is all False, and no
    score looks at it. (A mask of ones would make all of the photo the subject.)
    """
    empty = torch.zeros(encoders.grid**2, dtype=torch.bool)
    return torch.stack([empty if mask is None else encoders.cover(mask[None])[0] >= COVERED for mask in masks])


def dino_fg(images: Embeddings, photos: Embeddings, foreground: Tensor) -> Tensor | None:
    """N images, K photos, their (K,P) foreground  ->  (N,); None where no photo has any.

    For each foreground patch of a photo the cosine of the patch of the image that is most like it; the mean over
    the photo's patches, then over the photos.
    """
    matches = _matches(images, photos, foreground)
    return matches.mean(1) if matches.shape[1] else None


def ceiling(photos: Embeddings, foreground: Tensor) -> float | None:
    """K photos, their (K,P) foreground  ->  mean over each with the others; None for a single photo, or no foreground."""
    at = foreground.any(1).nonzero()[:, 0]
    others = torch.arange(len(foreground))[:, None] != at
    return _matches(photos, photos, foreground)[others].double().mean().item() if others.any() else None


def _matches(images: Embeddings, photos: Embeddings, foreground: Tensor) -> Tensor:
    """(N, photos with foreground): mean over the photo's foreground of the greatest cosine in the image."""
    assert images.patches is not None and photos.patches is not None, "DINO-fg compares patches: embed() gives them"
    assert foreground.shape == photos.patches.shape[:2], (foreground.shape, photos.patches.shape)
    columns = [torch.zeros(len(images.patches), 0)]
    for patches, mask in zip(photos.patches, foreground, strict=True):
        if mask.any():
            parts = [(part @ patches[mask].T).amax(1).mean(1) for part in images.patches.split(PART)]
            columns.append(torch.cat(parts)[:, None])
    return torch.cat(columns, 1)
