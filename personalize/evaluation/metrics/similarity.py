"""Cosines of embeddings: how much images are like the photos, and like their prompts (Ruiz et al. 2208.12242, 4.1).

N images, K photos, D dimensions of an encoder, P patches. Embeddings have length 1, so that a product is a cosine. Scores are
per image; `bootstrap` takes their means, of prompts and then of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from personalize.evaluation.encoders import Encoders


@dataclass(frozen=True)
class Embeddings:
    """N images as the encoders see them, each row float32 of length 1.

    dino     (N,D) identity
    clip     (N,E) content, in the space it shares with text
    text     (N,E) the prompt of each image; None for photos, which have none
    patches  (N,P,D) identity, patch by patch from the same forward pass as `dino`; 0.3 MB an image for ViT-S/16
    """

    dino: Tensor
    clip: Tensor
    text: Tensor | None = None
    patches: Tensor | None = None


def embed(encoders: Encoders, images: Tensor, prompts: Sequence[str] | None = None) -> Embeddings:
    """(N,3,H,W) in [-1,1], N prompts  ->  what every metric needs; each image and distinct prompt is encoded once.

    Prompts are compared as they are given: take the rare token out first (`prompts.without_token`).
    """
    text = None
    if prompts is not None:
        assert len(prompts) == len(images), (len(prompts), len(images))
        distinct = list(dict.fromkeys(prompts))
        text = encoders.clip_text(distinct)[[distinct.index(prompt) for prompt in prompts]]
    identity = encoders.dino(images)
    return Embeddings(identity.token, encoders.clip_image(images), text, identity.patches)


def dino(images: Embeddings, photos: Embeddings) -> Tensor:
    """N images, K photos  ->  (N,): mean cosine of each with the photos, by identity.

    PRES is the same for images of the class prompt: lower is better there, and the frozen base's is the floor.
    """
    return _mean_cosine(images.dino, photos.dino)


def clip_i(images: Embeddings, photos: Embeddings) -> Tensor:
    """N images, K photos  ->  (N,): mean cosine of each with the photos, by content."""
    return _mean_cosine(images.clip, photos.clip)


def clip_t(images: Embeddings) -> Tensor:
    """N images with prompts  ->  (N,): cosine of each with its own prompt."""
    assert images.text is not None, "CLIP-T compares with prompts: embed the images with theirs"
    return (images.clip * images.text).sum(1)


def first(images: Embeddings, photos: Embeddings, look_alikes: Embeddings) -> Tensor:
    """N images, K photos, L look-alikes  ->  (N,): 1 where the photos are nearer, by mean cosine, than every look-alike.

    The rank of the subject among others of its class (2512.19026): whether it is first. By identity, as `dino`.
    """
    return (dino(images, photos) > (images.dino @ look_alikes.dino.T).amax(1)).float()


def first_ceiling(photos: Embeddings, look_alikes: Embeddings) -> float | None:
    """K photos, each against the others and the look-alikes  ->  how many of them come first; None for a single photo."""
    count = len(photos.dino)
    if count < 2:
        return None
    cosines = photos.dino @ photos.dino.T
    others = (cosines.sum(1) - cosines.diagonal()) / (count - 1)
    return (others > (photos.dino @ look_alikes.dino.T).amax(1)).float().mean().item()


def ceiling(photos: Tensor) -> float | None:
    """Embeddings (K,D) of photos  ->  mean cosine of each with the others; None for a single photo.

    What a perfect copy of the subject would reach: scores are read against it, not against 1.
    """
    count = len(photos)
    if count < 2:
        return None
    cosines = (photos @ photos.T).double()
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()


def _mean_cosine(images: Tensor, photos: Tensor) -> Tensor:
    """(N,D), (K,D) -> (N,)."""
    assert len(photos) > 0, "there are no photos to compare with"
    return (images @ photos.T).mean(1)
