"""The prompt of a photo at a step: dropped out, or its parts in another order."""

import collections

import pytest
import torch

from personalize import models
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.core import rng
from personalize.data import step_prompts, subjects, training_set
from personalize.data.crops import epoch_order, epochs_of
from personalize.generation import sampling
from personalize.training.find_run import decisive_settings

TAGS = "a {token} {class}, snow, night, from above"


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)


def made(model, photos, *more, text_trains=False):
    recipe = load_recipe(None, ["class_word=dog", "photos.hold_out=0", "photos.min_size=16", "train.prior_batch=2", *more])
    known, _ = subjects.load_subjects([photos], recipe, tokens=["zqv"], size=model.size)
    priors = {"dog": torch.zeros(3, 4, 16, 16)}
    return training_set.build_training_set(model, recipe, known, priors=priors, text_trains=text_trains)


@pytest.mark.parametrize("text_trains", [False, True])
def test_a_share_of_photos_is_seen_without_a_prompt_and_class_images_never_are(model, photos, text_trains):
    plain, dropping = (
        made(model, photos, "train.batch=3", *more, text_trains=text_trains) for more in ([], ["train.caption_dropout=0.3"])
    )
    rows = [dropping.step_prompts.rows([0, 1, 2], [0, 0, 0], step) for step in range(1000)]
    for column in zip(*rows):  # each photo by itself; 5 standard errors
        assert abs(column.count(dropping.step_prompts.empty) / 1000 - 0.3) < 0.073
    assert len({tuple(row) for row in rows}) == 8, "photos of a step are dropped one by one"
    step = next(step for step, row in enumerate(rows) if row.count(dropping.step_prompts.empty) == 1)
    batch, before = dropping.at(step), plain.at(step)
    which = epoch_order(5, 3, step, seed=0, purpose="subject")
    texts = [
        "" if row == dropping.step_prompts.empty else "a zqv dog" for row in dropping.step_prompts.rows(which, [0] * 3, step)
    ]
    wanted = sampling.encode_texts(model, [*texts, "a dog", "a dog"])["text"]
    torch.testing.assert_close(batch.cond(slice(0, 5))["text"], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.z0, before.z0) and torch.equal(batch.eps, before.eps) and torch.equal(batch.t, before.t)


def test_dropout_is_of_the_seed_and_the_step_alone(model, photos):
    rows = [made(model, photos, "train.caption_dropout=0.5", f"seed={seed}").step_prompts for seed in (0, 0, 1)]
    first, again, other = ([one.rows([0], [0], step) for step in range(40)] for one in rows)
    assert first == again != other
    (always,) = made(model, photos, "train.caption_dropout=1").step_prompts.rows([4], [7], 0)
    assert always == 6, "five photos, a class, and the empty prompt"


def test_what_says_the_token_stays_first_and_the_rest_takes_every_order():
    """Kohya's `shuffle_caption` with `keep_tokens` = 1: the first tag stays, the others are shuffled, joined by ", "."""
    tags = ["a sks dog", "snow", "night", "from above"]
    drawn = [step_prompts.shuffled(" ,".join(tags), rng.generator(0, "t", k), lambda part: "sks" in part) for k in range(600)]
    parts = [text.split(", ") for text in drawn]
    assert all(part[0] == tags[0] and sorted(part[1:]) == sorted(tags[1:]) for part in parts)
    counts = collections.Counter(map(tuple, parts))
    assert len(counts) == 6 and all(abs(count - 100) < 46 for count in counts.values())  # 5 standard errors of 9.1
    one = step_prompts.shuffled("snow, a sks dog,, night", rng.generator(0, "t", 0), lambda part: "sks" in part)
    assert one.startswith("a sks dog, ") and one.count(",") == 2


def test_each_pass_over_the_photos_has_another_order_cached_or_not(model, photos):
    settings = ["train.caption_shuffle=true", f"train.prompt={TAGS}", "train.batch=2"]
    cached, encoding = (made(model, photos, *settings, text_trains=trains) for trains in (False, True))
    assert cached.prompts[:5] == ["a zqv dog, snow, night, from above"] * 5 and cached.prompts[5] == "a dog"
    seen = collections.defaultdict(set)
    for step in range(20):
        which, passes = epoch_order(5, 2, step, seed=0, purpose="subject"), epochs_of(5, 2, step)
        rows = cached.step_prompts.rows(which, passes, step)
        assert rows == encoding.step_prompts.rows(which, passes, step)
        for i, row in zip(which, rows):
            seen[i].add(cached.prompts[row])
        wanted = sampling.encode_texts(model, [cached.prompts[row] for row in rows])["text"]
        for data in (cached, encoding) if step % 7 == 0 else ():
            torch.testing.assert_close(data.at(step).cond(slice(0, 2))["text"], wanted, rtol=1e-4, atol=1e-5)
    assert all(2 <= len(prompts) <= 6 and all(text.startswith("a zqv dog, ") for text in prompts) for prompts in seen.values())
    plain = made(model, photos, *settings[1:])
    assert plain.step_prompts.orders == [[0], [1], [2], [3], [4]] and len(plain.prompts) == 6


def test_many_prompts_are_encoded_in_parts_and_the_first_as_without_them(model, monkeypatch):
    monkeypatch.setattr(step_prompts, "ENCODED", 2)
    own, more = ["a dog", "a cat"], ["", "a red hat", "a dog in the snow"]
    encoded = step_prompts.encode_all(model, own, more)["text"]
    torch.testing.assert_close(encoded, sampling.encode_texts(model, own + more)["text"], rtol=1e-4, atol=1e-5)
    assert torch.equal(encoded[:2], sampling.encode_texts(model, own)["text"])


def test_runs_from_before_keep_their_identity_and_these_settings_make_another():
    recipes = [recipe_to_dict(load_recipe(None, more)) for more in
               ([], ["train.caption_dropout=0.1"], ["train.caption_shuffle=true"], ["captions.add_token=false"])]  # fmt: skip
    plain, dropout, shuffle, refused = map(decisive_settings, recipes)
    assert not any("caption" in key for key in (*plain, *plain["train"])) and plain == refused
    assert dropout != plain != shuffle != dropout
