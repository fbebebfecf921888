"""The word for the subject: rare, one token, and what is said of a poor one."""

import json

import pytest

from personalize import models, tokens
from personalize.errors import UserError
from personalize.models.imports import lean


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load(str(tiny_sd), device="cpu", say=lambda line: None)


def with_words(model, words):
    """The model with a CLIP vocabulary that holds the words as one token each, in this order."""
    with lean():
        from transformers import CLIPTokenizer

    inner = json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = dict(inner["vocab"]), [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in inner["merges"]]
    for word in words:
        start = word[0]
        for k, letter in enumerate(word[1:], 1):
            piece = letter + "</w>" * (k == len(word) - 1)
            merges.append((start, piece))
            start += piece
            vocab.setdefault(start, len(vocab))
    other = type(model).__new__(type(model))
    other.__dict__ |= {**vars(model), "tokenizer": CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)}
    return other


def test_the_rare_word_is_one_token_that_comes_back_unchanged(model):
    rich = with_words(model, ["qxv", "wzk"])
    word = tokens.rare(rich)
    ids = rich.tokenizer(word, add_special_tokens=False).input_ids
    assert word == "wzk" and len(ids) == 1
    assert rich.tokenizer.decode(ids).strip() == word


def test_a_word_with_a_known_meaning_is_never_the_rare_one(model):
    assert tokens.rare(with_words(model, ["qxv", "sks"])) == "qxv"


def test_another_base_gets_its_own_rare_word_and_is_told_so(model):
    word, remark = tokens.choose(with_words(model, ["qxv"]), "")
    assert word == "qxv" and "'qxv'" in remark and "--set token=" in remark


def test_toyland_knows_sks_as_a_word_without_meaning(model, monkeypatch):
    monkeypatch.setattr(model, "name", "toyland")
    assert tokens.choose(model, "") == ("sks", "")


def test_a_vocabulary_without_a_rare_word_asks_for_one(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "get_vocab", dict, raising=False)
    with pytest.raises(UserError, match="no rare word of three letters. Give one: --set token="):
        tokens.rare(model)


def test_a_word_of_several_tokens_is_remarked_on(model):
    word, remark = tokens.choose(model, "xxyzzy")
    assert word == "xxyzzy" and "is 6 tokens" in remark


def test_sks_is_remarked_on_where_it_means_something(model, monkeypatch):
    rich = with_words(model, ["sks"])
    assert "a rifle" in tokens.choose(rich, "sks")[1]
    rich.name = "toyland"
    assert tokens.choose(rich, "sks") == ("sks", "")


def test_a_good_word_is_taken_without_a_remark(model):
    assert tokens.choose(with_words(model, ["qxv"]), "qxv") == ("qxv", "")


@pytest.mark.parametrize("word", [" ", "two words", " sks", "sks "])
def test_what_is_not_one_word_is_the_users_error(model, word):
    with pytest.raises(UserError, match="is not one word"):
        tokens.choose(model, word)
