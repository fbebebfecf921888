"""Words of a prompt and their tokens: which tokens a word is, how much each counts, and which belong together in two prompts.

Words are found by the offsets that the tokenizer gives, in the text with every learned word as all its tokens and without the
weights of `models.prompt_weights`.
L tokens of a text: its beginning, those of its words, its end, and padding; in chunks, see `models.prompt_chunks`.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.common.errors import UserError, nearest
from personalize.common.prompts import without_weights
from personalize.core.guidance import Cond
from personalize.generation.attention_control import require_control, weighted
from personalize.models.interface import LatentModel
from personalize.models.prompt_chunks import read_prompt, text_length, token_spans
from personalize.models.prompt_weights import has_weights

WORD = re.compile(r"\w+|[^\w\s]")
MARKS = ".,;:!?\"'()"  # around a word, not part of it


@dataclass(frozen=True)
class Emphasis:
    """How much words count: weights times (word, number) in the attention of the image, ignored ones not at all."""

    weights: tuple[tuple[str, float], ...] = ()
    ignored: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.weights or self.ignored)

    @property
    def record(self) -> dict:
        """As rows of images say it: nothing where there is none, so that plain images keep their names."""
        words = {"weights": [list(pair) for pair in self.weights], "ignored": list(self.ignored)}
        return {key: value for key, value in words.items() if value}

    @property
    def phrases(self) -> list[str]:
        return [*(word for word, _ in self.weights), *self.ignored]


PLAIN = Emphasis()


def read_emphasis(weights: Sequence[str], ignored: Sequence[str]) -> Emphasis:
    """Texts such as "hat=1.5", and phrases. UserError for what is not one."""
    pairs = []
    for text in weights:
        word, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not word.strip() or not math.isfinite(value):
            raise UserError(f"weight {text!r} is not WORD=NUMBER. Give one such as: --weight hat=1.5")
        pairs.append((word.strip(), value))
    if not all(phrase.strip() for phrase in ignored):
        raise UserError("--ignore is empty. Give words of the prompt, as in: --ignore 'wearing a blue hat'")
    return Emphasis(tuple(pairs), tuple(phrase.strip() for phrase in ignored))


def require_words(model: LatentModel, prompts: Sequence[str], emphasis: Emphasis) -> None:
    """UserError for a word that no prompt says, or that is cut off, and for a base whose attention cannot be controlled."""
    if emphasis:
        require_control(model)
    for phrase in emphasis.phrases:
        require_said(model, prompts, phrase, "was to be weighted or ignored")
    for prompt in prompts:
        _require_one_way(model, prompt, emphasis)


def _require_one_way(model: LatentModel, prompt: str, emphasis: Emphasis) -> None:
    """UserError for a word that is weighted both in the prompt and in the attention."""
    weights = _token_weights(model, prompt)
    for phrase, _ in emphasis.weights:
        if twice := {weights[k] for k in tokens_of(model, prompt, phrase)} - {1.0}:
            raise UserError(
                f"{phrase!r} has the weight {twice.pop():g} in prompt {prompt!r} and another by --weight: the one scales what "
                "the text encoder says of it, the other the image's attention to it. Give one of them."
            )
    if has_weights(model, prompt) and any(tokens_of(model, prompt, phrase) for phrase in emphasis.ignored):
        raise UserError(
            f"prompt {prompt!r} has weights, and --ignore {emphasis.ignored[0]!r} leaves out words of it: the encoder reads a "
            "prompt in one of these ways. Leave the words out of the prompt, or its weights."
        )


def require_said(model: LatentModel, prompts: Sequence[str], phrase: str, purpose: str) -> str:
    """The first prompt that says a phrase. UserError where none does, or it is cut off; purpose: what it was for."""
    saying = [prompt for prompt in prompts if tokens_of(model, prompt, phrase)]
    if not saying:
        count = len(phrase.split())
        said = [prompt.split()[k : k + count] for prompt in prompts for k in range(len(prompt.split()))]
        hint = nearest(phrase, map(" ".join, said)) or "."
        raise UserError(f"no prompt says {phrase!r}, which {purpose}{hint} Give words as the prompt has them.")
    return saying[0]


def tokens_of(model: LatentModel, prompt: str, phrase: str) -> list[int]:
    """The positions of a phrase's tokens, wherever a prompt says it as whole words, in any case; [] where it does not.

    UserError where it is in the part that is cut off.
    """
    tokens, is_cut_off = positions_of(model, prompt, phrase)
    if is_cut_off:
        raise UserError(
            f"{phrase!r} is in the part of prompt {prompt!r} that base {model.name!r} does not see: "
            f"{model.truncated_words(prompt)!r}. Shorten the prompt, or say it sooner."
        )
    return tokens


def words_of(model: LatentModel, prompt: str) -> dict[str, list[int]]:
    """Each distinct word of a prompt, as it is first said, without marks around it, and its tokens. Not what is cut off."""
    words = {}
    for word in (part.strip(MARKS) for part in without_weights(prompt, model.weighting).split()):
        words.setdefault(word.lower(), word)
    positions = {word: positions_of(model, prompt, word)[0] for word in words.values() if word}
    return {word: tokens for word, tokens in positions.items() if tokens}


def positions_of(model: LatentModel, prompt: str, phrase: str) -> tuple[list[int], bool]:
    """The tokens of a phrase, and whether it is also said where the prompt is cut off."""
    text, spans = token_spans(model, prompt)
    pattern = r"\s+".join(map(re.escape, model.expand_words(phrase).split()))
    found = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]
    tokens = [k for k, (a, b) in spans.items() if any(a < end and start < b for start, end in found)]
    return tokens, bool(found) and found[-1][1] > max((end for _, end in spans.values()), default=0)


def encode_words(model: LatentModel, prompts: Sequence[str], emphases: Sequence[Emphasis]) -> Cond:
    """B prompts, an emphasis for each -> the prepared conditioning of B rows. Words that a prompt does not say do nothing.

    What is ignored has no attention of the image, and the text encoders do not read it either: they have written it into every
    token after it, from which the image would still learn it.
    """
    length = text_length(model)
    weights, kept = torch.ones(len(prompts), length), torch.ones(len(prompts), length, dtype=torch.int64)
    for row, (prompt, emphasis) in enumerate(zip(prompts, emphases, strict=True)):
        for phrase, weight in emphasis.weights:
            weights[row, tokens_of(model, prompt, phrase)] *= weight
        for phrase in emphasis.ignored:
            positions = tokens_of(model, prompt, phrase)
            weights[row, positions], kept[row, positions] = 0.0, 0
    cond = model.prepare(
        model.encode_prompts(list(prompts), kept.to(model.device) if any(e.ignored for e in emphases) else None)
    )
    return weighted(cond, weights.to(model.device)) if any(emphases) else cond


def align(model: LatentModel, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Two prompts -> A (L,L), how much of the map of each token of the source goes to each of the target, and own (L,).

    Words of both are matched in order. The same word keeps its map; of words in place of others each token takes an equal
    share of the others' maps, so that the word has as much attention as they had; a word that is added has its own map
    (own 1). The end and the padding are matched from the end of the words on.
    """
    (text, spans), (new_text, new_spans) = token_spans(model, source), token_spans(model, target)
    length = text_length(model)
    shares, own = torch.zeros(length, length), torch.zeros(length)
    ends, new_ends = ([k for k in range(1, length) if k not in each] for each in (spans, new_spans))
    pairs = [
        ([0], [0]),
        *_matched(_words(text, spans), _words(new_text, new_spans)),
        *zip([[k] for k in ends], [[k] for k in new_ends]),
    ]
    for old, new in pairs:
        if len(old) == len(new):
            shares[old, new] = 1.0
        elif old and new:
            shares[torch.tensor(old)[:, None], torch.tensor(new)] = 1 / len(new)
        else:
            own[new] = 1.0
    own[new_ends[len(ends) :]] = 1.0
    return shares, own


