"""Prompt templates and the DreamBench lists."""

import pytest

from personalize.common.errors import UserError
from personalize.common.prompts import LIVE, OBJECT, dreambench, fill, read_prompts, without_token


@pytest.mark.parametrize("prompts", [LIVE, OBJECT])
def test_a_dreambench_list_has_25_different_prompts_with_both_placeholders(prompts):
    assert len(prompts) == len(set(prompts)) == 25
    assert all("{token} {class}" in prompt for prompt in prompts)


def test_the_dreambench_lists_differ_exactly_in_prompts_11_to_20():
    differ = [n for n, (live, thing) in enumerate(zip(LIVE, OBJECT, strict=True), 1) if live != thing]
    assert differ == list(range(11, 21))
    assert not set(LIVE[10:20]) & set(OBJECT[10:20])


def test_dreambench_prompts_read_as_published():
    assert fill(LIVE[13], "sks", "dog") == "a sks dog wearing a black top hat and a monocle"
    assert fill(OBJECT[17], "sks", "can") == "a sks can on top of the sidewalk in a crowded street"
    assert fill(OBJECT[24], "sks", "can") == "a cube shaped sks can"
    assert fill(LIVE[20], "sks", "cat") == "a red sks cat"


def test_only_cats_and_dogs_are_live():
    assert dreambench("Dog ") is LIVE
    assert dreambench("cat") is LIVE
    assert dreambench("backpack") is OBJECT


@pytest.mark.parametrize(
    "template, filled",
    [
        ("a {token} {class}, {class} again", "a sks dog, dog again"),
        ("no placeholder", "no placeholder"),
        ("{{literal}} {class}", "{literal} dog"),
    ],
)
def test_fill_replaces_placeholders(template, filled):
    assert fill(template, "sks", "dog") == filled


def test_an_empty_token_or_class_leaves_one_space():
    assert fill("a {token} {class} in snow", "", "dog") == "a dog in snow"
    assert fill("a {token} {class}", "sks", "") == "a sks"


def test_a_value_with_braces_is_not_filled_again():
    assert fill("a {token}", "{class}", "dog") == "a {class}"


@pytest.mark.parametrize(
    "template, says",
    [
        ("a {tokne} dog", "{tokne}; did you mean 'token'?"),
        ("a {} dog", "{}"),
        ("a {token.__class__}", "{token.__class__}"),
        ("a {token!r}", "{token!r}"),
        ("a {token:>9}", "{token:>9}"),
        ("a {token dog", "unbalanced braces"),
        ("a token} dog", "unbalanced braces"),
    ],
)
def test_a_template_at_fault_is_named_with_its_fault(template, says):
    with pytest.raises(UserError) as error:
        fill(template, "sks", "dog")
    assert says in str(error.value)
    assert repr(template) in str(error.value)


@pytest.mark.parametrize(
    "text, rest",
    [
        ("a sks dog in the jungle", "a dog in the jungle"),
        ("a photo of SKS, in snow", "a photo of, in snow"),
        ("a sksy dog near msks", "a sksy dog near msks"),
        ("sks", ""),
    ],
)
def test_without_token_drops_the_whole_word_only(text, rest):
    assert without_token(text, "sks") == rest


def test_without_token_takes_a_token_literally():
    assert without_token("a <my.dog*> dog", "<my.dog*>") == "a dog"
    assert without_token("a dog", "") == "a dog"


def test_read_prompts_skips_blank_lines_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa {token} {class}\r\n\r\n  # a note\n  a red {class}  \n")
    assert read_prompts(path) == ["a {token} {class}", "a red {class}"]


def test_a_prompt_file_without_prompts_is_an_error(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path)


def test_an_unreadable_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.txt"):
        read_prompts(tmp_path / "missing.txt")
    binary = tmp_path / "photo.png"
    binary.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"photo\.png"):
        read_prompts(binary)
