"""Weights in prompts: compel's own result, in its place among chunks; what is refused, and what is said without it."""

import importlib.util

import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.common.prompts import parts_at_commas, weighted_pieces, weights_read_as_text
from personalize.evaluation.image_cache import image_set
from personalize.evaluation.protocols import Protocol
from personalize.generation.editing import Edit, require_edit
from personalize.generation.words import Emphasis, changed_tokens, require_words, tokens_of, words_of

needs_compel = pytest.mark.skipif(importlib.util.find_spec("compel") is None, reason="compel is not installed")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (red:1.3) hat", [("a ", 1), ("red", 1.3), (" hat", 1)]),
        ("((a:2) b: .5 ) c", [("a", 1), (" b", 0.5), (" c", 1)]),
        ("a (b) (c:2", [("a (b) (c:2", 1)]),
        (r"x\(y:2\) ((z:0.5))", [("x(y:2) (", 1), ("z", 0.5), (")", 1)]),
        ("(:2)16:9) a", [("16:9) a", 1)]),
        ("", []),
    ],
)
def test_a_text_is_read_in_pieces_of_one_weight(text, pieces):
    assert weighted_pieces(text) == pieces


@pytest.mark.parametrize("weight", ["-1", "10.5", "1" * 400])
def test_a_weight_that_is_none_is_named_with_its_prompt(weight):
    with pytest.raises(UserError, match=rf"prompt 'a \(red:{weight}\) hat': 'red' has the weight {weight}. Give a number"):
        weighted_pieces(f"a (red:{weight}) hat")


def test_a_hundred_thousand_brackets_take_no_time():
    assert len(weighted_pieces("(" * 50_000 + "a" + ":1)" * 50_000)) == 1


def test_a_weight_that_is_read_as_text_is_said():
    (line,) = weights_read_as_text(["a dog", "a (red hat: 1.3) dog", "(a:2)"], "")
    assert line.startswith("'(red hat: 1.3)' is read as letters") and "--set prompt.weighting=compel" in line
    assert weights_read_as_text(["a (red:1.3) dog"], "compel") == weights_read_as_text(["a (red) dog: 2"], "") == []


@pytest.mark.parametrize("text", ["a, (b, c:1.2), d", "((a, b:2), (c:2), d:1.3) e, f", "", ",a,,", "(a, b"])
def test_words_of_one_weight_stay_together_in_a_shuffle(text):
    assert parts_at_commas(text, "") == text.split(",")
    parts = parts_at_commas(text, "compel")
    assert ",".join(parts) == text
    assert {"a, (b, c:1.2), d": 3, "((a, b:2), (c:2), d:1.3) e, f": 2, "": 1, ",a,,": 4, "(a, b": 1}[text] == len(parts)


def test_images_are_scored_by_the_words_without_their_weights():
    options = {"class_prompt": "a {class}", "token": "sks", "word": "dog"}
    protocol = Protocol("p", ("a ({token}:1.2) {class} in (snow:1.3)",), 1, 1)
    weighted = image_set(protocol, None, **options, weighting="compel")
    assert weighted.plain == ["a dog in snow", "a dog"] and weighted.jobs[0][0] == "a (sks:1.2) dog in (snow:1.3)"


def test_without_the_package_the_setting_says_how_to_get_it(tiny_sd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r'needs the package compel: pip install "compel>=2.5"'):
        models.load_model(str(tiny_sd), device="cpu", weighting="compel", say=lambda line: None)


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def plain(request):
    return models.load_model(str(request.getfixturevalue(request.param)), device="cpu", dtype="float32", say=lambda line: None)


@pytest.fixture
def model(plain, monkeypatch):
    """As with prompt.weighting = "compel", which nothing below needs until a word with a weight is encoded."""
    monkeypatch.setattr(plain, "weighting", "compel")
    return plain


def encoded(model, *prompts):
    with torch.no_grad():
        return model.encode_prompts(list(prompts))


