"""What an inpainting base is told while it trains: masks, and photos without what they paint, cut as the photos are."""

import pytest
import torch
from bases import inpainting_base
from PIL import Image
from torch.nn.functional import avg_pool2d

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.core import rng
from personalize.data import inpainting_masks, subjects, training_set
from personalize.data.batch import Batch
from personalize.data.inpainting_masks import MASKS, Masks, masks_needed, random_mask
from personalize.models.interface import MASKED
from personalize.training.engine import Engine

SETTINGS = ["class_word=dog", "token=zqv", "train.batch=2", "train.prior_batch=2", "train.steps=40", "photos.min_size=16"]
RANDOM = ["photos.crop=random", "photos.flip=true"]


@pytest.fixture(scope="module")
def wide(tiny_sd, tmp_path_factory):
    return inpainting_base(tiny_sd, tmp_path_factory.mktemp("wide") / "base", scale=0.1)


@pytest.fixture(scope="module")
def tall(photos, tmp_path_factory):
    """Three photos that leave room for crops."""
    folder = tmp_path_factory.mktemp("tall")
    for path in sorted(photos.glob("*.png"))[:3]:
        Image.open(path).resize((40, 64)).save(folder / path.name)
    return folder


def made(base, photos, *more, priors=None, encode_images=None, **options):
    """A training set, and the engine of its run."""
    recipe = load_recipe(None, [*SETTINGS, "prior.count=3", *more])
    loading = {"device": "cpu", "dtype": "float32", "prediction": recipe.prediction}
    model = models.load_model(str(base), **loading, say=lambda line: None)
    if encode_images:
        model.encode_images = encode_images
    known, _ = subjects.load_subjects([photos], recipe, tokens=["zqv"], size=model.size)
    groups = methods.attach(model, recipe)
    priors, build = {} if priors is None else {"dog": priors}, training_set.build_training_set
    return build(model, recipe, known, priors=priors, text_trains=False, **options), Engine(model, recipe, groups)


def told(batch):
    """MASKED of a batch as mask (B,1,h,w) and latents (B,C,h,w)."""
    return batch.cond(slice(0, len(batch.z0)))[MASKED].split([1, batch.z0.shape[1]], 1)


def test_masks_are_all_of_the_image_in_a_quarter_and_else_rectangles_and_ellipses_inside():
    masks = torch.stack([random_mask(rng.generator(0, "mask", k), 64) for k in range(400)])
    assert masks.unique().tolist() == [0, 1]
    area = masks.mean((1, 2, 3))
    assert 0.2 < (area == 1).float().mean() < 0.3
    shapes, full = masks[area < 1], []
    for mask in shapes[:, 0]:
        rows, columns = mask.amax(1), mask.amax(0)
        assert rows.sum() >= 15 and columns.sum() >= 15, "no side is under a quarter of the edge"
        full.append(float(mask.sum() / (rows.sum() * columns.sum())))  # of its bounding box: 1, or pi / 4
    assert all(abs(share - 1) < 1e-6 or abs(share - 0.785) < 0.08 for share in full)
    assert 0.4 < sum(share > 0.99 for share in full) / len(full) < 0.6
    middle = torch.stack([(mask[0].nonzero() + 0.5).mean(0) for mask in shapes]).mean(0)
    torch.testing.assert_close(middle, torch.full((2,), 32.0), rtol=0, atol=2)


def test_an_image_has_another_mask_in_each_pass_and_the_first_again_after_the_last():
    masks = Masks(0, "subject", 5)
    of = {(i, p): masks.of([i], [p], 32) for i in range(5) for p in range(MASKS)}
    assert len({tuple(mask.flatten().tolist()) for mask in of.values()}) > 0.7 * len(of)
    assert torch.equal(masks.of([3], [MASKS + 2], 32), of[3, 2])
    assert torch.equal(masks.of([1, 3], [0, 2], 32), torch.cat([of[1, 0], of[3, 2]]))
    others = Masks(1, "subject", 5), Masks(0, "prior", 5)
    for other in others:
        assert any(not torch.equal(other.of([i], [0], 32), of[i, 0]) for i in range(5))


def test_no_more_masks_are_made_than_are_used():
    assert (masks_needed(3, 1, 5), masks_needed(6, 1, 5), masks_needed(800, 1, 200), masks_needed(10_000, 4, 5)) == (
        1,
        2,
        4,
        32,
    )


def halved(images):
    """A VAE whose cells are means of 2x2 px, so that a cell says which pixels it is of."""
    means = avg_pool2d(torch.cat([images, images[:, :1]], 1), 2)
    return means, torch.zeros_like(means)


@pytest.mark.parametrize("more", [[], RANDOM], ids=["one crop", "crops and flips"])
def test_photo_mask_and_masked_photo_are_cut_alike(wide, tall, more):
    """Beside the mask a cell is told what the photo says at that very place, and inside it grey (diffusers#1529)."""
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"class_pixels": lambda word, i: pixels[i : i + 1], "encode_images": halved}
    data, _ = made(wide, tall, *more, priors=halved(pixels)[0], **options)
    kept, painted = 0, 0
    for step in range(12):
        batch = data.at(step)
        mask, z0 = told(batch)
        assert torch.equal(z0 * (1 - mask), batch.z0 * (1 - mask)), "another part of the photo"
        grey = (z0 == 0).all(1, keepdim=True).float()
        assert (grey <= mask).all() and grey.sum() > 0.7 * mask.sum(), "a cell at an edge is grey in part"
        kept, painted = kept + (1 - mask[:2]).sum(), painted + (1 - mask[2:]).sum()
    assert kept > 1000 and painted > 1000, "photos and class images have masks that keep something"


