"""Images of CLIP embeddings, by the decoder of `models.unclip`. B rows, D dimensions of an embedding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from personalize.core.guidance import Cond
from personalize.models.interface import LatentModel
from personalize.models.unclip import Decoder, slerp

MOST_DIFFERENCE = 0.5  # of the arc from an image's embedding to a text difference (2204.06125, section 3.3)


@dataclass(frozen=True)
class Embedded:
    """What B rows are told beside their prompts or, where `with_prompt` is false, in place of them."""

    decoder: Decoder
    embeddings: Tensor
    with_prompt: bool = False

    def rows(self, which: slice | range) -> "Embedded":
        which = slice(which.start, which.stop) if isinstance(which, range) else which
        return replace(self, embeddings=self.embeddings[which])

    @torch.no_grad()
    def conditions(self, model: LatentModel, prompts: list[str], negative: str | None) -> tuple[Cond, Cond | None]:
        """Prepared conditionings of B prompts, and of the negative prompt as often, where one is wanted."""
        text = model.encode_prompts(prompts)["text"] if self.with_prompt else None
        cond = model.prepare(self.decoder.tell(self.embeddings, text))
        if negative is None:
            return cond, None
        uncond = model.prepare(self.decoder.tell_no_image(model.encode_prompts([negative])["text"]))
        return cond, {name: value.expand(len(prompts), *value.shape[1:]) for name, value in uncond.items()}


def between(a: Tensor, b: Tensor, count: int, most: float = 1.0) -> Tensor:
    """(D,), (D,) -> (count,D), evenly on the arc from a on, up to the share `most` of it."""
    return slerp(a[None], b[None], torch.linspace(0, most, count))
