"""The rule keeps the checkpoint that is most like the subject, within limits, and says why."""

import dataclasses
import json

import numpy as np
import pytest

from personalize.common.recipe_sections import Choose
from personalize.evaluation.checkpoint_selection import (
    ScoredCheckpoint,
    checkpoint_rows,
    choose_checkpoint,
    next_strength,
    read_scored,
    stalled,
)

KEYS = [("sks", f"prompt {p}", n) for p in range(8) for n in range(2)]
LIMITS = Choose(every=100, obedience=0.05, drift=0.25, copying=0.25)
NOISE = dict(zip(KEYS, np.random.default_rng(0).normal(0, 0.05, len(KEYS)), strict=True))


def scored(step, identity, *, lost=0.0, drift=0.0, copied=0.0, jitter=0.02, strength=1.0):
    rng = np.random.default_rng(step)
    return ScoredCheckpoint(
        step,
        identity={k: identity + NOISE[k] + rng.normal(0, jitter) for k in KEYS},
        obeys={k: 0.6 * (1 - lost) + NOISE[k] for k in KEYS},
        base_obeys={k: 0.6 + NOISE[k] for k in KEYS},
        pres={("sks", "a dog", n): 0.2 + drift * 0.7 for n in range(4)},
        base_pres={("sks", "a dog", n): 0.2 for n in range(4)},
        ceiling=0.9,
        copied=copied,
        strength=strength,
    )


def test_what_it_says_of_a_checkpoint_are_shares():
    one = scored(100, 0.5, lost=0.1, drift=0.3)
    assert one.lost == pytest.approx(0.1, abs=0.02) and one.drift == pytest.approx(0.3)
    assert [words.split()[0] for _, words in one.over(LIMITS)] == ["10%", "class"]


def test_the_best_identity_wins_within_the_limits():
    course = [scored(100, 0.3), scored(200, 0.5), scored(300, 0.7, drift=0.1), scored(400, 0.9, drift=0.4)]
    assert choose_checkpoint(course, LIMITS).step == 300
    assert "3 of 4" in choose_checkpoint(course, LIMITS).why


def test_a_small_gain_within_the_limits_is_not_given_up_and_of_equals_the_earliest_is_kept():
    course = [scored(100, 0.3), scored(200, 0.7), scored(300, 0.75), scored(400, 0.6)]
    choice = choose_checkpoint(course, LIMITS)
    assert (choice.step, choice.why) == (300, "step 300: the best identity of 4")
    equals = [dataclasses.replace(course[1], step=step) for step in (200, 300)]
    assert choose_checkpoint(equals, LIMITS).step == 200


def test_a_clear_gain_is_not_given_up_for_an_earlier_step():
    choice = choose_checkpoint([scored(100, 0.3), scored(200, 0.7), scored(300, 0.8)], LIMITS)
    assert choice.step == 300 and choice.why == "step 300: the best identity of 3"


def bleeding(step, identity, *shares):
    """A checkpoint of subjects whose images are so far on the way to the next one's photos."""
    pairs = {("abc"[k], "bcd"[k], *key[1:]): share + NOISE[key] for k, share in enumerate(shares) for key in KEYS}
    return dataclasses.replace(scored(step, identity), bleed=pairs)


def test_a_checkpoint_in_which_one_subject_shows_in_another_is_ruled_out_by_the_worst_two():
    course, limits = [bleeding(100, 0.5, 0.1, 0.1), bleeding(200, 0.9, 0.0, 0.5)], dataclasses.replace(LIMITS, bleed=0.25)
    assert choose_checkpoint(course, limits).step == 100 and choose_checkpoint(course, LIMITS).step == 200
    assert [words for _, words in course[1].over(limits)] == ["49% of the way to another subject's photos (limit 25%)"]
    assert course[1].words().endswith(", bleed 49%") and "bleed" not in scored(100, 0.5).words()
    assert course[1].values()["choose/bleed"] == pytest.approx(0.49, abs=0.01)


def test_bleed_is_in_the_rows_of_several_subjects_only(tmp_path):
    course = [scored(100, 0.3), bleeding(200, 0.4, 0.2)]
    path = tmp_path / "choosing.jsonl"
    path.write_text("".join(json.dumps(s.row()) + "\n" for s in course))
    assert read_scored(path) == course and "bleed" not in course[0].row()


@pytest.mark.parametrize("limit", [{"lost": 0.2}, {"drift": 0.5}, {"copied": 0.5}])
def test_each_limit_can_rule_a_checkpoint_out(limit):
    assert choose_checkpoint([scored(100, 0.5), scored(200, 0.9, **limit)], LIMITS).step == 100


