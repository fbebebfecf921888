"""Local blend (Prompt-to-Prompt, 2208.01626): an edited image stays its source where the words that change are not.

Rows as in `editing`: n sources, n plain ones, n edited ones; B = 3n. z, z0, out (B,C,h,w); in a mask 1 is edited.
"""

import torch
from torch import Tensor

from personalize.core.guidance import Guided
from personalize.generation.attention_maps import AttentionMaps, normalised
from personalize.generation.words import Emphasis, changed_tokens
from personalize.models.interface import LatentModel

BLEND = 0.3  # of a normalised map: a mask as tight as the word has no room for another shape


class LocalBlend:
    """The mask of an edit, by the maps that `watch` has seen so far; sources and plain rows keep every bit."""

    def __init__(self, model: LatentModel, prompts: tuple[str, str], emphasis: Emphasis, watch: AttentionMaps):
        self._schedule, self._watch = model.schedule, watch
        self._tokens = changed_tokens(model, *prompts, emphasis)

    def mask(self, size: tuple[int, int]) -> Tensor:
        """h, w -> (n,1,h,w): where the old words are in the source, or the new ones in the edited image."""
        source, _, edited = self._watch.mean(size).chunk(3)
        mask = torch.zeros_like(source[:, :1], dtype=torch.bool)  # of words that do not change
        for maps, tokens in zip((source, edited), self._tokens, strict=True):
            if tokens:
                mask |= normalised(maps[:, tokens].mean(1, keepdim=True)) > BLEND
        return mask

    def pasted(self, z0: Tensor) -> Tensor:
        """The edited rows with their sources' z0, to the bit, outside the mask."""
        source, plain, edited = z0.chunk(3)
        return torch.cat([source, plain, torch.where(self.mask(z0.shape[-2:]), edited, source)])

    def steered(self, guided: Guided) -> Guided:
        """As `core.steering.known` with the z0 that is predicted for the source: all that is painted leans on what is kept."""

        def blended(z: Tensor, t: float) -> Tensor:
            out = guided(z, t)
            z0 = self.pasted(self._schedule.to_z0(z, out, t))
            own = 2 * len(out) // 3
            return torch.cat([out[:own], self._schedule.from_z0(z, z0, t)[own:].to(out)])

        return blended
