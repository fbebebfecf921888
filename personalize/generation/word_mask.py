"""Where an image shows a word of a prompt: attention maps of the base that reads the image, noised, with this prompt.

L tokens of a text, h w latent size, H W px. In a mask 1 is where the word is.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.common.errors import UserError
from personalize.core import rng
from personalize.generation.attention_maps import AttentionMaps, normalised
from personalize.generation.sampling import encode_texts
from personalize.generation.words import tokens_of
from personalize.models.interface import LatentModel

LEVELS = (0.2, 0.35, 0.5, 0.65)  # of T; on Toyland maps hardly differ between 0.05 and 0.65, and are worse above
THRESHOLD = 0.5  # of a normalised map. By `benchmarks.maps`: 0.3, as papers have it, takes far too much
LEAST, MOST = 0.02, 0.95  # share of an image that may be a mask: what is beyond is no place


def image_maps(model: LatentModel, z0: Tensor, prompt: str, *, levels: tuple[float, ...] = LEVELS) -> Tensor:
    """z0 (1,C,h,w) of an image -> the attention maps (L,h,w) of a prompt, the mean over noise levels; one evaluation each."""
    maps, T = AttentionMaps(1), model.schedule.T
    with torch.inference_mode():
        cond = encode_texts(model, [prompt], draws=True)
        for k, level in enumerate(levels):
            t = round(level * (T - 1))
            eps = rng.normal([rng.generator(0, "word-mask", k)], z0.shape[1:]).to(z0)
            model.predict(model.schedule.add_noise(z0, eps, t), torch.full((1,), t, device=z0.device), cond, watch=maps)
    return maps.mean(z0.shape[-2:])[0]


def word_mask(model: LatentModel, pixels: Tensor, prompt: str, phrase: str) -> Tensor:
    """(3,H,W) in [-1,1] -> (1,H,W) of 0 and 1. UserError for a mask that is hardly anything, or nearly all of the image."""
    maps = image_maps(model, model.encode_images(pixels[None])[0], prompt)
    each = maps[tokens_of(model, prompt, phrase)].mean(0)
    mask = (normalised(interpolate(each[None, None], size=pixels.shape[1:], mode="bilinear")[0]) > THRESHOLD).float().cpu()
    share = mask.mean(dtype=torch.float64).item()
    if not LEAST <= share <= MOST:
        raise UserError(
            f"the attention to {phrase!r} marks {share:.1%} of the image, and a mask is {LEAST:.0%} to {MOST:.0%} of it. Name "
            "a thing that the image shows, say more of the image in the prompt, or give --mask FILE."
        )
    return mask
