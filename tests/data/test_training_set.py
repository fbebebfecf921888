"""What a step sees: masks, predictions of the frozen base, several subjects."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from personalize import methods, models
from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.core import rng
from personalize.core.losses import denoising_loss
from personalize.data import subjects, training_set
from personalize.data.batch import Batch
from personalize.generation import sampling
from personalize.training.engine import Engine
from personalize.training.find_run import decisive_settings

SETTINGS = ["train.batch=2", "train.prior_batch=2", "photos.min_size=16", "prior.count=3", "train.lr=1e-3"]


def made(base, sources, *more, words=("dog",), tokens=("zqv",), priors=None):
    model = models.load_model(str(base), device="cpu", dtype="float32", say=lambda line: None)
    recipe = load_recipe(None, [*SETTINGS, f"class_word={','.join(words)}", f"token={','.join(tokens)}", *more])
    known, _ = subjects.load_subjects(sources, recipe, tokens=tokens, size=model.size)
    groups = methods.attach(model, recipe)
    data = training_set.build_training_set(model, recipe, known, priors=priors or {}, text_trains=False)
    return data, Engine(model, recipe, groups)


@pytest.fixture
def masked(photos, tmp_path):
    """Two photos whose left half is the subject, by an alpha channel."""
    for path in sorted(photos.glob("*.png"))[:2]:
        image = Image.open(path).convert("RGB").resize((64, 64))
        alpha = np.zeros((64, 64), dtype=np.uint8)
        alpha[:, :32] = 255
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / path.name)
    return tmp_path


def test_the_background_weighs_what_the_recipe_says(tiny_sd, masked):
    data, engine = made(tiny_sd, [masked], "photos.background=0.25", "train.prior_weight=0")
    batch, model = data.at(0), data.model
    assert batch.mask.shape == (2, 1, 16, 16)
    assert (batch.mask[..., :7] == 1).all() and (batch.mask[..., 9:] == 0.25).all()
    loss = engine.backward(batch)[0]
    out = model.predict(model.schedule.add_noise(batch.z0, batch.eps, batch.t), batch.t, batch.cond(slice(0, 2)))
    by_hand = [((o - e).square() * m).sum() / (4 * m.sum()) for o, e, m in zip(out, batch.eps, batch.mask, strict=True)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean().detach(), rtol=1e-5, atol=1e-6)


def test_masks_are_not_used_unless_asked_for(tiny_sd, masked):
    assert made(tiny_sd, [masked])[0].at(0).mask is None


def test_class_images_have_no_background_to_leave_out(tiny_sd, masked):
    data, _ = made(tiny_sd, [masked], "photos.background=0", priors={"dog": torch.randn(3, 4, 16, 16)})
    batch = data.at(0)
    assert batch.is_prior.tolist() == [False, False, True, True]
    assert (batch.mask[2:] == 1).all() and (batch.mask[:2].amin((1, 2, 3)) == 0).all()


def test_a_mask_moves_with_a_random_crop(tiny_sd, masked):
    data, _ = made(tiny_sd, [masked], "photos.background=0", "photos.crop=random", "photos.flip=true")
    sides = {bool(data.at(step).mask[0, 0, :, :6].mean() > 0.5) for step in range(8)}
    assert sides == {True, False}, "a flip that the mask did not follow"


def test_the_frozen_base_is_the_target_on_the_class_prompt(tiny_sd, photos):
    """Loss of the prior term 0 before training; the target is what a fresh base says of that noisy photo."""
    data, engine = made(tiny_sd, [photos], "prior.kind=predictions")
    batch = data.at(0)
    assert engine.backward(batch)[2] < 1e-9
    fresh = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)
    rows = batch.is_prior
    with torch.no_grad():
        z_t = fresh.schedule.add_noise(batch.z0[rows], batch.eps[rows], batch.t[rows])
        expected = fresh.predict(z_t, batch.t[rows], sampling.encode_texts(fresh, ["a dog"] * 2))
    torch.testing.assert_close(batch.target[rows], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.target[~rows], batch.eps[~rows])


def test_predictions_hold_the_class_where_it_is(tiny_sd, photos):
    """With the prior term the answer to the class prompt moves less than without it."""

    def moved(weight):
        data, engine = made(tiny_sd, [photos], "prior.kind=predictions", f"train.prior_weight={weight}", "prior.count=8")
        held = made(tiny_sd, [photos], "prior.kind=predictions", "prior.count=8")[0].prior
        for step in range(25):
            engine.step(data.at(step), scale=1.0)
        with torch.no_grad():
            z_t = data.model.schedule.add_noise(held.z0, held.eps, held.t)
            out = data.model.predict(z_t, held.t, sampling.encode_texts(data.model, ["a dog"] * len(z_t)))
        return float(denoising_loss(out, held.target).mean())

    assert moved(10.0) < 0.5 * moved(0.0)


def test_timesteps_are_drawn_last_so_that_every_density_sees_the_same_photos_and_noise(tiny_sd, photos):
    priors = {"dog": torch.randn(3, 4, 16, 16)}
    plain, biased = (made(tiny_sd, [photos], *more, priors=priors)[0] for more in ((), ("train.timesteps=low",)))
    before, after, again = plain.at(3), biased.at(3), biased.at(3)
    assert torch.equal(before.z0, after.z0) and torch.equal(before.eps, after.eps) and torch.equal(after.t, again.t)
    g = rng.generator(0, "step", 3)
    torch.randn(2, 4, 16, 16, generator=g), torch.randn(4, 4, 16, 16, generator=g)
    state = g.get_state()
    assert torch.equal(before.t, torch.randint(0, 1000, (4,), generator=g)), "runs of before the setting have other bits"
    assert torch.equal(after.t, (1000 * (1 - torch.rand(4, generator=g.set_state(state)).sqrt())).long())


def test_predictions_of_the_base_have_the_density_of_training(tiny_sd, photos):
    data, _ = made(tiny_sd, [photos], "prior.kind=predictions", "prior.count=40", "train.timesteps=high")
    assert data.prior.t.float().mean() > 580  # 667 at this density, 500 at the uniform one; its standard error is 37


LATER_NOISE = ("timesteps", "noise_offset", "input_perturbation")


def test_another_density_is_another_run_and_the_default_is_the_run_from_before_the_setting():
    recipes = [recipe_to_dict(load_recipe(None, [text])) for text in ("train.timesteps=uniform", OFFSET, PERTURBED)]
    before = recipe_to_dict(load_recipe(None))
    for name in LATER_NOISE:
        del before["train"][name]
    default, mode, high = map(decisive_settings, recipes)
    assert default == decisive_settings(before) and default != mode != high != default


OFFSET, PERTURBED = "train.noise_offset=0.1", "train.input_perturbation=0.2"


def test_offset_and_perturbation_are_drawn_after_all_else_and_are_in_the_loss(tiny_sd, photos):
    """As diffusers' train_text_to_image.py: both noise the latents, and the target has the offset alone."""
    priors = {"dog": torch.randn(3, 4, 16, 16)}
    plain, shifted, both = (made(tiny_sd, [photos], *more, priors=priors) for more in ((), (OFFSET,), (OFFSET, PERTURBED)))
    before, offset, after = (data.at(3) for data, _ in (plain, shifted, both))
    for batch in (offset, after):
        assert torch.equal(before.z0, batch.z0) and torch.equal(before.t, batch.t)
    assert before.noise is None and offset.noise is None and torch.equal(offset.eps, after.eps)
    shift = offset.eps - before.eps
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-6)
    assert 0.05 < float(shift.mean((2, 3)).std()) < 0.2
    assert 0.18 < float((after.noise - after.eps).std()) < 0.22
    model, everything = both[0].model, slice(0, 4)
    out = model.predict(model.schedule.add_noise(after.z0, after.noise, after.t), after.t, after.cond(everything))
    per_image = denoising_loss(out, after.eps).detach()
    torch.testing.assert_close(both[1].backward(after)[0], per_image[:2].mean() + per_image[2:].mean())
    assert float(both[1].backward(after)[0]) != float(both[1].backward(offset)[0])
    again = Batch.of(after.tensors(), after.counts)
    assert torch.equal(again.noise, after.noise), "a captured step has it too"


