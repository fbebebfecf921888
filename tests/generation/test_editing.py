"""Edits: the same words give the same bits, the source is the plain image, and a photo comes back."""

import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.core.rng import generator
from personalize.generation import editing, sampling
from personalize.generation.editing import Edit, require_edit, sample_edits
from personalize.generation.words import Emphasis
from personalize.methods.quantization import quantize
from personalize.models.out_of_memory import DoesNotFit

SOURCE, TARGET = "a photo of a dog", "a photo of a red hat"
CONFIG = SamplingConfig(sampler="ddpm", steps=4, guidance=3.0)
HAT = Emphasis((("hat", 1.5),), ("red",))


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def model(request):
    return models.load_model(str(request.getfixturevalue(request.param)), device="cpu", say=lambda line: None)


def streams(indices=(0, 1)):
    return sampling.image_generators(0, list(indices))


def drawn(model, edit, config=CONFIG, indices=(0, 1), **options):
    return sample_edits(model, edit, streams(indices), config, **options)


def close(a, b, atol=2e-4):
    return torch.allclose(a, b, rtol=0, atol=atol * max(1, b.abs().max().item()))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler-a", "heun"])
def test_an_edit_to_the_same_words_gives_the_same_bits(model, sampler):
    config = SamplingConfig(sampler=sampler, steps=4, guidance=3.0)
    source, plain, edited = drawn(model, Edit(SOURCE, SOURCE), config)
    assert torch.equal(source, edited) and torch.equal(source, plain) and not close(source[0], source[1])


def test_source_and_plain_are_what_both_prompts_draw_alone(model):
    source, plain, edited = drawn(model, Edit(SOURCE, TARGET, emphasis=HAT))
    assert close(source, sampling.sample_latents(model, [SOURCE] * 2, streams(), CONFIG))
    assert close(plain, sampling.sample_latents(model, [TARGET] * 2, streams(), CONFIG, emphasis=HAT))
    assert not close(edited, plain) and not close(edited, source)


def test_without_borrowing_the_edited_image_is_the_plain_one_and_each_share_moves_it(model):
    _, plain, edited = drawn(model, Edit(SOURCE, TARGET, keep=0, layout=0))
    assert torch.equal(plain, edited)
    images = [drawn(model, Edit(SOURCE, TARGET, keep=k, layout=s))[2] for k, s in ((1, 0), (0.5, 0), (0, 1), (1, 1), (0.5, 1))]
    assert not any(close(a, b, 1e-6) for i, a in enumerate(images) for b in [plain, *images[:i]])


@pytest.mark.parametrize(
    ("keep", "layout", "seen"), [(0.75, 0.25, "bccp"), (0.25, 0.5, "blpp"), (1, 1, "bbbb"), (0, 0.5, "llpp")]
)
def test_shares_are_shares_of_the_steps(model, keep, layout, seen, monkeypatch):
    """b: both are borrowed, c: the maps of the text, l: those of the layout, p: none."""
    kinds, predict = [], model.predict

    def watch(z, t, cond):
        kinds.append({(1, 1): "b", (1, 0): "c", (0, 1): "l", (0, 0): "p"}["borrow:cross" in cond, "borrow:self" in cond])
        return predict(z, t, cond)

    monkeypatch.setattr(model, "predict", watch)
    drawn(model, Edit(SOURCE, TARGET, keep=keep, layout=layout))
    assert "".join(kinds) == seen


