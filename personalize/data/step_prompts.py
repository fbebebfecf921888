"""Which prompt a photo has at a step: its own, the same with its parts in another order, or the empty one.

A pure function of (seed, step), as the rest of a batch is. N photos; a row is an index into the prompts of a training set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from personalize.common.prompts import parts_at_commas
from personalize.common.recipe import Recipe
from personalize.core import rng
from personalize.core.guidance import Cond
from personalize.generation import sampling
from personalize.models.interface import LatentModel

ORDERS = 16  # of a prompt; later passes over the photos use them again in turn, so that they can be encoded once
ENCODED = 64  # prompts at once


@dataclass(frozen=True)
class StepPrompts:
    """orders: rows of each photo's prompt in its orders, one without a shuffle; empty: row of the empty prompt."""

    seed: int
    dropout: float
    orders: list[list[int]]
    empty: int

    def rows(self, which: Sequence[int], passes: Sequence[int], step: int) -> list[int]:
        """B photos of a step by number, and which pass over all photos each is in -> B rows."""
        rows = [self.orders[i][p % len(self.orders[i])] for i, p in zip(which, passes, strict=True)]
        if not self.dropout:
            return rows
        draws = torch.rand(len(rows), generator=rng.generator(self.seed, "caption dropout", step), dtype=torch.float64)
        return [self.empty if draw < self.dropout else row for row, draw in zip(rows, draws.tolist(), strict=True)]


def step_prompts(
    model: LatentModel, recipe: Recipe, prompts: Sequence[str], tokens: Sequence[str]
) -> tuple[StepPrompts, list[str]]:
    """The first N of `prompts` are photos', with a token each -> what they have at a step, and prompts that it needs beside.

    A photo dropped out has the prompt that guidance takes for unconditional where nothing is negative.
    """
    train, rows = recipe.train, {}
    passes = -(-train.steps * train.batch // len(tokens)) if train.caption_shuffle else 0
    orders = [[i] for i in range(len(tokens))]
    for i in range(len(tokens) if passes else 0):
        seeds = (rng.generator(recipe.seed, f"caption order/{i}", k) for k in range(min(ORDERS, passes)))
        texts = [shuffled(prompts[i], g, lambda part, i=i: model.says(part, tokens[i]), model.weighting) for g in seeds]
        orders[i] = [rows.setdefault(text, len(prompts) + len(rows)) for text in texts]
    more = [*rows, *([""] if train.caption_dropout else [])]
    return StepPrompts(recipe.seed, train.caption_dropout, orders, len(prompts) + len(rows)), more


def shuffled(prompt: str, generator: Generator, says_token: Callable[[str], bool], weighting: str = "") -> str:
    """A prompt whose parts between commas are in a random order, after those that say the token.

    Where the first part says it, this is the rule of kohya's `shuffle_caption` with `keep_tokens` = 1.
    """
    parts = [part for text in parts_at_commas(prompt, weighting) if (part := text.strip())]
    first, rest = ([part for part in parts if says_token(part) == wanted] for wanted in (True, False))
    return ", ".join(first + [rest[k] for k in torch.randperm(len(rest), generator=generator).tolist()])


def encode_all(model: LatentModel, prompts: list[str], more: list[str]) -> Cond:
    """One row for each of both. `prompts` are encoded together, as they are without `more`; of these, ENCODED at once."""
    parts = [prompts, *(more[start : start + ENCODED] for start in range(0, len(more), ENCODED))]
    encoded = [sampling.encode_texts(model, part) for part in parts]
    return {key: torch.cat([part[key] for part in encoded]) if more else encoded[0][key] for key in encoded[0]}
