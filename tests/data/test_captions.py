"""Captions: which file is one, what its bytes say, and whether it says the word that is trained."""

import codecs
import shutil

import pytest

from personalize.common.errors import UserError
from personalize.data.captions import check_captions, read_caption
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


def checked(toyland, photo, caption, template="a {token} {class}", *, learns_word=False, **more):
    if caption:
        photo.with_name("a.txt").write_text(caption)
    return check_captions(toyland, load_photos(photo, min_size=1)[0], template, learns_word=learns_word, **TOKEN | more)


def test_a_caption_without_the_token_is_said_and_refused_where_a_word_is_learned(toyland, photo):
    assert checked(toyland, photo, "A SKS dog, running") == [] == checked(toyland, photo, "my {token}'s {class}")
    (remark,) = checked(toyland, photo, "a dog running")
    assert "a.png does not say 'sks': what these photos show is taught to every dog" in remark
    with pytest.raises(UserError, match="a.png does not say 'sks', the word that is learned. Write {token}"):
        checked(toyland, photo, "a dog running", learns_word=True)
    photo.with_name("a.txt").unlink()
    with pytest.raises(UserError, match="train.prompt does not say 'sks'"):
        checked(toyland, photo, "", "a dog", learns_word=True)


def test_what_is_cut_off_is_said_and_refused_where_the_token_is(toyland, photo):
    (remark,) = checked(toyland, photo, "a {token} {class} " + "in the snow " * 40)
    assert "too long for this base, which does not see" in remark
    with pytest.raises(UserError, match="and with it not 'sks'. Shorten it, or put {token} first"):
        checked(toyland, photo, "in the snow " * 40 + "a {token} {class}")


def test_a_brace_in_a_caption_names_the_file(toyland, photo):
    with pytest.raises(UserError, match="the caption of .*a.png: prompt .*unbalanced braces"):
        checked(toyland, photo, "a {token} {class")


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