def test_an_edit_does_not_depend_on_its_neighbours_or_the_memory(model, monkeypatch):
    both = drawn(model, Edit(SOURCE, TARGET))
    assert close(both[:, :1], drawn(model, Edit(SOURCE, TARGET), indices=[0]))
    predict = model.predict

    def tight(z, t, cond):
        if len(z) > 3:
            raise torch.OutOfMemoryError("no more")
        return predict(z, t, cond)

    monkeypatch.setattr(model, "predict", tight)
    assert close(drawn(model, Edit(SOURCE, TARGET)), both)
    monkeypatch.setattr(model, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(DoesNotFit, match="three images of one edit at 32 px do not fit"):
        drawn(model, Edit(SOURCE, TARGET))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("first", [0, 2])
def test_a_photo_is_its_own_source_at_every_guidance(model, guidance, first):
    config = SamplingConfig(sampler="ddpm", steps=6, guidance=guidance)
    photo = torch.randn(1, 4, 16, 16, generator=generator(0, "photo"))
    source, plain, edited = drawn(model, Edit(SOURCE, TARGET), config, photo=photo, first=first)
    assert close(source, photo.expand(2, -1, -1, -1), 1e-4)
    assert not close(plain, source) and not close(edited, source)
    same = drawn(model, Edit(SOURCE, SOURCE), config, photo=photo, first=first)
    assert torch.equal(same[0], same[2])


def test_a_quantized_base_is_edited_as_it_is(tiny_sd):
    """Its layers are called as they are, so that borrowing needs no refusal."""
    pytest.importorskip("bitsandbytes")
    model = models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)
    whole = drawn(model, Edit(SOURCE, TARGET), indices=[0])
    quantize(model.unet, "8bit")
    require_edit(model, Edit(SOURCE, TARGET))
    edited = drawn(model, Edit(SOURCE, TARGET), indices=[0])
    assert (edited - whole).square().mean() < 0.01 * whole.square().mean()
    same = drawn(model, Edit(SOURCE, SOURCE), indices=[0])
    assert torch.equal(same[0], same[2])


def test_what_cannot_be_edited_is_said(model, monkeypatch):
    for edit, said in [
        (Edit(SOURCE, TARGET, keep=1.5), "--keep 1.5 is not a share of the sampling steps"),
        (Edit(SOURCE, TARGET, layout=-1), "--keep-layout -1 is not a share"),
        (Edit(SOURCE, TARGET, emphasis=Emphasis(ignored=("dog",))), "no prompt says 'dog'"),
        (Edit("dog " * 40, "dog " * 40 + "hat"), "differ only in words that are cut off: '.*hat'. Shorten them"),
        (Edit("a dog", "a DOG"), "give the same image: base reads both alike"),
    ]:
        with pytest.raises(UserError, match=said):
            require_edit(model, edit)
    require_edit(model, Edit(SOURCE, SOURCE))
    monkeypatch.setattr("personalize.generation.attention_control.why_not_fast", lambda unet: "act_fn is 'gelu'")
    with pytest.raises(UserError, match="attention cannot be controlled"):
        require_edit(model, Edit(SOURCE, TARGET))
    assert editing.PARTS == ("source", "plain", "edited")


@pytest.mark.slow
def test_toyland_swaps_ignores_and_gives_a_photo_back():
    """Six images each, read by the probe: a cat in place of the dog, no hat; the notebook has what was measured."""
    from personalize.evaluation.metrics.toyland_truth import TABLES, load_probe, read_images

    model, probe = models.load_model("toyland", device="cpu", dtype="float32", say=lambda line: None), load_probe()
    prompt, hat = "a red dog wearing a blue hat on the beach", Emphasis(ignored=("wearing a blue hat",))
    config = SamplingConfig(sampler="ddpm", steps=12, guidance=2.2)

    def chance(z0, table, word):
        return read_images(probe, model.decode_latents(z0)).chances[table][:, list(TABLES[table]).index(word)]

    source, _, edited = drawn(model, Edit(prompt, prompt, emphasis=hat), config, range(6))
    assert chance(source, "accessory", "hat").mean() > 0.7 and chance(edited, "accessory", "none").mean() > 0.8
    assert chance(edited, "class", "dog").mean() > 0.9 and chance(edited, "place", "beach").mean() > 0.9
    source, plain, edited = drawn(model, Edit("a dog in the snow", "a cat in the snow"), config, range(6))
    assert chance(edited, "class", "cat").mean() > 0.8 and chance(edited, "place", "snow").mean() > 0.9
    assert (edited - source).abs().mean() < (plain - source).abs().mean()
    photo = model.encode_images(model.decode_latents(source[:1]))[0]
    config = SamplingConfig(sampler="ddpm", steps=12, guidance=5.0)
    back = drawn(model, Edit("a dog in the snow", "a cat in the snow"), config, [0], photo=photo)[0]
    assert 20 * torch.log10((photo.max() - photo.min()) / (back - photo).square().mean().sqrt()) > 100, "dB"
