"""Masks of photos from what the base knows: where it attends to the class word, which patches are alike, which colours.

The attention of the frozen base to the word is coarse and uncertain at the edge. So its surest cells are the seeds of
subject and background; a patch of any photo is the subject where it is nearer to the subject's seeds in all photos; and what
results is drawn to the edges in the image by the colours of both sides, as GrabCut does (Rother et al. 2004).

K photos, n cells a side, P = n × n, D dimensions of a patch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, interpolate

from personalize.generation.attention_maps import normalised
from personalize.generation.word_mask import image_maps
from personalize.generation.words import tokens_of
from personalize.models.interface import LatentModel

SIDE = 64  # px at which colours are told apart
SURE = (0.1, 0.3)  # shares of a photo's cells that are seeds: the subject's, the background's
NEAREST = 3  # seeds that a patch is held against
STEEP = 12.0  # of the sigmoid of the difference of cosines
WORD = 0.7  # weight of the attention beside the likeness of patches
BINS, ROUNDS, UNSURE = 12, 4, 0.02  # of each colour channel; of the colours' estimate; probability that nothing goes below

Patches = Callable[[Tensor], Tensor]  # (K,3,H,W) in [-1,1] -> (K,P,D) of length 1, which cover the whole image


@torch.inference_mode()
def word_masks(model: LatentModel, patches: Patches, images: Sequence[Image.Image], word: str) -> list[np.ndarray]:
    """K RGB images of one subject, the class word -> K masks (SIDE,SIDE) in [0,1] of the images, squeezed to squares."""
    if not images:
        return []
    squares = torch.stack([_pixels(image, model.size) for image in images])
    attention = torch.stack([_attention(model, image, word) for image in squares])
    of_patches = patches(squares)
    n = round(of_patches.shape[1] ** 0.5)
    cells = interpolate(attention[:, None], size=(n, n), mode="bilinear", antialias=True)[:, 0]
    likely = likeness(of_patches, cells.flatten(1)).unflatten(1, (n, n)) * (1 - WORD + WORD * cells)
    soft = interpolate(normalised(likely)[:, None], size=(SIDE, SIDE), mode="bicubic")[:, 0]
    return [by_colours(_pixels(image, SIDE), share).numpy() for image, share in zip(images, normalised(soft), strict=True)]


def likeness(patches: Tensor, cells: Tensor) -> Tensor:
    """(K,P,D), attention (K,P) in [0,1] -> (K,P) in [0,1]: whether a patch is nearer to the subject's seeds of all photos."""
    counts = [max(1, round(share * cells.shape[1])) for share in SURE]
    sides = []
    for count, largest in zip(counts, (True, False), strict=True):
        rows = cells.topk(count, dim=1, largest=largest).indices
        seeds = torch.gather(patches, 1, rows[..., None].expand(-1, -1, patches.shape[2])).flatten(0, 1)
        sides.append((patches @ seeds.T).topk(min(NEAREST, len(seeds)), dim=-1).values.mean(-1))
    return torch.sigmoid(STEEP * (sides[0] - sides[1]))


def by_colours(pixels: Tensor, prior: Tensor) -> Tensor:
    """(3,H,W) in [-1,1], where the subject may be (H,W) in [0,1] -> (H,W) in [0,1] that follows the edges of the image.

    By turns how frequent each colour is in either side, and what side each pixel is on.
    """
    bins = ((pixels + 1) / 2 * BINS).long().clamp(0, BINS - 1).flatten(1)
    colours = (bins[0] * BINS + bins[1]) * BINS + bins[2]
    prior = prior.clamp(UNSURE, 1 - UNSURE).flatten()
    share = prior
    for _ in range(ROUNDS):
        subject = prior * _frequencies(colours, share)
        rest = (1 - prior) * _frequencies(colours, 1 - share)
        smooth = avg_pool2d((subject / (subject + rest)).view(1, 1, *pixels.shape[1:]), 3, 1, 1, count_include_pad=False)
        share = smooth.flatten().clamp(UNSURE, 1 - UNSURE)
    return ((share - UNSURE) / (1 - 2 * UNSURE)).clamp(0, 1).view(pixels.shape[1:])


def _frequencies(colours: Tensor, weights: Tensor) -> Tensor:
    """(N,) colours by number, (N,) weights -> (N,): how frequent each one's colour is, with those next to it."""
    counts = torch.zeros(BINS**3).scatter_add_(0, colours, weights).view(1, 1, BINS, BINS, BINS)
    counts = avg_pool3d(counts, 3, 1, 1) + 1e-3
    return (counts / counts.sum()).flatten()[colours]


def _attention(model: LatentModel, image: Tensor, word: str) -> Tensor:
    """(3,S,S) -> (h,w) in [0,1] on the CPU."""
    prompt = f"a {word}"
    maps = image_maps(model, model.encode_images(image[None])[0], prompt)
    return normalised(maps[tokens_of(model, prompt, word)].mean(0)).float().cpu()


def _pixels(image: Image.Image, side: int) -> Tensor:
    """An RGB image, squeezed -> (3,side,side) in [-1,1]."""
    square = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1).contiguous()
