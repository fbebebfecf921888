"""The tokenizer of a base that comes as one file, and so without."""

import json

import pytest
import tiny_releases as tiny

from personalize.common.errors import UserError
from personalize.formats import clip_tokenizer


def test_a_tokenizer_in_one_file_is_read_too(tmp_path):
    folder = tiny.vocabulary(tmp_path / "tokenizer")
    pieces = json.loads((folder / "vocab.json").read_text())
    one = {"model": {"vocab": pieces, "merges": [["a", "b"], "c d"]}}
    (folder / "tokenizer.json").write_text(json.dumps(one))
    assert clip_tokenizer.read_vocabulary(tmp_path / "m") == (pieces, "#version: 0.2\n"), "two files come first"
    (folder / "merges.txt").unlink()
    assert clip_tokenizer.read_vocabulary(tmp_path / "m") == (pieces, "#version: 0.2\na b\nc d\n")


@pytest.mark.parametrize("text", ["[]", '{"a": "0"}', '{"a": 1}', '{"a": 0}', '{"a": 0, "b": 0}', '{"model": {"vocab": {}}}'])
def test_a_vocabulary_that_is_none_is_refused(tmp_path, text):
    folder = tiny.vocabulary(tmp_path / "tokenizer")
    (folder / "vocab.json").write_text(text)
    with pytest.raises(UserError, match="is no vocabulary|expected an object"):
        clip_tokenizer.read_vocabulary(tmp_path / "m")
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json"):
        clip_tokenizer.read_vocabulary(tmp_path / "m")
