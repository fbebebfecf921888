"""DINO-fg looks for the subject of the photos, and for nothing else of them."""

from types import SimpleNamespace

import pytest
import torch

from personalize.core.rng import generator
from personalize.evaluation.metrics import foreground
from personalize.evaluation.metrics.foreground import dino_fg, marked
from personalize.evaluation.metrics.similarity import Embeddings

EYE = torch.eye(6)
SUBJECT, PLACE, SNOW = EYE[:2], EYE[2:4], EYE[4:6]
"""Two patches each: whatever is made of one is at right angles to the others."""


def embedded(*patches):
    rows = torch.zeros(len(patches), 6)
    return Embeddings(rows, rows, patches=torch.stack(patches))


def drawn(n, k=0):
    patches = torch.nn.functional.normalize(torch.randn(n, 4, 6, generator=generator(0, "patches", k)), dim=-1)
    return embedded(*patches)


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


FIRST_TWO = mask([True, True, False, False])


def test_the_subject_is_found_anywhere_and_a_copied_background_is_no_gain():
    photo = embedded(torch.cat([SUBJECT, PLACE]))
    images = embedded(
        torch.cat([SNOW, SUBJECT.flip(0)]),  # the subject elsewhere
        torch.cat([PLACE, SUBJECT]),  # and the place with it
        torch.cat([PLACE, SNOW]),  # the place alone
        torch.cat([SUBJECT[:1], PLACE, SNOW[:1]]),  # half of the subject
    )
    assert dino_fg(images, photo, FIRST_TWO).tolist() == [1, 1, 0, 0.5]


def test_dino_fg_is_its_definition_in_loops(monkeypatch):
    monkeypatch.setattr(foreground, "PART", 2)
    images, photos = drawn(5), drawn(3, k=1)
    marks = mask([True, False, True, True], [False] * 4, [False, True, False, False])
    want = []
    for image in images.patches:
        of_photos = []
        for photo, marked_here in zip(photos.patches, marks, strict=True):
            best = [max(float(p @ q) for p in image) for q, yes in zip(photo, marked_here, strict=True) if yes]
            if best:
                of_photos.append(sum(best) / len(best))
        want.append(sum(of_photos) / len(of_photos))
    assert dino_fg(images, photos, marks).tolist() == pytest.approx(want, abs=1e-6)


def test_the_ceiling_is_the_mean_of_the_pairs_of_different_photos():
    photos = drawn(3)
    marks = mask([True, False, True, True], [False] * 4, [False, True, False, False])
    pairs = []
    for i in (0, 2):
        one = Embeddings(photos.dino[i : i + 1], photos.clip[i : i + 1], patches=photos.patches[i : i + 1])
        pairs += [v for k, v in enumerate(dino_fg(photos, one, marks[i : i + 1]).tolist()) if k != i]
    assert foreground.ceiling(photos, marks) == pytest.approx(sum(pairs) / 4, abs=1e-6)
    assert foreground.ceiling(drawn(1), FIRST_TWO) is None


def test_without_any_foreground_there_is_no_score():
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert dino_fg(drawn(3), drawn(2), nothing) is None and foreground.ceiling(drawn(2), nothing) is None
    with pytest.raises(AssertionError, match="patches"):
        dino_fg(Embeddings(EYE, EYE), drawn(2), nothing)


def test_a_patch_is_foreground_where_the_mask_covers_half_of_it():
    judge = SimpleNamespace(grid=2, cover=lambda masks: torch.nn.functional.avg_pool2d(masks, 4).flatten(1))
    half = torch.zeros(1, 8, 8)
    half[:, :, :2] = 1  # half of both patches on the left
    less = torch.zeros(1, 8, 8)
    less[:, :4, :1] = 1
    full = torch.ones(1, 8, 8)
    want = [[True, False, True, False], [False] * 4, [False] * 4, [True] * 4]
    assert marked(judge, [half, less, None, full]).tolist() == want
    assert marked(judge, torch.stack([half, full])).tolist() == [want[0], want[3]]
