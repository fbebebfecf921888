"""What does not fit at once is drawn in halves, from the same noise; what does not fit at all is said."""

import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.generation import sampling
from personalize.models.out_of_memory import DoesNotFit, halved, is_out_of_memory

HOW = SamplingConfig("ddpm", 3, 5.0)


@pytest.fixture
def model(tiny_sd):
    said = []
    model = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=said.append)
    model.said = said
    return model


def limited(model, monkeypatch, rows, error):
    """The U-Net takes that many rows at most; guidance makes two of an image. -> the rows of each call"""
    predict, calls = model.predict, []

    def limited(z, t, cond):
        calls.append(len(cond["text"]))
        if calls[-1] > rows:
            raise error
        return predict(z, t, cond)

    monkeypatch.setattr(model, "predict", limited)
    return calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "mps", "cpu"],
)
def test_a_batch_that_does_not_fit_is_drawn_in_halves_from_the_same_noise(model, monkeypatch, error):
    prompts = ["a dog", "a cat", "a red hat"] * 2
    expected = sampling.sample_latents(model, prompts, sampling.image_generators(0, range(6)), HOW)
    calls = limited(model, monkeypatch, 4, error)
    drawn = sampling.sample_latents(model, prompts, sampling.image_generators(0, range(6)), HOW)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert calls == [12, 6, *[4] * 3 * 3]
    assert [line.split(" (")[0] for line in model.said] == [
        "out of memory: from here on 3 images of 32 px at once", "out of memory: from here on 2 images of 32 px at once",
    ]  # fmt: skip
    calls.clear()
    sampling.sample_latents(model, prompts, sampling.image_generators(0, range(6)), HOW)
    assert max(calls) == 4 and len(model.said) == 2, "the next batch begins with what fits"


def test_one_image_that_does_not_fit_is_an_error_of_the_user(model, monkeypatch):
    limited(model, monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match=r"one image of 32 px does not fit in the memory of cpu.*--device cpu"):
        sampling.sample_latents(model, ["a dog"] * 2, sampling.image_generators(0, range(2)), HOW)


def test_decoding_halves_too_and_names_tiles(model, monkeypatch):
    z0, decode = torch.randn(4, 4, 16, 16), model.vae.decode
    expected = model.decode_latents(z0)

    def limited(z, most=2):
        if len(z) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z)

    monkeypatch.setattr(model.vae, "decode", limited)
    torch.testing.assert_close(model.decode_latents(z0), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(model.vae, "decode", lambda z: limited(z, 0))
    with pytest.raises(DoesNotFit, match="vae=tiled"):
        model.decode_latents(z0)


def test_other_errors_are_not_taken_for_it(model, monkeypatch):
    assert not is_out_of_memory(RuntimeError("expected scalar type Float")) and not is_out_of_memory(UserError("x"))
    limited(model, monkeypatch, 0, RuntimeError("another one"))
    with pytest.raises(RuntimeError, match="another one"):
        sampling.sample_latents(model, ["a dog"], sampling.image_generators(0, range(1)), HOW)


def test_parts_are_all_rows_in_their_order():
    told, done = [], []

    def run(rows):
        if rows.stop - rows.start > 3:
            raise MemoryError("no")
        return done.extend(range(rows.start, rows.stop))

    list(halved(run, 11, 8, smaller=told.append))
    assert done == list(range(11)) and told == [4, 2]