def test_words_are_found_by_the_text_without_its_weights(model):
    prompt = "a (red:1.3) hat, (a dog:0.5)"
    assert tokens_of(model, prompt, "red hat") == [2, 3] and tokens_of(model, prompt, "dog") == [6]
    assert list(words_of(model, prompt)) == ["a", "red", "hat", "dog"] and model.says(prompt, "red hat")
    assert changed_tokens(model, "a red hat", "a (red:2) hat", Emphasis()) == ([2], [2])
    assert model.truncated_words("dog " * 30 + "(red:1.3) hat").split() == ["red", "hat"]


def test_a_word_is_weighted_in_one_way(model):
    with pytest.raises(UserError, match=r"'red' has the weight 1.3 in prompt .* and another by --weight"):
        require_words(model, ["a (red:1.3) hat"], Emphasis((("red", 1.5),)))
    with pytest.raises(UserError, match=r"prompt .* has weights, and --ignore 'hat' leaves out words"):
        require_words(model, ["a (red:1.3) hat"], Emphasis(ignored=("hat",)))
    require_words(model, ["a (red:1.3) hat", "a dog"], Emphasis((("hat", 1.5),), ("dog",)))


def test_an_edit_of_a_weight_alone_is_one(model):
    require_edit(model, Edit("a red hat", "a (red:1.3) hat"))
    with pytest.raises(UserError, match="base reads both alike"):
        require_edit(model, Edit("a red hat", "a (red:1) hat"))


def test_without_a_weight_the_bits_are_those_of_without_the_setting(model, monkeypatch):
    found = encoded(model, "a red hat", "a (red) hat", "")
    monkeypatch.setattr(model, "weighting", "")
    expected = encoded(model, "a red hat", "a (red) hat", "")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@needs_compel
@pytest.mark.parametrize("weight", [1.4, 0.5, 0])
def test_a_weighted_prompt_is_what_compel_makes_of_it(model, weight):
    from compel import Compel, ReturnedEmbeddingsType

    kinds = ReturnedEmbeddingsType
    which = (
        kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if "pooled" in encoded(model, "a")
        else kinds.LAST_HIDDEN_STATES_NORMALIZED
    )
    theirs = []
    for part, encoder in model.text_encoders.items():
        made = Compel(model.tokenizers[part], encoder, returned_embeddings_type=which)
        theirs.append(made(f"a photo of a (red hat){weight} in the snow"))
    cond = encoded(model, f"a photo of a (red hat:{weight}) in the snow", "a photo of a red hat in the snow")
    torch.testing.assert_close(cond["text"][0], torch.cat(theirs, -1)[0], rtol=0, atol=1e-5)
    assert (cond["text"][0] - cond["text"][1]).abs().max() > 1e-3
    if "pooled" in cond:
        assert torch.equal(cond["pooled"][0], cond["pooled"][1]), "the pooled text has no weights, as in compel"


@needs_compel
def test_a_weight_changes_the_chunk_that_has_it_and_trains(model, monkeypatch):
    monkeypatch.setattr(model, "chunks", 2)
    cond = encoded(model, "dog " * 35 + "(red:1.4) hat", "dog " * 35 + "red hat")
    (place,) = tokens_of(model, "dog " * 35 + "(red:1.4) hat", "red")
    differs = (cond["text"][0] - cond["text"][1]).abs().amax(-1) > 1e-6
    assert place == 36 and differs.nonzero().flatten().tolist() == [place], "a weight above 1 is the word's own"
    table = model.text_encoders["text_encoder"].get_input_embeddings()
    table.weight.requires_grad_(True)
    model.encode_prompts(["dog " * 35 + "(red:0.5) hat"])["text"].square().sum().backward()
    (red,) = model.tokenizers["text_encoder"]("red", add_special_tokens=False).input_ids
    assert table.weight.grad[red].abs().sum() > 0
    table.weight.requires_grad_(False).grad = None


@needs_compel
def test_marks_of_the_tokenizer_in_a_prompt_have_no_weight(model):
    cond = encoded(model, "a (<|endoftext|>:0.5) (dog:1.5)", "a <|endoftext|> dog")
    assert cond["text"].isfinite().all() and (cond["text"][0] - cond["text"][1]).abs().max() > 1e-3
