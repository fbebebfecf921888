"""The word for the subject: rare, one token, of a weak prior; and what is said of a poor one.

Vocabularies are made by hand: common words first, then rare ones, each with an embedding whose place is known.
"""

from types import SimpleNamespace

import pytest
import torch

from personalize import models
from personalize.commands.rare_tokens import token_lines
from personalize.common.errors import UserError
from personalize.data import rare_tokens
from personalize.models.lazy_imports import lazy_imports
from personalize.toyland.world.scenes import RARE_TOKENS

COMMON = ["dogs", "cats", "house", "river", "green", "small", "stone", "light"]
FULL, WORD = ("full",), ("textual-inversion",)
WIDTH = 64


def tokenizer(words, pieces=()):
    """CLIP's kind, with the words as one token each in this order; `pieces` are in the vocabulary but never come together."""
    with lazy_imports():
        from transformers import CLIPTokenizer

    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {piece: k for k, piece in enumerate([*alphabet, *(letter + "</w>" for letter in alphabet)])}
    merges = []
    for word in words:
        start = word[0]
        for k, letter in enumerate(word[1:], 1):
            piece = letter + "</w>" * (k == len(word) - 1)
            if word not in pieces:
                merges.append((start, piece))
            start += piece
            vocab.setdefault(start, len(vocab))
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)


def table(words, rows, untrained=0.5):
    """Embeddings: rows that never trained are short and point anywhere, common words are long; `rows` sets some."""
    ids, g = words.get_vocab(), torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(len(ids), WIDTH, generator=g)) * untrained
    for k, word in enumerate(COMMON):
        if word + "</w>" in ids:
            weights[ids[word + "</w>"]] = axis(k, 1.0)
    for word, row in rows.items():
        weights[ids[word + "</w>"]] = row
    embedding = torch.nn.Embedding.from_pretrained(weights)
    return SimpleNamespace(get_input_embeddings=lambda: embedding)


def axis(k, norm):
    """Along an axis of its own: the first ones are those of the common words."""
    return torch.eye(WIDTH)[k] * norm


def made(words=(), *, rows=None, pieces=(), second=None, name="a base", untrained=0.5):
    """A model of one text encoder with COMMON and `words`, or of two."""
    parts = {"text_encoder": (tokenizer([*COMMON, *words], pieces), rows or {})} | (
        {"text_encoder_2": second} if second else {}
    )
    return SimpleNamespace(
        name=name,
        has_world=name == "toyland",
        tokenizers={part: words for part, (words, _) in parts.items()},
        text_encoders={part: table(words, own, untrained) for part, (words, own) in parts.items()},
    )


def ranked(model, **options):
    return [found.word for found in rare_tokens.rank_tokens(model, **options)]


def test_a_row_like_one_that_never_trained_has_the_weakest_prior_and_one_beside_a_word_the_strongest():
    rows = {"qxv": axis(20, 0.5), "vkz": axis(0, 1.4) + axis(21, 0.3), "wqz": axis(22, 1.0)}
    found = rare_tokens.rank_tokens(made(rows, rows=rows))
    assert [one.word for one in found] == ["qxv", "wqz", "vkz"]
    assert found[0].prior == 0 and found[2].prior == 1
    assert found[2].neighbours[0] == ("dogs", pytest.approx(0.978, abs=1e-3))
    assert found[0].norms == (pytest.approx(0.5),)


def test_of_rows_of_one_norm_the_one_beside_a_common_word_has_the_stronger_prior():
    rows = {"qxv": axis(0, 0.5) + axis(20, 0.5), "wqz": axis(21, 0.5**0.5)}
    assert ranked(made(rows, rows=rows)) == ["wqz", "qxv"]


@pytest.mark.parametrize(("untrained", "first"), [(0.02, "qxv"), (0.5, "wqz"), (3.0, "vkz")])
def test_the_norm_is_measured_from_rows_that_never_trained_wherever_they_are(untrained, first):
    rows = {"qxv": axis(20, 0.02), "wqz": axis(21, 0.5), "vkz": axis(22, 3.0)}
    assert ranked(made(rows, rows=rows, untrained=untrained))[0] == first


