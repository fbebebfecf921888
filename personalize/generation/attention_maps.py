"""Which word did that: how much each place of an image attends to each token of its prompt (DAAM, Tang et al. 2210.04885).

A map is softmax(q k) of the attention to the text, at every place 1 in sum over the tokens. It is made beside the attention
that draws, only where it is asked for, and changes no bit of an image.

B rows, L tokens of a text, h w latent size, which a map has. In a mask 1 is where the word is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.generation.attention_control import require_control
from personalize.generation.words import words_of
from personalize.models.fast_unet import why_not_fast
from personalize.models.interface import LatentModel


class AttentionMaps:
    """The mean over heads, layers and calls, of the last `rows` rows of each call: those of the prompts in `cfg`.

    of: which of these rows.
    """

    def __init__(self, rows: int, of: Sequence[int] | slice = slice(None)):
        self._rows, self._of, self._sums, self._count = rows, of, {}, 0

    def __call__(self, q: Tensor, k: Tensor) -> None:
        """As a `watch` of `LatentModel.predict`: queries (kB,H,N,c) and keys (kB,H,L,c) of one layer."""
        q, k = (x[-self._rows :][self._of].float() for x in (q, k))
        maps = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean(1).transpose(1, 2)
        cells = maps.shape[-1]  # layers of one size are enlarged together, at the end
        self._sums[cells] = self._sums.get(cells, 0) + maps
        self._count += 1

    def mean(self, size: tuple[int, int]) -> Tensor:
        """h, w of the latents -> (B,L,h,w) float32."""
        parts = [part.unflatten(-1, _layer_size(cells, size)) for cells, part in self._sums.items()]
        sums = [interpolate(part, size=size, mode="bilinear") for part in parts]
        return torch.stack(sums).sum(0) / self._count


def _layer_size(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer of so many cells, for latents of that size, which the U-Net halves."""
    h, w = size
    while h * w > cells:
        h, w = -(-h // 2), -(-w // 2)
    return h, w


def require_maps(model: LatentModel, config: SamplingConfig, option: str = "--maps") -> None:
    """UserError for a base whose attention only the library computes, and for a guidance scale that never reads the prompt."""
    require_control(model)
    if config.guidance == 0:
        raise UserError(f"guidance 0 never reads the prompt, and no word has a map then. Leave out --guidance, or {option}.")


def has_maps(model: LatentModel, config: SamplingConfig) -> bool:
    return config.guidance != 0 and not why_not_fast(model.unet)


def word_maps(model: LatentModel, prompt: str, maps: Tensor) -> dict[str, Tensor]:
    """Maps of an image (L,h,w) -> a map (h,w) for each word of its prompt, the mean of its tokens'."""
    return {word: maps[tokens].mean(0) for word, tokens in words_of(model, prompt).items()}


def normalised(maps: Tensor) -> Tensor:
    """(…,h,w) -> the same from 0 to 1, each map by its own least and largest."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
