"""Textual inversion: how a new word is spelled, what its vectors begin as, and whose files are read."""

import pytest
import torch
from method_cases import OPTIONS, Case, attached, base, learned, predicted, read, saved
from safetensors.torch import load_file, save_file

from personalize.common.errors import UserError
from personalize.methods import textual_inversion


def test_a_word_of_several_vectors_is_all_of_its_tokens(tiny_sd):
    model, case = base(tiny_sd), OPTIONS[5]
    assert case.settings[0] == "embedding.vectors=3"
    before = model.tokens("text_encoder", ["a red hat"])
    attached(model, case.recipe())
    first = len(read(tiny_sd, "float32").tokenizers["text_encoder"])
    ids = model.tokens("text_encoder", ["a <zqv> dog", "a <ZQV>, dog", "a dog"])
    assert (
        [i for i in ids[0].tolist() if i >= first]
        == [first, first + 1, first + 2]
        == [i for i in ids[1].tolist() if i >= first]
    )
    assert (ids[2] < first).all() and torch.equal(model.tokens("text_encoder", ["a red hat"]), before)
    long = "a dog " * 14
    assert not model.truncated_words(long + "hat") and model.truncated_words(long + "<zqv>")
    table = model.text_encoders["text_encoder"].get_input_embeddings()
    words = model.tokenizers["text_encoder"]("a photo of dog", add_special_tokens=False).input_ids
    assert torch.equal(table.of("<zqv>"), table.known.weight[words[:3]])


def test_further_vectors_begin_near_the_word_and_apart_by_the_seed(tiny_sd):
    rows = []
    for seed in (0, 0, 1):
        model = base(tiny_sd)
        attached(model, Case(("textual-inversion",), ("embedding.vectors=3", f"seed={seed}")).recipe())
        rows.append(model.text_encoders["text_encoder"].get_input_embeddings().of("<zqv>").detach())
    dog = read(tiny_sd, "float32").text_encoders["text_encoder"].get_input_embeddings().weight[519]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0][0], dog) and not torch.equal(rows[0][1:], rows[2][1:])
    assert 0.05 < (rows[0][1] - dog).std() / dog.std() < 0.2 and not torch.equal(rows[0][1], rows[0][2])


def test_words_that_are_not_new_or_too_alike_are_refused(tiny_sd, tmp_path):
    for words, said in (
        ("dog", "has a meaning"),
        ("DOG", "has a meaning"),
        ("<a>,<A>", "files of the same name"),
        ("[]", "no token"),
    ):
        with pytest.raises(UserError, match=said):
            attached(base(tiny_sd), Case(("textual-inversion",), (f"token={words}", "embedding.init=dog")).recipe())
    saved(tiny_sd, Case(("textual-inversion",)), tmp_path)
    model = base(tiny_sd)
    assert textual_inversion.load_embedding(model, tmp_path) == "<zqv>"
    with pytest.raises(UserError, match="'<zqv>' has a meaning in base"):
        textual_inversion.load_embedding(model, tmp_path / "learned_embeds.safetensors")
    assert textual_inversion.load_embedding(model, tmp_path, "<other>") == "<other>"
    a, b = predicted(model, ["a <zqv> dog", "a <other> dog"]), predicted(model, ["a <other> dog", "a <zqv> dog"])
    assert torch.equal(a, b)


def test_an_embedding_for_another_base_is_refused_and_others_files_are_read(tiny_sd, tiny_sdxl, tmp_path):
    saved(tiny_sd, Case(("textual-inversion",)), tmp_path)
    with pytest.raises(UserError, match="another base.*widths are .'text_encoder': 32.*expected are .'text_encoder': 24"):
        textual_inversion.load_embedding(base(tiny_sdxl), tmp_path)
    rows = load_file(tmp_path / "learned_embeds.safetensors")["<zqv>"]
    save_file({"emb_params": rows}, tmp_path / "my-dog.safetensors")
    model = base(tiny_sd)
    assert textual_inversion.load_embedding(model, tmp_path / "my-dog.safetensors") == "my-dog"
    taught = learned(tiny_sd, Case(("textual-inversion",))).model
    assert torch.equal(predicted(model, ["a my-dog dog", "a"]), predicted(taught, ["a <zqv> dog", "a"]))
