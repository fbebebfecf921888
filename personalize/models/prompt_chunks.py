"""Prompts as text encoders read them: tokens in chunks, each with a beginning and an end of its own, encoded apart.

The rule is that of kohya's max_token_length: of n chunks each holds C - 2 tokens (75) and is [beginning, tokens, end, padding]
of C (77); states of all chunks are joined without the ends and beginnings between them, L = n (C - 2) + 2. Words are not kept
together, but those of textual inversion are, whose vectors mean nothing apart. Every prompt has n chunks, also an empty one:
a row is then the same in every batch, and guidance has halves of one length.

B texts, D width of a text encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.common.prompts import weighted_pieces
from personalize.common.recipe_sections import MOST_CHUNKS


@dataclass(frozen=True)
class Reading:
    """A prompt by one tokenizer: the text that it reads, each of its tokens, and which of them are in which chunk.

    ids, spans, weights: of all tokens, without beginnings and ends; spans are start and end in `text`. cuts: of each chunk its
    first token and the one after its last.
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    weights: list[float]
    cuts: list[tuple[int, int]]

    @property
    def count(self) -> int:
        """How many tokens are in the chunks; what follows is cut off."""
        return self.cuts[-1][1]

    @property
    def seen(self) -> list[tuple[int, float]]:
        return list(zip(self.ids, self.weights))[: self.count]


def read_prompt(model, prompt: str, part: str = "") -> Reading:
    """A prompt by the tokenizer of the text encoder `part`, the first without it. UserError for a weight that is none."""
    tokenizer = model.tokenizers[part] if part else next(iter(model.tokenizers.values()))
    expanded = model.expand_words(prompt)
    pieces = weighted_pieces(expanded) if model.weighting else [(expanded, 1.0)]
    text = "".join(piece for piece, _ in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    by_letter = [weight for piece, weight in pieces for _ in piece]
    weights = [by_letter[min(start, len(text) - 1)] for start, _ in spans]
    return Reading(text, ids, spans, weights, _cuts(model, tokenizer, ids))


def token_rows(model, part: str, prompts: Sequence[str]) -> Tensor:
    """B texts -> (B n,C) ids of the text encoder `part`, a row a chunk."""
    tokenizer, rows = model.tokenizers[part], []
    for reading in (read_prompt(model, prompt, part) for prompt in prompts):
        for start, stop in reading.cuts:
            row = [tokenizer.bos_token_id, *reading.ids[start:stop], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row)))
    return torch.tensor(rows, device=model.device)


def token_spans(model, prompt: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text that the tokenizers read, and start and end in it of each token, by the token's position among the L states."""
    reading, room = read_prompt(model, prompt), _room(next(iter(model.tokenizers.values())))
    numbered = [(1 + k * room + i, start + i) for k, (start, stop) in enumerate(reading.cuts) for i in range(stop - start)]
    return reading.text, {position: reading.spans[token] for position, token in numbered}


def join_chunks(states: Tensor, chunks: int) -> Tensor:
    """(B n,C,D) -> (B,L,D)."""
    if chunks == 1:
        return states
    apart = states.unflatten(0, (-1, chunks))
    return torch.cat([apart[:, 0, :1], apart[:, :, 1:-1].flatten(1, 2), apart[:, -1, -1:]], 1)


def split_mask(kept: Tensor | None, chunks: int) -> Tensor | None:
    """(B,L) -> (B n,C): the inverse of `join_chunks`, with ones at the ends and beginnings between chunks."""
    if kept is None or chunks == 1:
        return kept
    apart = kept.new_ones(len(kept), chunks, (kept.shape[1] - 2) // chunks + 2)
    apart[:, 0, 0], apart[:, -1, -1] = kept[:, 0], kept[:, -1]
    apart[:, :, 1:-1] = kept[:, 1:-1].unflatten(1, (chunks, -1))
    return apart.flatten(0, 1)


def text_length(model) -> int:
    """L: how many states an encoded prompt has."""
    return model.chunks * _room(next(iter(model.tokenizers.values()))) + 2


def chunks_needed(model, prompt: str) -> int:
    """How many chunks hold a prompt, as far as it is read."""
    return sum(stop > start for start, stop in read_prompt(model, prompt).cuts)


def longer(model) -> str:
    """What to do for a prompt that is cut off."""
    if model.chunks >= MOST_CHUNKS:
        return "shorten it"
    return f"--set prompt.chunks={model.chunks + 1} reads {_room(next(iter(model.tokenizers.values())))} tokens more"


def _room(tokenizer) -> int:
    return tokenizer.model_max_length - 2


def _cuts(model, tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    cuts, start, together = [], 0, _together(model, tokenizer) if model.chunks > 1 else set()
    for _ in range(model.chunks):
        stop = min(start + _room(tokenizer), len(ids))
        whole = stop
        while start < whole < len(ids) and (ids[whole - 1], ids[whole]) in together:
            whole -= 1
        stop = whole if whole > start else stop  # a word of more vectors than a chunk holds is cut
        cuts.append((start, stop))
        start = stop
    return cuts


def _together(model, tokenizer) -> set[tuple[int, int]]:
    """Pairs of ids that follow each other in a learned word."""
    words = [tokenizer(tokens, add_special_tokens=False).input_ids for tokens in model.learned_words.values()]
    return {pair for ids in words for pair in zip(ids, ids[1:])}
