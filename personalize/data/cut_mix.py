"""Cut-mix: two subjects in one training image, so that their words are learned apart (Cut-Mix-Unmix, Han et al. 2303.11305).

The left half is the middle of a photo of one subject, the right half that of another, and the prompt names both in this order.
Which photos are mixed is a pure function of (seed, step). Latents are cut, not pixels, so that each photo is encoded once;
masks, and what an inpainting base is told, are cut alike. B images of a step, P of them pairs, C channels, h w latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from personalize.common.recipe import Recipe
from personalize.core import rng
from personalize.core.guidance import Cond
from personalize.data.subjects import Subject

EACH = "a {token} {class}"  # of a pair's prompt

Latents = tuple[Tensor, Tensor, Tensor | None, Cond]  # mean, deviation, mask, MASKED: as `TrainingSet.photo_latents` gives them


@dataclass(frozen=True)
class Pair:
    """What the image at `place` in a batch becomes: its own photo beside `photo`, under the prompt of row `text`."""

    place: int
    photo: int
    own_is_left: bool
    text: int


@dataclass(frozen=True)
class CutMix:
    """share: of photos that become a pair; owners: subject of each photo; texts: left, right subject -> row of the prompt."""

    seed: int
    share: float
    owners: Sequence[int]
    texts: dict[tuple[int, int], int]
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, subjects: Sequence[Subject], first: int) -> "CutMix | None":
        """None where nothing is mixed. first: the row of the first of `prompts` among the training set's."""
        if not recipe.train.cut_mix:
            return None
        owners = [k for k, subject in enumerate(subjects) for _ in subject.photos]
        sides = list(permutations(range(len(subjects)), 2))
        prompts = [" and ".join(subjects[k].prompt(EACH) for k in side) for side in sides]
        return cls(recipe.seed, recipe.train.cut_mix, owners, {side: first + k for k, side in enumerate(sides)}, prompts)

    def pairs(self, which: Sequence[int], step: int) -> list[Pair]:
        """Those among the photos of a step; the other photo is any of another subject."""
        g, pairs = rng.generator(self.seed, "cut-mix", step), []
        for place, own in enumerate(which):
            chance, other, side = torch.rand(3, generator=g, dtype=torch.float64).tolist()
            if chance < self.share:
                others = [i for i, owner in enumerate(self.owners) if owner != self.owners[own]]
                photo = others[int(other * len(others))]
                left, right = (own, photo) if side < 0.5 else (photo, own)
                pairs.append(Pair(place, photo, side < 0.5, self.texts[self.owners[left], self.owners[right]]))
        return pairs


def rows_of(rows: Sequence[int], pairs: Sequence[Pair]) -> list[int]:
    """The rows of the prompts of a step's photos -> the same, with that of each pair in its place."""
    texts = {pair.place: pair.text for pair in pairs}
    return [texts.get(place, row) for place, row in enumerate(rows)]


def mixed(latents: Latents, pairs: Sequence[Pair]) -> Latents:
    """Of B photos and then of the P others -> of B images."""
    if not pairs:
        return latents
    mean, std, mask, beside = latents
    rest = None if mask is None else _cut(mask, pairs)
    return _cut(mean, pairs), _cut(std, pairs), rest, {name: _cut(value, pairs) for name, value in beside.items()}


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """(…,h,w) twice -> (…,h,w): of each the middle, half as wide, which is where a photo shows its subject."""
    width = left.shape[-1]
    parts = [each.narrow(-1, (width - wide) // 2, wide) for each, wide in ((left, width // 2), (right, width - width // 2))]
    return torch.cat(parts, -1)


def _cut(rows: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """(B+P,…,h,w) -> (B,…,h,w)."""
    images = list(rows[: len(rows) - len(pairs)])
    for pair, other in zip(pairs, rows[len(images) :], strict=True):
        own = images[pair.place]
        images[pair.place] = side_by_side(own, other) if pair.own_is_left else side_by_side(other, own)
    return torch.stack(images)
