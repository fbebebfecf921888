"""The tokenizer of a base that comes as one file, and so without."""

import json

import pytest
import tiny_releases as tiny

from personalize.common.errors import UserError
from personalize.formats import clip_tokenizer


def test_a_tokenizer_is_taken_from_where_it_is_said_to_be(tmp_path):
    given, beside = tiny.vocabulary(tmp_path / "given"), tiny.vocabulary(tmp_path / "tokenizer")
    (beside / "merges.txt").write_text("#version: 0.2\na b\n")
    path = tmp_path / "m.safetensors"
    assert clip_tokenizer.vocabulary(path, given)[1] == "#version: 0.2\n"
    assert clip_tokenizer.vocabulary(path, None)[1] == "#version: 0.2\na b\n"
    with pytest.raises(UserError, match="is no folder"):
        clip_tokenizer.vocabulary(path, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither vocab.json"):
        clip_tokenizer.vocabulary(path, tmp_path / "empty")


def test_a_tokenizer_in_one_file_is_read_too(tmp_path):
    pieces = json.loads((tiny.vocabulary(tmp_path / "t") / "vocab.json").read_text())
    (tmp_path / "one").mkdir()
    one = {"model": {"vocab": pieces, "merges": [["a", "b"], "c d"]}}
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(one))
    assert clip_tokenizer.vocabulary(tmp_path / "m", tmp_path / "one") == (pieces, "#version: 0.2\na b\nc d\n")


@pytest.mark.parametrize("text", ["[]", '{"a": "0"}', '{"a": 1}', '{"a": 0}', '{"a": 0, "b": 0}', '{"model": {"vocab": {}}}'])
def test_a_vocabulary_that_is_none_is_refused(tmp_path, text):
    folder = tiny.vocabulary(tmp_path / "t")
    (folder / "vocab.json").write_text(text)
    with pytest.raises(UserError, match="is no vocabulary"):
        clip_tokenizer.vocabulary(tmp_path / "m", folder)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json"):
        clip_tokenizer.vocabulary(tmp_path / "m", folder)
