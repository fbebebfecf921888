"""Two subjects in one training image: what is cut, what the prompt says, and what stays as it was."""

import shutil

import pytest
import torch
from bases import inpainting_base

from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.data import subjects, training_set
from personalize.data.cut_mix import CutMix, Pair, mixed, rows_of, side_by_side
from personalize.models.interface import MASKED, SIZES
from personalize.training.find_run import decisive_settings

SETTINGS = ["train.batch=4", "photos.min_size=16", "class_word=dog,cat", "token=zqv,red", "photos.hold_out=0", "prior.count=3"]


@pytest.fixture(scope="module")
def folders(photos, tmp_path_factory):
    """Three photos of one subject and two of another."""
    files, places = sorted(photos.glob("*.png")), []
    for name, part in (("dog", files[:3]), ("cat", files[3:])):
        place = tmp_path_factory.mktemp(name)
        for file in part:
            shutil.copy(file, place)
        places.append(place)
    return places


@pytest.fixture(scope="module")
def base(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)


def made(model, folders, *more):
    recipe = load_recipe(None, [*SETTINGS, *more])
    known, _ = subjects.load_subjects(folders, recipe, tokens=recipe.token, size=model.size)
    priors = {"dog": torch.zeros(3, 4, 16, 16), "cat": torch.ones(3, 4, 16, 16)}
    return training_set.build_training_set(
        model, recipe, known, priors=priors, text_trains=True, class_pixels=lambda word, i: torch.zeros(1, 3, 32, 32)
    )


def test_each_half_is_the_middle_of_a_photo():
    left, right = torch.arange(8.0).expand(1, 2, 8), 10 + torch.arange(8.0).expand(1, 2, 8)
    assert side_by_side(left, right)[0, 0].tolist() == [2, 3, 4, 5, 12, 13, 14, 15]
    assert side_by_side(left[..., :5], right[..., :5])[0, 1].tolist() == [1, 2, 11, 12, 13]


def test_every_photo_of_a_step_becomes_two_subjects_that_the_prompt_names_from_left_to_right(base, folders):
    data = made(base, folders, "train.cut_mix=1")
    mean, std, mask = data.latents
    data.latents = mean, torch.zeros_like(std), mask
    owners, sides = [0, 0, 0, 1, 1], set()
    for step in range(4):
        batch = data.at(step)
        pairs = data.cut_mix.pairs(training_set.epoch_order(5, 4, step, seed=0), step)
        assert [pair.place for pair in pairs] == [0, 1, 2, 3]
        for pair, own, z0 in zip(pairs, training_set.epoch_order(5, 4, step, seed=0), batch.z0):
            left, right = (own, pair.photo) if pair.own_is_left else (pair.photo, own)
            assert torch.equal(z0, side_by_side(mean[left], mean[right])) and owners[left] != owners[right]
            names = ["a zqv dog", "a red cat"]
            assert data.prompts[pair.text] == f"{names[owners[left]]} and {names[owners[right]]}"
            sides.add((pair.own_is_left, owners[own]))
        said = base.encode_prompts([data.prompts[pair.text] for pair in pairs])["text"]
        torch.testing.assert_close(batch.cond(slice(0, 4))["text"], said)
    assert len(sides) == 4, "each subject is seen on both sides"


def test_class_images_and_photos_that_are_not_mixed_keep_their_bits(base, folders):
    plain, some = made(base, folders), made(base, folders, "train.cut_mix=0.4")
    assert plain.cut_mix is None and len(some.prompts) == len(plain.prompts) + 2
    changed = 0
    for step in range(6):
        before, after, again = plain.at(step), some.at(step), some.at(step)
        assert torch.equal(after.z0, again.z0) and torch.equal(before.eps, after.eps) and torch.equal(before.t, after.t)
        mix = {pair.place for pair in some.cut_mix.pairs(training_set.epoch_order(5, 4, step, seed=0), step)}
        assert [k for k in range(8) if not torch.equal(before.z0[k], after.z0[k])] == sorted(mix)
        changed += len(mix)
    assert 3 < changed < 17, "of 24 photos about 10 are mixed"


