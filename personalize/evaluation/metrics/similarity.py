"""Cosines of embeddings: how much pictures are like the photos, and like their prompts (Ruiz et al. 2208.12242, 4.1).

N pictures, K photos, D dimensions of an encoder, P patches. Embeddings have length 1, so that a product is a cosine. Scores are
per picture; `intervals` takes their means, of prompts and then of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from personalize.evaluation.encoders import Encoders


@dataclass(frozen=True)
class Embeddings:
    """N pictures as the encoders see them, each row float32 of length 1.

    dino     (N,D) identity
    clip     (N,E) content, in the space it shares with text
    text     (N,E) the prompt of each picture; None for photos, which have none
    patches  (N,P,D) identity, patch by patch from the same forward pass as `dino`; 0.3 MB a picture for ViT-S/16
    """

    dino: Tensor
    clip: Tensor
    text: Tensor | None = None
    patches: Tensor | None = None


def embed(encoders: Encoders, images: Tensor, prompts: Sequence[str] | None = None) -> Embeddings:
    """(N,3,H,W) in [-1,1], N prompts  ->  what every metric needs; each picture and distinct prompt is encoded once.

    Prompts are compared as they are given: take the rare token out first (`prompts.without_token`).
    """
    text = None
    if prompts is not None:
        assert len(prompts) == len(images), (len(prompts), len(images))
        rows = _rows(prompts)
        text = encoders.clip_text(list(rows))[[rows[prompt] for prompt in prompts]]
    seen = encoders.dino(images)
    return Embeddings(seen.token, encoders.clip_image(images), text, seen.patches)


def dino(pictures: Embeddings, photos: Embeddings) -> Tensor:
    """N pictures, K photos  ->  (N,): mean cosine of each with the photos, by identity.

    PRES is the same for pictures of the class prompt: lower is better there, and the frozen base's is the floor.
    """
    return _mean_cosine(pictures.dino, photos.dino)


def clip_i(pictures: Embeddings, photos: Embeddings) -> Tensor:
    """N pictures, K photos  ->  (N,): mean cosine of each with the photos, by content."""
    return _mean_cosine(pictures.clip, photos.clip)


def clip_t(pictures: Embeddings, photos: Embeddings | None = None) -> Tensor:
    """N pictures with prompts  ->  (N,): cosine of each with its own prompt; the photos do not enter."""
    assert pictures.text is not None, "CLIP-T compares with prompts: embed the pictures with theirs"
    return (pictures.clip * pictures.text).sum(1)


def ceiling(photos: Embeddings) -> dict[str, float | None]:
    """K photos  ->  mean cosine of each with the others, for "dino" and "clip_i"; None for a single photo.

    What a perfect copy of the subject would reach: scores are read against it, not against 1.
    """
    return {"dino": _among(photos.dino), "clip_i": _among(photos.clip)}


def _rows(prompts: Sequence[str]) -> dict[str, int]:
    """Each distinct prompt -> its number, in order of appearance."""
    return {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}


def _mean_cosine(pictures: Tensor, photos: Tensor) -> Tensor:
    """(N,D), (K,D) -> (N,)."""
    assert len(photos) > 0, "there are no photos to compare with"
    return (pictures @ photos.T).mean(1)


def _among(rows: Tensor) -> float | None:
    """(K,D) -> mean of the cosines i != j."""
    count = len(rows)
    if count < 2:
        return None
    cosines = (rows @ rows.T).double()
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()