def test_masks_that_are_encoded_once_are_those_of_their_steps(wide, tall):
    """From the cache and step by step: the same batch to rounding, and asked for again the same bits."""
    data, _ = made(wide, tall, "prior.count=0")
    assert data.masked.shape == (3, 27, 5, 16, 16), "photos, passes of 40 steps of 2, mask and latents"
    cached = [told(data.at(step)) for step in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(cached[4], told(data.at(4)), strict=True))
    assert not torch.equal(cached[0][0], cached[3][0]), "the next pass has other masks"
    batch = data.at(4)
    again = told(Batch.of(batch.tensors(), batch.counts))
    assert all(torch.equal(a, b) for a, b in zip(cached[4], again, strict=True)), "lost where a graph keeps its tensors"
    data.latents = data.masked = None
    for step, (mask, z0) in enumerate(cached):
        again = told(data.at(step))
        assert torch.equal(again[0], mask)
        torch.testing.assert_close(again[1], z0, rtol=0, atol=1e-5)


def test_a_plain_base_is_told_nothing(tiny_sd, tall, monkeypatch):
    monkeypatch.setattr(inpainting_masks, "random_mask", None)
    data, _ = made(tiny_sd, tall, *RANDOM, priors=torch.zeros(3, 4, 16, 16))
    assert MASKED not in data.at(0).cond(slice(0, 4)) and data.masked is data.prior.masked is None


@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.slow), RANDOM], ids=["one crop", "crops and flips"])
def test_predictions_of_the_frozen_base_keep_the_masks_they_were_made_under(wide, tall, more):
    data, engine = made(wide, tall, "prior.kind=predictions", "prior.count=7", *more)
    assert data.prior.masked.shape == (7, 1, 5, 16, 16)
    for step in range(3):
        assert engine.backward(data.at(step))[2] < 1e-9, "before training the tuned base says what the frozen one said"
        engine.clear()
    data.prior.masked.neg_()
    assert engine.backward(data.at(0))[2] > 1e-6, "the masks do nothing"


@pytest.mark.parametrize("family", ["tiny_sd", pytest.param("tiny_sdxl", marks=pytest.mark.slow)])
def test_with_new_channels_of_zeros_the_first_step_is_the_plain_bases(family, tall, tmp_path, request):
    """Predictions, losses and gradients of all old weights; and the new weights' gradient is there."""
    plain = request.getfixturevalue(family)
    images = torch.zeros(3, 3, 32, 32), torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    options = {"priors": images[1], "class_pixels": lambda word, i: images[0][i : i + 1]}
    runs = [made(base, tall, **options) for base in (plain, inpainting_base(plain, tmp_path / "wide", scale=0.0))]
    predictions, losses, gradients = [], [], []
    for data, engine in runs:
        batch, model = data.at(0), data.model
        with torch.no_grad():
            z_t = model.schedule.add_noise(batch.z0, batch.eps, batch.t)
            predictions.append(model.predict(z_t, batch.t, batch.cond(slice(0, 4))))
        losses.append(engine.backward(batch))
        gradients.append({name: p.grad for name, p in model.unet.named_parameters()})
    torch.testing.assert_close(*predictions, rtol=0, atol=2e-6)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    new = gradients[1]["conv_in.weight"]
    assert (new[:, 4:].abs().amax((0, 2, 3)) > 1e-6).all(), "a new channel that never trains"
    gradients[1]["conv_in.weight"] = new[:, :4]
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-3, atol=1e-6)


def test_training_teaches_it_to_take_what_is_kept_from_the_photo(tiny_sd, photos, tmp_path):
    """Near pure noise the error in kept cells falls, and further where the photo beside it is the right one."""
    base, steps = inpainting_base(tiny_sd, tmp_path / "wide", scale=0.0), 20
    more = ["prediction=v_prediction", "train.lr=4e-3", "train.batch=4", f"train.steps={steps}", "prior.count=0"]
    data, engine = made(base, photos, *more, encode_images=halved)
    batch, model = data.at(steps), data.model
    cond, t = batch.cond(slice(0, 4)), torch.full_like(batch.t, 900)
    mask, latents = told(batch)
    z_t, target = model.schedule.add_noise(batch.z0, batch.eps, t), model.schedule.target(batch.z0, batch.eps, t)

    def errors():
        """Mean squared error in kept cells, told the photo and told the photo of another row."""
        rows = [cond | {MASKED: torch.cat([mask, z0], 1)} for z0 in (latents, latents.roll(1, 0))]
        with torch.no_grad():
            off = [(model.predict(z_t, t, each) - target).square().mean(1, keepdim=True) for each in rows]
        return [float((each * (1 - mask)).sum() / (1 - mask).sum()) for each in off]

    before = errors()
    for step in range(steps):
        engine.step(data.at(step), scale=1.0)
    (right, wrong), new = errors(), model.unet.conv_in.weight[:, 4:]
    assert before[0] == before[1], "zeros do nothing yet"
    assert right < 0.6 * before[0] and right < 0.9 * wrong
    assert (new.abs().amax((0, 2, 3)) > 1e-3).all(), "a new channel that never trained"
