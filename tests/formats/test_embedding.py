"""Textual-inversion files, as diffusers, AUTOMATIC1111 and kohya write them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.common.errors import UserError
from personalize.formats import embedding

ONE = {"text_encoder": torch.randn(3, 8)}
TWO = {"text_encoder": torch.randn(3, 8), "text_encoder_2": torch.randn(3, 12)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "learned_embeds.safetensors"


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("rows", [ONE, TWO], ids=["one encoder", "two"])
def test_what_is_written_is_what_is_read(path, rows):
    embedding.write_diffusers(path, "<my dog>", rows)
    token, found = embedding.read_embedding(path)
    assert equal(found, rows) and token == ("<my dog>" if len(rows) == 1 else "")
    embedding.write_a1111(path, rows)
    token, found = embedding.read_embedding(path)
    assert equal(found, rows) and token == ""


def test_the_names_that_others_look_for(path):
    embedding.write_diffusers(path, "<x>", ONE)
    assert set(load_file(path)) == {"<x>"}
    embedding.write_a1111(path, ONE)
    assert set(load_file(path)) == {"emb_params"}
    embedding.write_a1111(path, TWO)
    assert {k: v.shape[1] for k, v in load_file(path).items()} == {"clip_l": 8, "clip_g": 12}


def test_a_single_row_may_be_a_vector(path):
    save_file({"<x>": torch.ones(8)}, path)
    assert embedding.read_embedding(path)[1]["text_encoder"].shape == (1, 8)


@pytest.mark.parametrize(
    "tensors, word",
    [
        ({}, "0 tensors"),
        ({"a": torch.ones(2, 8), "b": torch.ones(2, 8)}, "not a textual-inversion embedding"),
        ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 12)}, "2 and 3 rows"),
        ({"<x>": torch.ones(2, 8, 1)}, "not rows"),
        ({"<x>": torch.ones(0, 8)}, "not rows"),
        ({"<x>": torch.ones(2, 8, dtype=torch.int64)}, "not rows"),
        ({"<x>": torch.full((2, 8), float("nan"))}, "not a finite number"),
    ],
)
def test_what_is_no_embedding_is_refused(path, tensors, word):
    save_file(tensors, path)
    with pytest.raises(UserError, match=word):
        embedding.read_embedding(path)


def test_a_pickle_is_not_opened(path):
    for ending in (".pt", ".bin"):
        with pytest.raises(UserError, match="is a pickle.*textual-inversion"):
            embedding.read_embedding(path.with_suffix(ending))


@pytest.mark.parametrize("token", ["", "__metadata__"])
def test_a_token_that_cannot_be_a_name_is_refused(path, token):
    with pytest.raises(UserError, match="cannot stand"):
        embedding.write_diffusers(path, token, ONE)
