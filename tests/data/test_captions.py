"""Captions: which file is one, what its bytes say, and whether it says the word that is trained."""

import codecs
import shutil

import pytest

from personalize.common.errors import UserError
from personalize.data.captions import add_token, check_captions, read_caption
from personalize.data.photos import load_photos
from personalize.models import load_model

TOKEN = {"token": "sks", "word": "dog"}


@pytest.fixture(scope="module")
def toyland():
    return load_model("toyland", device="cpu", dtype="float32", say=lambda line: None)


@pytest.fixture
def photo(tmp_path, photos):
    return shutil.copy(photos / "00.png", tmp_path / "a.png") and tmp_path / "a.png"


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.png.txt", "a.png.Caption"])
@pytest.mark.parametrize("mark, encoding", [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                                            (codecs.BOM_UTF16_BE, "utf-16-be")])  # fmt: skip
def test_a_caption_is_read_whatever_its_ending_and_its_mark(photo, name, mark, encoding):
    photo.with_name(name).write_bytes(mark + "a  sks dög\r\n".encode(encoding))
    assert read_caption(photo) == "a sks dög"


def test_a_row_of_an_imagefolder_is_a_caption(photo):
    photo.with_name("metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "no"}\n{"file_name": "a.png", "text": "a sks dog"}\n'
    )
    assert read_caption(photo) == "a sks dog"
    assert [p.caption for p in load_photos(photo.parent, min_size=1)[0]] == ["a sks dog"]


@pytest.mark.parametrize("data", ["a sks dog".encode("utf-16-le"), "a dög".encode("latin-1"), b"a\0b"])
def test_what_is_no_text_is_refused_with_the_file_and_the_remedy(photo, data):
    photo.with_name("a.txt").write_bytes(data)
    with pytest.raises(UserError, match="a.txt is not UTF-8 text. Save it as UTF-8"):
        read_caption(photo)


def test_two_captions_are_refused(photo):
    for name in ("a.txt", "a.caption"):
        photo.with_name(name).write_text("a dog")
    with pytest.raises(UserError, match="a.png has 2 captions: a.caption, a.txt. Keep one"):
        read_caption(photo)


def test_a_line_of_a_list_is_a_caption_with_quotes_or_without(photo):
    photo.with_name("captions.toml").write_text('b.c.png = "no"\n"a.png" = """a  sks\ndog"""\n')
    photo.with_name("b.c.png").touch()
    assert read_caption(photo) == "a sks dog"
    assert read_caption(photo.with_name("b.c.png")) == "no"
    photo.with_name("captions.toml").write_text('a.png = "a sks dog"\n')
    assert [p.caption for p in load_photos(photo, min_size=1)[0]] == ["a sks dog"]