def test_where_none_keeps_to_the_limits_the_least_over_is_kept_and_the_limit_named():
    found = choose_checkpoint([scored(100, 0.5, drift=0.6), scored(200, 0.9, drift=0.4)], LIMITS)
    assert found.step == 200 and "class drift 40%" in found.why and "none of 2" in found.why


def test_a_limit_is_broken_only_where_that_is_clear():
    """Few class images say little of drift: 40 % ± 25 % is no reason to throw a checkpoint away."""
    sure = scored(100, 0.5, drift=0.4)
    vague = dataclasses.replace(sure, pres={("sks", "a dog", n): 0.2 + 0.28 * (4 * (n == 0)) for n in range(4)})
    assert vague.drift == pytest.approx(sure.drift) and sure.over(LIMITS) and not vague.over(LIMITS)
    assert dataclasses.replace(vague, strength=0.8).over(LIMITS) == []
    assert dataclasses.replace(vague, strength=1.1).over(LIMITS), "nor a reason to make it stronger"


def test_without_class_images_drift_is_no_limit():
    one = ScoredCheckpoint(100, {KEYS[0]: 0.5}, {KEYS[0]: 0.6}, {KEYS[0]: 0.6})
    assert one.drift == 0 and choose_checkpoint([one], LIMITS).step == 100


def test_a_run_ends_when_identity_stalls_and_drift_rises():
    rising = [scored(100 * k, 0.1 * k, drift=0.05 * k) for k in range(1, 6)]
    flat = [scored(100 * k, 0.5, drift=0.05 * k) for k in range(1, 6)]
    still = [scored(100 * k, 0.5, lost=0.04 - 0.01 * k) for k in range(1, 5)]
    assert not stalled(rising, 3)
    assert stalled(flat, 3) and not stalled(flat[:3], 3) and not stalled(flat, 0)
    assert not stalled(still, 3)


STRENGTHS = (0.6, 0.8, 1.2, 1.4)


@pytest.mark.parametrize(
    ("course", "asks"),
    [
        ([(200, 1, 0.7, 0.1)], 1.2),
        ([(200, 1, 0.7, 0.1), (200, 1.2, 0.8, 0.2)], 1.4),
        ([(200, 1, 0.7, 0.1), (200, 1.2, 0.6, 0.2)], None),  # no gain
        ([(200, 1, 0.7, 0.1), (200, 1.2, 0.9, 0.4)], None),  # over the limit
        ([(200, 1, 0.7, 0.4)], 0.8),
        ([(100, 1, 0.5, 0.0), (200, 1, 0.7, 0.4), (200, 0.8, 0.6, 0.3)], 0.6),
        ([(100, 1, 0.5, 0.0), (200, 1, 0.7, 0.4), (200, 0.8, 0.6, 0.1)], None),
        ([(200, 1, 0.7, 0.4), (200, 0.8, 0.6, 0.4), (200, 0.6, 0.5, 0.4)], None),
    ],
)
def test_strengths_are_scored_down_until_the_limits_hold_and_up_while_it_gains(course, asks):
    states = [scored(step, identity, drift=drift, strength=strength) for step, strength, identity, drift in course]
    assert next_strength(states, STRENGTHS, LIMITS) == (asks and (200, asks))


def test_a_weaker_late_checkpoint_is_kept_where_it_keeps_to_the_limits():
    course = [scored(100, 0.3), scored(200, 0.7, drift=0.5), scored(200, 0.6, drift=0.2, strength=0.8)]
    choice = choose_checkpoint(course, LIMITS)
    assert (choice.step, choice.strength) == (200, 0.8)
    assert choice.why == "step 200 at 0.8 of its strength: the best identity among 2 of 3 that keep to the limits"
    rows = checkpoint_rows(course, LIMITS, (200, 0.8))
    assert [(row["strength"], row["chosen"]) for row in rows] == [(1, False), (1, False), (0.8, True)]


def test_scores_are_read_back_as_they_were_and_the_newest_of_a_step_counts(tmp_path):
    course = [scored(100, 0.3), scored(200, 0.1), scored(200, 0.5, copied=0.1), scored(200, 0.4, strength=0.8)]
    path = tmp_path / "choosing.jsonl"
    path.write_text("".join(json.dumps(s.row()) + "\n" for s in course))
    assert read_scored(path) == [course[0], course[3], course[2]] and read_scored(tmp_path / "none") == []


def test_the_table_marks_the_chosen_and_says_what_failed():
    rows = checkpoint_rows([scored(100, 0.5), scored(200, 0.9, drift=0.5)], LIMITS, (100, 1.0))
    assert [row["chosen"] for row in rows] == [True, False] and [row["qualifies"] for row in rows] == [True, False]
    assert rows[0]["low"] < rows[0]["identity"] < rows[0]["high"] and "50%" in rows[1]["failed"][0]
