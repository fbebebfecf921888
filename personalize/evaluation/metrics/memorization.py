"""Are images the photos over again? The nearest photo by DINO, against what photos are to each other.

N images, K photos, as `embed` returns them. Photos that repeat each other excuse every copy: take repeats out first.
"""

import torch
from torch import Tensor

from personalize.evaluation.metrics.similarity import Embeddings


def nearest_photo(images: Embeddings, photos: Embeddings) -> Tensor:
    """N images, K photos  ->  (N,): cosine of each with the photo it is most like."""
    assert len(photos.dino) > 0, "there are no photos to compare with"
    return (images.dino @ photos.dino.T).amax(1)


def leave_one_out(photos: Embeddings) -> Tensor | None:
    """K photos  ->  (K,): cosine of each with the other photo it is most like; None for a single photo."""
    if len(photos.dino) < 2:
        return None
    return (photos.dino @ photos.dino.T).fill_diagonal_(-torch.inf).amax(1)


def is_copy(images: Embeddings, photos: Embeddings) -> Tensor | None:
    """N images, K photos  ->  (N,) bool: nearer to a photo than any two photos are to each other; None for one photo."""
    among = leave_one_out(photos)
    return None if among is None else nearest_photo(images, photos) > among.amax()


def authentic(images: Embeddings, photos: Embeddings) -> Tensor | None:
    """N images, K photos  ->  (N,) bool; None for a single photo, which has no nearest. Its mean in % is AuthPct.

    An image is authentic if it is farther from its nearest photo than that photo is from its own nearest other
    (Alaa et al. 2102.08921, 2.3; AuthPct of Stein et al. 2306.04675, dgm-eval). Euclidean distances, in float64.
    """
    assert len(images.dino) > 0, "there are no images to judge"
    if len(photos.dino) < 2:
        return None
    real = _distances(photos.dino, photos.dino).fill_diagonal_(torch.inf).amin(1)
    distance, photo = _distances(images.dino, photos.dino).min(1)
    return distance > real[photo]


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """(N,D), (K,D) -> (N,K), exactly 0 for equal rows."""
    return torch.cdist(rows.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
