"""The cluster bootstrap is as wide as clusters make it, and a paired difference sees what two means hide."""

import numpy as np
import pytest

from personalize.evaluation.bootstrap import bootstrap_interval, mean, paired_difference


def drawn(prompts, images, *, between, within, seed=0):
    """Values and labels: prompts differ by `between`, images of a prompt by `within`."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, between, prompts)
    values = [c + rng.normal(0, within) for c in centres for _ in range(images)]
    return values, [(p,) for p in range(prompts) for _ in range(images)]


def test_clusters_weigh_the_same_however_many_images_they_have():
    assert mean([1, 0, 1, 1], [("a",), ("b",), ("a",), ("a",)]) == 0.5
    assert mean([1, 0, 0, 1], [("s", "a"), ("s", "b"), ("s", "b"), ("t", "a")]) == 0.75


def test_what_was_not_measured_is_left_out_and_nothing_measured_is_none():
    assert mean([1, None, float("nan"), 0], [("a",), ("a",), ("b",), ("c",)]) == 0.5
    assert mean([None], [("a",)]) is None and bootstrap_interval([], []) is None and paired_difference({}, {}) is None


def test_the_standard_error_of_one_cluster_is_the_textbooks():
    values, labels = drawn(1, 400, between=0, within=1)
    assert bootstrap_interval(values, labels).se == pytest.approx(np.std(values) / 20, rel=0.06)


def test_it_is_the_prompts_that_limit_what_is_known():
    """Ten times the images of the same ten prompts: hardly surer. A bootstrap over images would claim three times."""
    few, many = (drawn(10, n, between=1, within=0.2) for n in (4, 40))
    assert bootstrap_interval(*many).se > 0.8 * bootstrap_interval(*few).se
    pooled = bootstrap_interval(many[0], [()] * len(many[0]))
    assert bootstrap_interval(*many).se > 2 * pooled.se


def test_intervals_hold_what_they_promise():
    """Of 200 drawn sets of 20 prompts, about 95 % of the intervals hold the true mean, 0."""
    held = 0
    for seed in range(200):
        found = bootstrap_interval(*drawn(20, 3, between=1, within=1, seed=seed))
        held += found.low <= 0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_subjects_are_drawn_again_as_wholes():
    """Two subjects that differ, with many prompts each: prompts say little of a third subject."""
    labels = [(s, p) for s in "ab" for p in range(50)]
    values = [float(s == "a") for s, _ in labels]
    found = bootstrap_interval(values, labels)
    assert found.mean == 0.5 and found.low == 0 and found.high == 1


def test_pairs_see_a_small_gain_that_prompts_hide():
    values, labels = drawn(8, 2, between=1, within=0.3)
    b = {(*label, k): v for k, (label, v) in enumerate(zip(labels, values, strict=True))}
    a = {key: v + 0.05 for key, v in b.items()}
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(0.05) and found.above == 1 and found.se < 1e-9
    assert paired_difference(b, a).above == 0 and paired_difference(a, a).above == 0.5
    assert bootstrap_interval(values, labels).se > 0.2


def test_only_images_of_both_are_compared():
    assert paired_difference({("a", 0): 1.0, ("b", 0): 9.0}, {("a", 0): 0.5, ("c", 0): 0.0}).mean == 0.5


def test_the_same_values_give_the_same_interval():
    values, labels = drawn(8, 2, between=1, within=1)
    assert (
        bootstrap_interval(values, labels) == bootstrap_interval(values, labels) != bootstrap_interval(values, labels, seed=1)
    )
