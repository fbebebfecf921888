"""The rare token that stands for the subject: one token, short, late in the vocabulary (DreamBooth §3.2, 2208.12242).

A vocabulary of byte pairs is in the order in which its words were merged, so its late words were rare in the text it
was made from. Of those, `rank_tokens` takes the ones that carry the weakest prior. That is a heuristic, of two measures in
the table of embeddings of each text encoder:

norm        how far a row's norm is from that of rows that never trained. Those are known: bytes that no UTF-8 text
            has. A row that was seldom trained is still where the start or weight decay left such rows (a measure of
            under-trained tokens in Land & Bartolo 2405.05417).
neighbours  the mean cosine to the nearest common words: a row that lies by words of a meaning has it, more or less.

Both are taken as shares, 0 for the weakest candidate and 1 for the strongest, and averaged; of several text encoders
the strongest counts, since each conditions the image. What a word makes the base generate is not measured.

K candidates, M common words, V rows of a table, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from personalize.common.errors import UserError
from personalize.methods import WITH_A_WORD
from personalize.models.interface import LatentModel

END = "</w>"  # what CLIP's vocabularies write after a piece that ends a word
UNUSED = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]  # bytes that UTF-8 never has
POOL = 500  # rarest candidates that are compared
COMMON = 16_000  # words, the most common first, that neighbours are looked for among
NEIGHBOURS = 3

# Meaning -> rare words of CLIP's vocabulary that have it all the same. The list is far from complete.
MEANINGS = {
    "a rifle": "sks",
    "a drug": "lsd",
    "a slur": "jap fag",
    "a curse": "fck jfc",
    "a disease": "pox",
    "a virus": "hpv",
    "a sheep": "ewe",
    "a suit": "tux",
    "a creature of tales": "orc",
    "a house of fashion": "ysl",
    "a record shop": "hmv",
    "a cartoon series": "dbz",
    "a series of horror tales": "scp",
    "a figure in a novel": "wwx",
    "a basketball player": "lbj",
    "a basketball team": "nyk",
    "a rapper": "dmx",
    "a kind of game": "pvp",
    "a program": "exe",
    "a dance": "jig",
    "a hat": "fez",
    "a witch": "hag",
    "a crow's voice": "caw",
    "a name": "rui yui dav tej yao ulf",
    "mother": "ibu",
}
KNOWN = {word: meaning for meaning, words in MEANINGS.items() for word in words.split()}


@dataclass(frozen=True)
class RareToken:
    """A candidate. id: its row in the first text encoder's table; norms: of its row in each one's table.

    neighbours: the nearest common words and their cosines; prior: 0 the weakest of the candidates, 1 the strongest;
    remark: the meaning it is known to have, or "".
    """

    word: str
    id: int
    norms: tuple[float, ...]
    neighbours: tuple[tuple[str, float], ...]
    prior: float
    remark: str


def choose_tokens(
    model: LatentModel, wanted: tuple[str, ...], count: int, methods: tuple[str, ...], *, classes: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], list[str]]:
    """The tokens to train, one for each of `count` subjects, and remarks in whole sentences.

    Methods that learn the token itself get a word that is new to the base, the others a rare one. UserError for a
    token that is not one word, is there twice, is a class word, or is known where a new one is asked for.
    """
    learns = next((name for name in methods if name in WITH_A_WORD), "")
    if not wanted and learns:
        return tuple(f"<subject{number}>" for number in range(1, count + 1)) if count > 1 else ("<subject>",), []
    if not wanted:
        return _choose(model, count)
    if len(wanted) != count:
        raise UserError(
            f"{len(wanted)} tokens ({', '.join(wanted)}) for {count} subjects: give one --token for each, or none at all."
        )
    for number, word in enumerate(wanted):
        _check_word(word, wanted[:number], classes)
        if learns and any(len(_ids(tokenizer, word)) == 1 for tokenizer in model.tokenizers.values()):
            raise UserError(
                f"token {word!r} is a word that {model.name!r} knows already, and {learns} learns a new one. "
                f"Give such as '<{word.strip('<>')}>', or none."
            )
    return wanted, [] if learns else [remark for word in wanted if (remark := _remark(model, word))]


def rank_tokens(model: LatentModel, *, limit: int = 20, longest: int = 3) -> list[RareToken]:
    """Rare words of up to `longest` letters, the weakest prior first; one token in every text encoder, and back again.

    UserError where the vocabulary has none.
    """
    words = _candidates(model, longest)
    if not words:
        raise UserError(f"the vocabulary of {model.name!r} has no rare word of {longest} letters. Give one: --token …")
    tables = {part: encoder.get_input_embeddings().weight.detach().float() for part, encoder in model.text_encoders.items()}
    measured = [_measure(tables[part], tokenizer, words) for part, tokenizer in model.tokenizers.items()]
    priors = torch.stack([prior for _, prior, _ in measured]).amax(0).tolist()
    ids = next(iter(model.tokenizers.values())).get_vocab()
    tokens = []
    for k, word in enumerate(words):
        near = dict(sorted((pair for *_, neighbours in measured for pair in neighbours[k]), key=lambda pair: pair[1]))
        nearest = tuple(sorted(near.items(), key=lambda pair: -pair[1])[:NEIGHBOURS])
        norms = tuple(round(float(norm[k]), 4) for norm, _, _ in measured)
        tokens.append(RareToken(word, ids[word + END], norms, nearest, round(priors[k], 4), _known(model, word)))
    return sorted(tokens, key=lambda one: (one.prior, -one.id))[:limit]


def _choose(model: LatentModel, count: int) -> tuple[tuple[str, ...], list[str]]:
    """Words of Toyland that it has without meaning; for other bases, and further subjects, the weakest of the ranking."""
    from personalize.toyland.world.scenes import RARE_TOKENS

    meaningless = RARE_TOKENS[:count] if model.has_world else ()
    if len(meaningless) == count:
        return meaningless, []
    ranked = [one.word for one in rank_tokens(model, limit=POOL) if not one.remark and one.word not in meaningless]
    chosen = (*meaningless, *ranked[: count - len(meaningless)])
    if len(chosen) < count:
        raise UserError(
            f"the vocabulary of {model.name!r} has {len(chosen)} rare words for {count} subjects. Give them: --token …"
        )
    words = ", ".join(repr(word) for word in chosen)
    return chosen, [f"token: {words}, rare in the vocabulary of {model.name!r} (--token … for another)."]


def _candidates(model: LatentModel, longest: int) -> list[str]:
    """The rarest words, at most POOL, of the later half of the vocabulary: one token everywhere, which decodes back."""
    words = _words(next(iter(model.tokenizers.values())))
    late = [word for word in words[len(words) // 2 :] if len(word) <= longest and word.isascii() and word.isalpha()]
    for tokenizer in model.tokenizers.values():
        ids, read = tokenizer.get_vocab(), tokenizer(late, add_special_tokens=False).input_ids if late else []
        late = [w for w, pieces in zip(late, read) if pieces == [ids.get(w + END)] and tokenizer.decode(pieces).strip() == w]
    return late[: -POOL - 1 : -1]


def _measure(table: Tensor, tokenizer, words: list[str]) -> tuple[Tensor, Tensor, list[list[tuple[str, float]]]]:
    """Table (V,D), K words -> norms (K,), priors (K,) in [0,1], and the nearest common words of each with cosines."""
    ids = tokenizer.get_vocab()
    rows, norms = torch.tensor([ids[word + END] for word in words], device=table.device), table.norm(dim=1)
    untrained = [ids[byte + end] for byte in UNUSED for end in ("", END) if byte + end in ids]
    typical = norms[untrained].median() if untrained else 0.0
    common = _words(tokenizer)[:COMMON]
    cosines = normalize(table[rows]) @ normalize(table[[ids[word + END] for word in common]]).T  # (K,M)
    columns: dict[str, list[int]] = {}
    for m, word in enumerate(common):
        columns.setdefault(word.casefold(), []).append(m)
    for k, word in enumerate(words):  # a word and its capitals are no neighbours of themselves
        cosines[k, columns.get(word.casefold(), [])] = -2.0
    near = cosines.topk(min(NEIGHBOURS, len(common)), dim=1)
    prior = (_shares((norms[rows] - typical).abs()) + _shares(near.values.clamp(min=0).mean(1))) / 2
    neighbours = [
        [(tokenizer.decode([ids[common[m] + END]]).strip(), round(cosine, 3)) for cosine, m in zip(*pair) if cosine > -2]
        for pair in zip(near.values.tolist(), near.indices.tolist())
    ]
    return norms[rows].cpu(), prior.cpu(), neighbours


def _shares(values: Tensor) -> Tensor:
    """(K,) -> (K,): the share of the others that are smaller."""
    return torch.searchsorted(values.sort().values, values) / max(1, len(values) - 1)


def _words(tokenizer) -> list[str]:
    """Whole words of a vocabulary, the most common first. Single bytes are left out: their ids tell no frequency."""
    whole = ((i, piece.removesuffix(END)) for piece, i in tokenizer.get_vocab().items() if piece.endswith(END))
    return [word for _, word in sorted(whole) if len(word) > 1]


def _ids(tokenizer, word: str) -> list[int]:
    return tokenizer(word, add_special_tokens=False).input_ids


def _known(model: LatentModel, word: str) -> str:
    """What a word is known to mean. Toyland has seen none of it."""
    return "" if model.has_world else KNOWN.get(word.lower(), "")


def _check_word(word: str, others: tuple[str, ...], classes: tuple[str, ...]) -> None:
    if not word.strip() or word != word.strip() or len(word.split()) > 1:
        raise UserError(f"token {word!r} is not one word. Give a short rare one, such as 'sks'.")
    if word.lower() in (other.lower() for other in others):
        raise UserError(f"token {word!r} is given for two subjects, which the model could not tell apart. Give each its own.")
    if word.lower() in (name.lower() for name in classes):
        raise UserError(
            f"token {word!r} is the class word too: every {word} would become the subject. Give a rare word; "
            "personalize tokens lists some."
        )


def _is_common(model: LatentModel, word: str) -> bool:
    """Whether a base has met a word often: it is in the first half of the vocabulary, or Toyland's captions say it."""
    from personalize.toyland.world.scenes import ACCESSORIES, ACTIONS, CLASSES, COLOURS, PLACES

    words = _words(next(iter(model.tokenizers.values())))
    said = " ".join([*CLASSES, *COLOURS, *ACCESSORIES, *PLACES.values(), *ACTIONS.values()]).split()
    return word in words[: len(words) // 2] or (model.has_world and word in said)


def _remark(model: LatentModel, word: str) -> str:
    """What is wrong with a token that can be trained all the same, or ""."""
    pieces = max(len(_ids(tokenizer, word)) for tokenizer in model.tokenizers.values())
    if pieces > 1:
        return f"token {word!r} is {pieces} tokens to {model.name!r}, each with a meaning; a single rare one learns better."
    if meaning := _known(model, word):
        return f"token {word!r} has a meaning of its own in most bases: {meaning}."
    tokenizer = next(iter(model.tokenizers.values()))
    decoded = tokenizer.decode(_ids(tokenizer, word)).strip()
    if decoded != word:
        return f"token {word!r} is read as {decoded!r} by {model.name!r}."
    if _is_common(model, word):
        return (
            f"token {word!r} is a common word, so {model.name!r} has its own idea of it; a rare one learns better: "
            f"personalize tokens --base {model.name} lists some."
        )
    return ""
