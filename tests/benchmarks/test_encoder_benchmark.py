"""What `benchmarks.encoder` counts is what it says: a score that knows the truth gets all, one that is constant half."""

import dataclasses
import random
from collections import Counter
from itertools import combinations

import pytest
import torch

from benchmarks import encoder
from personalize.common.bases import TOYLAND
from personalize.evaluation import encoders
from personalize.evaluation.metrics import toyland_truth
from personalize.toyland.world import scenes
from personalize.toyland.world.scenes import CLASSES, Subject, sample_subject

DOG = sample_subject(encoder.FIRST, "dog")


@pytest.fixture(scope="module")
def seen():
    return encoders.load_encoders(TOYLAND, "cpu")


class Knowing(encoder.Judge):
    """Scores by the true subject; "clip_i" knows nothing."""

    def scores(self, scenes):
        right = torch.tensor([sum(getattr(s.subject, part) == getattr(DOG, part) for part in encoder.PARTS) for s in scenes])
        return {name: right if name != "clip_i" else torch.zeros(len(scenes)) for name in encoder.SCORES}


def test_a_score_that_knows_the_truth_is_always_right_and_a_constant_one_half():
    pairs = encoder.part_pairs(Knowing(None, None, None, None), DOG, encoder.FIRST)
    assert {name[:2] for name in pairs} == {(where, part) for where in (encoder.SAME, encoder.OTHER) for part in encoder.PARTS}
    assert all(value == (0.5 if name[2] == "clip_i" else 1.0) for name, value in pairs.items())


def test_a_graded_subject_has_at_most_five_parts_of_another_and_all_of_its_proportions_or_none():
    r, counts = random.Random(0), set()
    for seed in range(100):
        one = encoder.graded(DOG, r, seed)
        other = sample_subject(seed, "dog")
        own = [getattr(one, field) == getattr(DOG, field) for field in encoder.PROPORTIONS]
        assert all(own) or [getattr(one, f) for f in encoder.PROPORTIONS] == [getattr(other, f) for f in encoder.PROPORTIONS]
        counts.add(sum(getattr(one, part) != getattr(DOG, part) for part in encoder.PARTS) + (not all(own)))
    assert 0 in counts and max(counts) == encoder.MOST_CHANGED


def test_the_shipped_encoders_are_scored_on_every_part(seen, monkeypatch):
    monkeypatch.setattr(encoder, "CLASSES", ("dog", "boat"))
    found = encoder.measure(seen, 2)
    assert found["pairs"] == 4 and found["graded pairs"] <= 4 and found[encoder.SAME]["body"]["dino"] > 0.5
    text = encoder.report(found)
    assert "| DINO, same scene | " in text and "4 pairs a part" in text and "| first, other scene | " in text


def test_the_agreement_that_ships_is_of_the_encoder_that_ships(seen, tmp_path):
    share = encoders.truth_agreement(TOYLAND, seen.names["dino"])
    assert share and share > 0.6
    assert encoders.truth_agreement(TOYLAND, "identity sha256:000000000000") is None
    assert encoders.truth_agreement(tmp_path, seen.names["dino"]) is None


@pytest.mark.parametrize("word", CLASSES)
def test_relatives_differ_in_one_part_only_which_can_be_seen(word):
    fields = [field.name for field in dataclasses.fields(Subject)]
    changed = Counter()
    for seed in range(20):
        subject = sample_subject(seed, word)
        family = [subject, *encoder.relatives(subject, seed)]
        assert len(set(family)) == len(family) == 1 + sum(encoder.RELATIVES.values())
        for one in family[1:]:
            (part,) = [name for name in fields if getattr(one, name) != getattr(subject, name)]
            changed[part] += 1
            colours = (one.body, one.second, one.detail)
            assert all(scenes.distance(a, b) >= scenes.MIN_COLOUR_DISTANCE for a, b in combinations(colours, 2))
    assert changed == {part: 20 * count for part, count in encoder.RELATIVES.items()}
    assert set(changed) <= toyland_truth.visible(word)
