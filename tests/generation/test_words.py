"""Words and their tokens: found by the tokenizer's offsets, aligned word by word, and left out of what the encoders read."""

import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.generation.words import PLAIN, Emphasis, align, encode_words, read_emphasis, require_words, tokens_of


@pytest.fixture(scope="module")
def toyland():
    return models.load_model("toyland", device="cpu", dtype="float32", say=lambda line: None)


@pytest.fixture(scope="module")
def model(toyland):
    """Toyland with a learned word of two tokens, as textual inversion leaves it in tokenizer and model."""
    toyland.tokenizers["text_encoder"].add_tokens(["<rex>", "<rex>_1"])
    toyland.learned_words["<rex>"] = "<rex> <rex>_1"
    yield toyland
    del toyland.learned_words["<rex>"]


@pytest.fixture(scope="module", params=["tiny_sdxl", "toyland"])
def base(request):
    name = request.param if request.param == "toyland" else str(request.getfixturevalue(request.param))
    return models.load_model(name, device="cpu", dtype="float32", say=lambda line: None)


def said(model, prompt, positions):
    """The tokens at these positions, as the encoder gets them."""
    ids = model.tokens("text_encoder", [prompt])[0, positions]
    return model.tokenizers["text_encoder"].decode(ids).replace(" ", "")


@pytest.mark.parametrize(
    ("prompt", "phrase", "tokens"),
    [
        ("a red dog on the beach", "dog", "dog"),
        ("a  red\tdog on the beach", "red dog", "reddog"),
        ("a RED dog", "red", "red"),
        ("a dog, a hat and a dog", "dog", "dogdog"),
        ("a dogged dog", "dog", "dog"),
        ("a dog's hat", "hat", "hat"),
        ("a café dog in the snow", "dog in", "dogin"),
        ("a <rex> dog on the beach", "<rex>", "<rex><rex>_1"),
        ("a <REX> dog on the beach", "dog", "dog"),
        ("a dog", "cat", ""),
        ("a dog", "do", ""),
    ],
)
def test_a_word_is_every_token_of_its_letters(model, prompt, phrase, tokens):
    assert said(model, prompt, tokens_of(model, prompt, phrase)) == tokens


def table(model, source, target):
    """The alignment in words: target token -> what it takes, by share."""
    shares, own = align(model, source, target)
    texts = [
        [model.tokenizers["text_encoder"].decode(i).strip() for i in model.tokens("text_encoder", [p])[0]]
        for p in (source, target)
    ]
    return [
        (texts[1][j], {texts[0][i]: shares[i, j].item() for i in shares[:, j].nonzero().flatten().tolist()})
        for j in range(len(own))
    ]  # fmt: skip


def test_the_same_words_are_the_identity(model):
    shares, own = align(model, "a red dog on the beach", "a red dog on the beach")
    assert torch.equal(shares, torch.eye(len(own))) and not own.any()


def test_one_word_for_another_takes_its_map_also_in_the_middle_of_two(model):
    assert table(model, "a red dog on the beach", "a blue cat on the beach")[1:8] == [
        ("a", {"a": 1}), ("blue", {"red": 1}),
        ("cat", {"dog": 1}), ("on", {"on": 1}), ("the", {"the": 1}), ("beach", {"beach": 1}),
        ("<|endoftext|>", {"<|endoftext|>": 1}),
    ]  # fmt: skip


def test_words_of_other_token_counts_share_the_map_and_what_follows_is_not_shifted(model):
    """The official mapper puts 1 on its diagonal after a word of another length (google/prompt-to-prompt#53)."""
    shares, own = align(model, "a dog on the beach", "a <rex> on the beach")
    assert shares[2, 2:4].tolist() == [0.5, 0.5] and not own[:9].any()
    assert [shares[i, i + 1].item() for i in range(3, 8)] == [1.0] * 5, "on, the, beach and the end"
    back, _ = align(model, "a <rex> on the beach", "a dog on the beach")
    assert back[2:4, 2].tolist() == [1, 1], "attention to all of its tokens together"


