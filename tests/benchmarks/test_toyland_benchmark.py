"""What `benchmarks.toyland` and `benchmarks.subjects` count is what they say, shown on rendered images."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import subjects, toyland
from personalize.evaluation.metrics import toyland_truth
from personalize.toyland.world.scenes import sample_scene, sample_subject


@pytest.fixture(scope="module")
def bench():
    return toyland.Bench(SimpleNamespace(size=64), None, toyland_truth.load_probe(), 100)


def test_a_prompt_says_all_of_its_scene(bench):
    for scene in bench.scenes(300):
        asked = toyland_truth.wanted(toyland.prompt(scene))
        assert (asked["class"], asked["place"], asked["action"]) == (scene.subject.class_word, scene.place, scene.action)
        assert (asked.get("accessory"), asked.get("accessory_colour")) == (scene.accessory or (None, None))


def test_rendered_images_follow_their_prompts_and_not_those_of_others(bench):
    scenes = bench.scenes(100)
    drawn = bench.render(scenes)
    right, wrong = toyland.prompt_adherence(bench, scenes, drawn), toyland.prompt_adherence(bench, scenes[::-1], drawn)
    assert min(right.values()) > 0.65, right
    assert max(wrong.values()) < 0.5, wrong


def test_one_dog_many_times_has_no_spread(bench):
    dogs = [sample_scene(toyland.FIRST + k, subject=sample_subject(toyland.FIRST + k, "dog")) for k in range(24)]
    same = [sample_scene(toyland.FIRST + k, subject=dogs[0].subject) for k in range(24)]
    assert toyland.spread(bench, bench.render(dogs)) > 1.5 * toyland.spread(bench, bench.render(same))


def test_kid_is_nothing_for_one_distribution_and_grows_with_the_difference():
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(400, 16, generator=g) for _ in range(3))
    assert abs(toyland.kid(a, b)) < 0.02 < toyland.kid(a, c + 0.3) < toyland.kid(a, c + 0.6)


def test_the_excess_of_kid_sees_a_difference_that_chance_would_hide_and_a_multiple_of_nothing_is_no_number():
    g = torch.Generator().manual_seed(0)
    drawn, others = torch.randn(400, 16, generator=g), torch.randn(1600, 16, generator=g)
    little, more = (toyland.excess(narrower * drawn, drawn, others) for narrower in (0.9, 0.8))
    chance = torch.tensor([toyland.kid(drawn[k::10], others) for k in range(10)]).std().item() / 10**0.5
    assert 0 < little.value < chance < more.value and max(little.error, more.error) < chance
    assert more.value > 2 * more.error
    assert toyland.excess(drawn, drawn, others) == toyland.Excess(0.0, 0.0)
    assert toyland.multiple(little, more) == little.value / more.value
    assert toyland.multiple(toyland.Excess(-0.1, 0.1), more) == 0.0
    for nothing in (-0.01, 0.01):
        assert toyland.multiple(more, toyland.Excess(nothing, 0.01)) == float("inf")


def test_a_bar_is_met_from_its_side():
    assert toyland.Bar("x", 0.9, 0.9, 1).met() and not toyland.Bar("x", 0.89, 0.9, 1).met()
    assert toyland.Bar("x", 6, 6, 2, at_most=True).met() and not toyland.Bar("x", 6.1, 6, 2, at_most=True).met()
    assert "**missed**" in toyland.Bar("x", 0.89, 0.9, 1).row() and "≤ 6" in toyland.Bar("x", 1, 6, 2, at_most=True).row()


def test_no_two_parts_of_the_benchmarks_share_a_seed():
    first = {which: [subjects.seed_of(which, k) for k in range(len(words))] for which, words in subjects.CLASSES.items()}
    taken = [seed + 1000 * k for seeds in first.values() for seed in seeds for k in range(subjects.LOOK_ALIKES + 1)]
    spans = {s for seed in taken for s in range(seed, seed + len(subjects.PHOTOS))}
    assert len(spans) == len(taken) * len(subjects.PHOTOS)
    assert min(spans) >= toyland.FIRST + 1_000_000