@pytest.mark.parametrize(
    "text, said",
    [('"a.jpg" = "a dog"', "captions.toml has a caption for 'a.jpg', and no such file"), ("a.png = 3", "of 'a.png' is no text"),
     ("a.png = ", "list of captions .*captions.toml is not TOML"), (f"{'a.' * 500}png = ''", "the caption of 'a.a")],
)  # fmt: skip
def test_a_list_with_a_wrong_line_is_refused_by_name(photo, text, said):
    photo.with_name("captions.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_caption(photo)


@pytest.mark.parametrize("two", [("a.txt", "captions.toml"), ("a.txt", "metadata.jsonl"), ("metadata.jsonl", "captions.toml")])
def test_two_sources_of_a_caption_are_refused_even_where_they_agree(photo, two):
    row = '{"file_name": "a.png", "text": "a dog"}\n'
    contents = {"a.txt": "a dog", "captions.toml": 'a.png = "a dog"', "metadata.jsonl": row}
    for name in two:
        photo.with_name(name).write_text(contents[name])
    with pytest.raises(UserError, match=f"a.png has 2 captions: {', '.join(two)}. Keep one"):
        read_caption(photo)
    for name in two:
        photo.with_name(name).unlink()
    photo.with_name("metadata.jsonl").write_text(row * 2)
    with pytest.raises(UserError, match="2 captions: metadata.jsonl, metadata.jsonl"):
        read_caption(photo)


def with_caption(photo, caption):
    if caption:
        photo.with_name("a.txt").write_text(caption)
    return load_photos(photo, min_size=1)[0]


def checked(toyland, photo, caption, template="a {token} {class}", *, learns_word=False, **more):
    return check_captions(toyland, with_caption(photo, caption), template, learns_word=learns_word, **TOKEN | more)


def test_a_caption_without_the_token_is_refused_where_it_is_not_added(toyland, photo):
    assert checked(toyland, photo, "A SKS dog, running") == [] == checked(toyland, photo, "my {token}'s {class}")
    for learns_word in (False, True):
        with pytest.raises(UserError, match="a.png does not say 'sks'. Write {token} .*captions.add_token=true"):
            checked(toyland, photo, "a dog running", learns_word=learns_word)
    photo.with_name("a.txt").unlink()
    (remark,) = checked(toyland, photo, "", "a dog")
    assert "train.prompt does not say 'sks': what these photos show is taught to every dog" in remark
    with pytest.raises(UserError, match="train.prompt does not say 'sks', the word that is learned"):
        checked(toyland, photo, "", "a dog", learns_word=True)


@pytest.mark.parametrize(
    "caption, trained",
    [
        ("a dog in the snow", "a {token} dog in the snow"),
        ("A DOG, two dogs, a dog", "A {token} DOG, two dogs, a dog"),
        ("a red {class} asleep", "a red {token} {class} asleep"),
        ("in the snow, at night", "a {token} {class}, in the snow, at night"),
        ("two dogs and a hot-dog", "a {token} {class}, two dogs and a hot-dog"),
        ("in the snow " * 40 + "a dog", "a {token} {class}, " + "in the snow " * 40 + "a dog"),
        ("a {token} in the snow", None),
        ("portrait of Sks", None),
    ],
)
def test_the_token_is_put_before_the_class_word_or_before_all(toyland, photo, caption, trained):
    before = with_caption(photo, caption)
    ((after,), remarks) = add_token(toyland, before, **TOKEN)
    assert after.caption == (trained or caption)
    assert (after is before[0]) == (trained is None) == (remarks == [])
    if trained:
        assert remarks[0].startswith("the caption of a.png did not say 'sks', which was put in: 'a ") or "'A sks" in remarks[0]
    assert check_captions(toyland, [after], "", **TOKEN, learns_word=True)[1:] == []


def test_an_article_goes_with_the_token_and_one_line_says_it_of_all_photos(toyland, photo):
    shutil.copy(photo, photo.with_name("b.png"))
    for name in "ab":
        photo.with_name(f"{name}.txt").write_text("an owl in the snow")
    after, remarks = add_token(toyland, load_photos(photo.parent, min_size=1)[0], token="sks", word="owl")
    assert [p.caption for p in after] == ["a {token} owl in the snow"] * 2
    (remark,) = remarks
    assert "the caption of a.png and of 1 more did not say 'sks', which was put in: 'a sks owl in the snow'" in remark


def test_what_is_cut_off_is_said_and_refused_where_the_token_is(toyland, photo):
    (remark,) = checked(toyland, photo, "a {token} {class} " + "in the snow " * 40)
    assert "too long for this base, which does not see" in remark
    with pytest.raises(UserError, match="and with it not 'sks'. Shorten it, or put {token} first"):
        checked(toyland, photo, "in the snow " * 40 + "a {token} {class}")


def test_a_brace_in_a_caption_names_the_file(toyland, photo):
    for read in (checked, lambda toyland, photo, text: add_token(toyland, with_caption(photo, text), **TOKEN)):
        with pytest.raises(UserError, match="the caption of .*a.png: prompt .*unbalanced braces"):
            read(toyland, photo, "a {token} {class")


@pytest.mark.parametrize(
    "text, said",
    [("portrait of sks, a dog", True), ("sks's dog", True), ("(sks dog:1.2)", True), ("a SKS dog", True), ("a dog", False),
     ("a sksdog", False), ("asks a dog", False)],
)  # fmt: skip
def test_a_word_is_said_as_the_tokenizer_reads_it(toyland, text, said):
    assert toyland.says(text, "sks") == said


def test_a_learned_word_is_no_part_of_a_longer_one(toyland, monkeypatch):
    monkeypatch.setattr(toyland, "learned_words", {"qmj": "qmj qmj_1", "<s>": "<s> <s>_1"})
    assert toyland.expand_words("qmjolnir, QMJ aqmj <s>") == "qmjolnir, qmj qmj_1 aqmj <s> <s>_1"
