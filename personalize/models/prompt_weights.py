"""Weights of words in a prompt, "a (red:1.3) hat", by compel: a token's state is moved away from that of an empty prompt.

compel's rule, per chunk: state + (weight - 1) (state - empty), at weights below 1 mixed with a prompt that is read without the
word. compel is given tokens in place of text, so that chunks and learned words are cut as everywhere else.

B texts of n chunks each, C tokens of a chunk, D width of a text encoder.
"""

import importlib.util
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.models.prompt_chunks import Reading, read_prompt

LAST, PENULTIMATE = "LAST_HIDDEN_STATES_NORMALIZED", "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED"  # compel's names of states


def require_compel() -> None:
    if importlib.util.find_spec("compel") is None:
        raise UserError(
            'prompt.weighting = "compel" needs the package compel: pip install "compel>=2.5". Without it --weight hat=1.3 '
            "weights a word, in the attention of the image."
        )


def has_weights(model, prompt: str) -> bool:
    return bool(model.weighting) and any(weight != 1 for weight in read_prompt(model, prompt).weights)


def weigh(model, part: str, prompts: Sequence[str], states: Tensor, which: str) -> Tensor:
    """(B n,C,D) states of the text encoder `part`, `which` of its layers -> the same where no word of a chunk has a weight."""
    if not model.weighting:
        return states
    readings = [read_prompt(model, prompt, part) for prompt in prompts]
    chunks = [_fragments(reading, *cut, tokenizer=model.tokenizers[part]) for reading in readings for cut in reading.cuts]
    if all(weight == 1 for fragments in chunks for _, weight in fragments):
        return states
    provider, rows = _provider(model, part, which), list(states)
    for k, fragments in enumerate(chunks):
        if any(weight != 1 for _, weight in fragments):
            ids, weights = map(list, zip(*fragments))
            rows[k] = provider.get_embeddings_for_weighted_prompt_fragments([ids], [weights], device=states.device)[0]
    return torch.stack([row.to(states.dtype) for row in rows])


def _fragments(reading: Reading, start: int, stop: int, *, tokenizer) -> list[tuple[list[int], float]]:
    """A chunk's tokens in runs of one weight; a beginning or an end that a user has written has none."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    pairs = [(i, 1.0 if i in special else w) for i, w in zip(reading.ids[start:stop], reading.weights[start:stop])]
    return [([i for i, _ in run], weight) for weight, run in groupby(pairs, key=lambda pair: pair[1])]


class _Tokens:
    """Stands for a tokenizer where compel's texts are tokens already."""

    def __init__(self, tokenizer):
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad_token_id, self.model_max_length = tokenizer.pad_token_id, tokenizer.model_max_length

    def __call__(self, texts: list[list[int]], **options) -> dict[str, list[list[int]]]:
        return {"input_ids": texts}


def _provider(model, part: str, which: str):
    try:
        from compel import EmbeddingsProvider, ReturnedEmbeddingsType
    except ImportError as error:
        raise UserError(f'compel cannot be used: {error}. Install it anew: pip install "compel>=2.5"') from None
    states = ReturnedEmbeddingsType[which]
    return EmbeddingsProvider(_Tokens(model.tokenizers[part]), model.text_encoders[part], returned_embeddings_type=states)