def test_predictions_are_of_offset_noise_and_asked_for_the_inputs_that_the_base_answered(tiny_sd, photos):
    settings = ("prior.kind=predictions", "prior.count=40")
    data, engine = made(tiny_sd, [photos], *settings, OFFSET.replace("0.1", "1"), PERTURBED)
    assert float(data.prior.eps.mean((2, 3)).std()) > 0.8  # 0.06 without
    batch = data.at(0)
    rows = batch.is_prior
    assert torch.equal(batch.noise[rows], batch.eps[rows]) and not torch.equal(batch.noise[~rows], batch.eps[~rows])
    assert engine.backward(batch)[2] < 1e-9


def test_two_subjects_have_their_own_words_photos_and_class_images(tiny_sd, photos, tmp_path):
    others = tmp_path / "cat"
    others.mkdir()
    shutil.copy(next(photos.glob("*.png")), others / "a.png")
    priors = {"dog": torch.zeros(3, 4, 16, 16), "cat": torch.ones(3, 4, 16, 16)}
    data, _ = made(tiny_sd, [photos, others], "train.batch=6", "train.prior_batch=6", words=("dog", "cat"),
                   tokens=("zqv", "red"), priors=priors)  # fmt: skip
    count = len(data.photos)
    assert data.prompts == ["a zqv dog"] * (count - 1) + ["a red cat", "a dog", "a cat"]
    batch = data.at(0)
    classes = {float(z0.mean()): data.prompts[row] for z0, row in zip(data.prior.z0, data.prior.texts, strict=True)}
    assert classes == {0.0: "a dog", 1.0: "a cat"}
    assert len(batch.z0) == 12 and batch.cond(slice(0, 12))["text"].shape[0] == 12


def test_folders_and_class_words_must_be_as_many(tiny_sd, photos):
    with pytest.raises(UserError, match=r"1 folders of photos and 2 class words \(dog, cat\)"):
        made(tiny_sd, [photos], words=("dog", "cat"), tokens=("zqv", "red"))


def test_the_parts_of_two_processes_add_up_to_the_gradient_of_one(tiny_sd, photos, monkeypatch):
    data, engine = made(tiny_sd, [photos], "train.batch=3", priors={"dog": torch.randn(3, 4, 16, 16)})
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    whole = engine.backward(data.at(0))
    expected = [p.grad.clone() for p in engine.params]
    engine.optimizer.zero_grad()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(engine.backward(data.at(0)))
    torch.testing.assert_close(sum(parts), whole)
    for p, grad in zip(engine.params, expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