def test_added_words_have_their_own_map_and_the_end_is_matched_from_the_end_of_the_words(model):
    shares, own = align(model, "a dog in the snow", "a red dog in the snow")
    assert own.nonzero().flatten().tolist() == [2] and not shares[:, 2].any()
    assert [shares[i, i + 1].item() for i in range(2, len(own) - 1)] == [1.0] * (len(own) - 3)
    shares, own = align(model, "a red dog in the snow", "a dog in the snow")
    assert own.nonzero().flatten().tolist() == [len(own) - 1], "padding that the source has no partner for"
    assert not shares[2].any()


@pytest.mark.parametrize(
    ("source", "target"),
    [("a dog", "a <rex> dog wearing a hat"), ("", "a dog"), ("a dog", ""), ("dog " * 60, "a cat"), ("a dog", "cat " * 60)],
)
def test_every_token_has_a_map_of_the_source_or_its_own(model, source, target):
    shares, own = align(model, source, target)
    taken = shares.sum(0)
    assert ((taken > 0) != (own > 0)).all() and shares.isfinite().all() and shares[0, 0] == 1


def test_ignored_words_are_not_read_by_the_encoders(base):
    """What follows "red" is encoded as if any other word stood there; without the mask it is not."""
    prompts = ["a red hat", "a dog hat"]
    with torch.no_grad():
        masked = encode_words(base, prompts, [Emphasis(ignored=("red",)), Emphasis(ignored=("dog",))])
        plain = encode_words(base, prompts, [PLAIN, PLAIN])
    position = tokens_of(base, "a red hat", "red")[0]
    after = slice(position + 1, None)
    torch.testing.assert_close(masked["text"][0, after], masked["text"][1, after], rtol=0, atol=1e-5)
    assert (plain["text"][0, after] - plain["text"][1, after]).abs().max() > 1e-3
    assert torch.equal(masked["text"][:, :position], plain["text"][:, :position])
    if "pooled" in masked:
        torch.testing.assert_close(masked["pooled"][0], masked["pooled"][1], rtol=0, atol=1e-5)
    for name in (name for name in masked if name.startswith("attn2:")):
        k, v = masked[name].chunk(2, -1)
        assert not v[0, position].any() and v[0, position + 1].any() and k[0, position].any()


def test_without_emphasis_prompts_are_encoded_as_ever(base):
    with torch.no_grad():
        plain, expected = encode_words(base, ["a red hat"], [PLAIN]), base.prepare(base.encode_prompts(["a red hat"]))
    assert plain.keys() == expected.keys() and all(torch.equal(plain[key], expected[key]) for key in plain)


def test_weights_are_read_and_what_is_none_is_refused():
    assert read_emphasis(["hat=1.5", "a = b=-2"], [" blue "]) == Emphasis((("hat", 1.5), ("a = b", -2.0)), ("blue",))
    assert not read_emphasis([], [])
    for text in ("hat", "hat=", "=2", "hat=big", "hat=nan", "hat=inf"):
        with pytest.raises(UserError, match=f"weight '{text}' is not WORD=NUMBER.*--weight hat=1.5"):
            read_emphasis([text], [])
    with pytest.raises(UserError, match="--ignore is empty"):
        read_emphasis([], [" "])


def test_a_word_that_no_prompt_says_is_named_with_its_nearest(model):
    require_words(model, ["a dog", "a dog wearing a blue hat"], Emphasis((("hat", 2.0),), ("wearing a blue hat",)))
    for phrase, hint in (("hut", "did you mean 'hat'"), ("waering a blue hat", "did you mean 'wearing a blue hat'")):
        with pytest.raises(UserError, match=f"no prompt says '{phrase}'.*{hint}"):
            require_words(model, ["a dog wearing a blue hat"], Emphasis(ignored=(phrase,)))


def test_a_word_that_is_cut_off_is_named_with_what_is_not_seen(model):
    with pytest.raises(UserError, match="'red hat' is in the part of prompt .* does not see: 'red hat'. Shorten"):
        require_words(model, ["dog " * 30 + "red hat"], Emphasis(ignored=("red hat",)))


def test_a_base_whose_attention_cannot_be_controlled_is_refused(model, monkeypatch):
    monkeypatch.setattr("personalize.generation.attention_control.why_not_fast", lambda unet: "act_fn is 'gelu'")
    with pytest.raises(UserError, match="attention cannot be controlled, for act_fn is 'gelu'"):
        require_words(model, ["a dog"], Emphasis(ignored=("dog",)))
    require_words(model, ["a dog"], PLAIN)