def test_only_words_that_are_one_token_in_every_encoder_and_come_back_unchanged_are_found():
    second = tokenizer([*COMMON, "qxv", "wqz", "kqx", "QVX"], pieces=["wqz"]), {}
    model = made(["qxv", "wqz", "kqx", "QVX"], pieces=["kqx"], second=second)
    assert ranked(model) == ["qxv"]


def test_of_two_encoders_the_stronger_prior_counts():
    weak = {"qxv": axis(20, 0.6), "wqz": axis(21, 0.5)}
    strong = {"qxv": axis(20, 0.5), "wqz": axis(0, 2.0)}
    found = rare_tokens.rank_tokens(made(weak, rows=weak, second=(tokenizer([*COMMON, *strong]), strong)))
    assert [one.word for one in found] == ["qxv", "wqz"]
    assert found[1].norms == (pytest.approx(0.5), pytest.approx(2.0)) and found[1].neighbours[0][0] == "dogs"


def test_a_word_in_capitals_is_no_neighbour_of_itself():
    rows = {"QXV": axis(20, 1.0), "qxv": axis(20, 1.0)}
    assert all(word.lower() != "qxv" for word, _ in rare_tokens.rank_tokens(made(rows, rows=rows))[0].neighbours)


def test_common_words_long_words_and_bytes_are_no_candidates():
    model = made(["qxvw", "qxv", "wz"])
    assert set(ranked(model)) == {"qxv", "wz"} and set(ranked(model, longest=4)) == {"qxvw", "qxv", "wz"}
    assert ranked(model, limit=1) == ranked(model)[:1]


def test_a_vocabulary_without_a_rare_word_asks_for_one():
    with pytest.raises(UserError, match="no rare word of 3 letters. Give one: --token"):
        rare_tokens.choose_tokens(made(), (), 1, FULL)


def test_a_word_of_known_meaning_is_listed_with_it_and_never_chosen():
    rows = {"sks": axis(20, 0.5), "qxv": axis(0, 2.0)}
    model = made(rows, rows=rows)
    assert [(one.word, one.remark) for one in rare_tokens.rank_tokens(model)] == [("sks", "a rifle"), ("qxv", "")]
    assert rare_tokens.choose_tokens(model, (), 1, FULL)[0] == ("qxv",)


def test_another_base_gets_its_own_rare_words_and_is_told_so():
    chosen, remarks = rare_tokens.choose_tokens(made(["qxv", "wqz"]), (), 2, FULL)
    assert sorted(chosen) == ["qxv", "wqz"] and "'qxv'" in remarks[0] and "--token" in remarks[0]
    with pytest.raises(UserError, match="has 2 rare words for 3 subjects"):
        rare_tokens.choose_tokens(made(["qxv", "wqz"]), (), 3, FULL)


def test_toyland_has_words_without_meaning_and_rare_ones_after_them():
    model = made(["qxv"], name="toyland")
    assert rare_tokens.choose_tokens(model, (), 1, FULL) == (("sks",), [])
    assert rare_tokens.choose_tokens(model, (), 4, FULL) == (RARE_TOKENS, [])
    assert rare_tokens.choose_tokens(model, (), 5, FULL)[0] == (*RARE_TOKENS, "qxv")


def test_toylands_own_words_without_meaning_have_a_weaker_prior_than_its_things():
    """The measures know nothing of meaning; in Toyland it is known which late words have one."""
    model = models.load_model("toyland", device="cpu", say=lambda line: None)
    prior = {one.word: one.prior for one in rare_tokens.rank_tokens(model, limit=500, longest=10)}
    things = ("room", "snow", "forest", "red", "castle", "cave")
    assert max(prior[word] for word in RARE_TOKENS) < min(prior[word] for word in things)
    assert max(prior["hk"], prior["wx"]) < min(prior[word] for word in RARE_TOKENS)  # pieces that were never words