def changed_tokens(model: LatentModel, source: str, target: str, emphasis: Emphasis) -> tuple[list[int], list[int]]:
    """The tokens of the source and of the target whose words differ or count otherwise; [] where there are none."""
    old, new = (_words(*token_spans(model, prompt)) for prompt in (source, target))
    weights = (_token_weights(model, prompt) for prompt in (source, target))
    keys = [[(word, weight[tokens[0]]) for word, tokens in words] for words, weight in zip((old, new), weights)]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    changed = [code[1:] for code in matcher.get_opcodes() if code[0] != "equal"]
    tokens = [k for start, stop, _, _ in changed for _, each in old[start:stop] for k in each]
    new_tokens = [k for _, _, start, stop in changed for _, each in new[start:stop] for k in each]
    for phrase in emphasis.phrases:
        tokens += positions_of(model, source, phrase)[0]
        if phrase not in emphasis.ignored:  # the encoder has not read these: their maps say nothing
            new_tokens += tokens_of(model, target, phrase)
    return tokens, new_tokens


def _matched(source: list[tuple[str, list[int]]], target: list[tuple[str, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Words with their tokens -> tokens that belong together, in order; one side is empty where a word has no partner."""
    matcher = difflib.SequenceMatcher(None, [word for word, _ in source], [word for word, _ in target], autojunk=False)
    pairs = []
    for _, start, stop, new_start, new_stop in matcher.get_opcodes():
        old, new = ([tokens for _, tokens in words] for words in (source[start:stop], target[new_start:new_stop]))
        if len(old) == len(new):
            pairs += zip(old, new, strict=True)
        else:
            pairs.append((sum(old, []), sum(new, [])))
    return pairs


def _words(text: str, spans: dict[int, tuple[int, int]]) -> list[tuple[str, list[int]]]:
    """Words of a text in lower case, each with the positions of the tokens that begin in it; those without any are left out."""
    found = []
    for match in WORD.finditer(text):
        tokens = [k for k, (start, _) in spans.items() if match.start() <= start < match.end()]
        if tokens:
            found.append((text[spans[tokens[0]][0] : spans[tokens[-1]][1]].lower(), tokens))
    return found


def _token_weights(model: LatentModel, prompt: str) -> dict[int, float]:
    """The weight in the prompt of each of its tokens, by position."""
    return dict(zip(token_spans(model, prompt)[1], read_prompt(model, prompt).weights))