def test_another_seed_mixes_other_photos():
    drawn = [CutMix(seed, 0.5, [0, 0, 1, 1], {(0, 1): 4, (1, 0): 5}).pairs([0, 1, 2, 3], 0) for seed in range(4)]
    assert len({tuple(each) for each in drawn}) > 2


def test_of_three_subjects_every_two_meet():
    mix = CutMix(0, 1.0, [0, 1, 2], {side: k for k, side in enumerate([(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)])})
    assert {pair.text for step in range(20) for pair in mix.pairs([0, 1, 2], step)} == set(range(6))


def test_masks_and_what_an_inpainting_base_is_told_are_cut_as_the_latents():
    width, pairs = 8, [Pair(1, 5, False, 9)]
    columns = torch.arange(width).float()
    rows = torch.stack([100 * k + columns.expand(1, 2, width) for k in range(3)])  # two photos, then the other of the pair
    mean, std, mask, beside = mixed((rows, rows + 1, rows + 2, {MASKED: rows + 3}), pairs)
    expected = torch.cat([rows[2][..., 2:6], rows[1][..., 2:6]], -1)
    for k, each in enumerate((mean, std, mask, beside[MASKED])):
        assert each.shape[0] == 2 and torch.equal(each[0], rows[0] + k) and torch.equal(each[1], expected + k)
    assert mixed((rows, rows, None, {}), [])[0] is rows and rows_of([4, 3], pairs) == [4, 9]


def test_an_inpainting_base_sees_pairs_in_passes_of_their_own_photo(tiny_sd, folders, tmp_path):
    model = models.load_model(str(inpainting_base(tiny_sd, tmp_path / "wide", scale=0.1)), device="cpu", dtype="float32")
    data = made(model, folders, "train.cut_mix=1", "train.steps=3")
    for step in range(3):
        assert data.at(step).cond(slice(0, 8))[MASKED].shape == (8, 5, 16, 16)
    cropped = made(model, folders, "train.cut_mix=1", "train.steps=3", "photos.crop=random")
    assert cropped.at(2).cond(slice(0, 8))[MASKED].shape == (8, 5, 16, 16)


def test_a_pair_has_the_size_that_it_was_made_at(tiny_sdxl, folders):
    model = models.load_model(str(tiny_sdxl), device="cpu", dtype="float32", say=lambda line: None)
    before, after = (made(model, folders, f"train.cut_mix={share}").at(0).cond(slice(0, 4))[SIZES] for share in (0, 1))
    assert before[:, :2].tolist() == [[64, 64]] * 4 and after.tolist() == [[32, 32, 0, 0, 32, 32]] * 4


def test_one_subject_alone_cannot_be_mixed(photos):
    recipe = load_recipe(None, ["class_word=dog", "train.cut_mix=0.3"])
    with pytest.raises(UserError, match=r"train\.cut_mix = 0\.3 puts two subjects into one image, and there is only 'dog'"):
        subjects.load_subjects([photos], recipe, tokens=("zqv",), size=32)


def test_photos_of_several_shapes_cannot_be_mixed(photos):
    recipe = load_recipe(None, ["class_word=dog,cat", "train.cut_mix=0.3", "photos.shape=buckets"])
    with pytest.raises(UserError, match=r"cuts two photos of one shape, and photos\.shape = buckets keeps theirs"):
        subjects.load_subjects([photos, photos], recipe, tokens=("zqv", "kxj"), size=32)


def test_runs_of_before_the_setting_keep_their_identity():
    before = recipe_to_dict(load_recipe(None))
    del before["train"]["cut_mix"], before["choose"]["bleed"]
    assert decisive_settings(recipe_to_dict(load_recipe(None))) == decisive_settings(before)
    for setting in ("train.cut_mix=0.2", "choose.bleed=0.3"):
        assert decisive_settings(recipe_to_dict(load_recipe(None, [setting]))) != decisive_settings(before)