def test_a_good_word_is_taken_without_a_remark():
    assert rare_tokens.choose_tokens(made(["qxv"]), ("qxv",), 1, FULL) == (("qxv",), [])


@pytest.mark.parametrize(
    ("word", "remark"),
    [
        ("xxyzzy", "is 6 tokens to 'a base', each with a meaning"),
        ("sks", "has a meaning of its own in most bases: a rifle"),
        ("house", "is a common word"),
        ("QXV", "is read as 'qxv'"),
    ],
)
def test_a_poor_word_is_remarked_on(word, remark):
    chosen, said = rare_tokens.choose_tokens(made(["sks", "qxv"]), (word,), 1, FULL)
    assert chosen == (word,) and len(said) == 1 and remark in said[0]


@pytest.mark.parametrize("word", ["the", "snow", "red", "cat"])
def test_a_word_that_toylands_captions_say_is_remarked_on(word):
    """Its vocabulary is of its captions alone, so that its late words too may be common."""
    model = made(["sks", "snow", "red", "cat", "the"], name="toyland")
    chosen, said = rare_tokens.choose_tokens(model, (word,), 1, FULL, classes=("dog",))
    assert chosen == (word,) and len(said) == 1 and "is a common word" in said[0]


def test_sks_means_nothing_in_toyland():
    assert rare_tokens.choose_tokens(made(["sks"], name="toyland"), ("sks",), 1, FULL) == (("sks",), [])


def test_a_word_of_several_tokens_in_the_second_encoder_only_is_remarked_on():
    model = made(["qxv"], second=(tokenizer(COMMON), {}))
    assert "is 3 tokens" in rare_tokens.choose_tokens(model, ("qxv",), 1, FULL)[1][0]


@pytest.mark.parametrize(
    ("wanted", "count", "message"),
    [
        ((" ",), 1, "is not one word"),
        (("two words",), 1, "is not one word"),
        (("sks ",), 1, "is not one word"),
        (("qxv", "QXV"), 2, "'QXV' is given for two subjects"),
        (("qxv", "Dog"), 2, "'Dog' is the class word too"),
        (("qxv", "wqz"), 1, "2 tokens .qxv, wqz. for 1 subjects: give one --token for each"),
    ],
)
@pytest.mark.parametrize("methods", [FULL, WORD])
def test_a_token_that_cannot_be_trained_is_the_users_error(wanted, count, message, methods):
    with pytest.raises(UserError, match=message):
        rare_tokens.choose_tokens(made(["sks"]), wanted, count, methods, classes=("dog",))


def test_a_method_that_learns_the_word_gets_a_new_one():
    model = made(["sks"])
    assert rare_tokens.choose_tokens(model, (), 1, WORD) == (("<subject>",), [])
    assert rare_tokens.choose_tokens(model, (), 2, ("textual-inversion", "lora")) == (("<subject1>", "<subject2>"), [])
    assert rare_tokens.choose_tokens(model, ("<sks>",), 1, ("custom-diffusion",)) == (("<sks>",), [])
    with pytest.raises(UserError, match="'sks' is a word that 'a base' knows already, .* Give such as '<sks>'"):
        rare_tokens.choose_tokens(model, ("sks",), 1, WORD)


def test_a_word_that_the_second_encoder_alone_knows_is_not_new():
    with pytest.raises(UserError, match="knows already"):
        rare_tokens.choose_tokens(made(second=(tokenizer([*COMMON, "qxv"]), {})), ("qxv",), 1, WORD)


def test_the_table_has_a_line_a_word_and_columns_that_begin_together():
    rows = {"sks": axis(0, 0.5), "qxv": axis(20, 2.0)}
    shown = token_lines(rare_tokens.rank_tokens(made(rows, rows=rows), limit=20))
    assert shown[0].split() == ["word", "id", "prior", "norm", "nearest", "words"]
    assert len(shown) == 4 and shown[-1].startswith("prior: 0 the weakest")
    sks = next(line for line in shown if line.startswith("sks"))
    assert sks.index("dogs 1.00") == shown[0].index("nearest words") and sks.endswith("a rifle")
