"""A copy is found, and a new image of the subject is not called one."""

import math

import pytest
import torch

from personalize.core.rng import generator
from personalize.evaluation.metrics.memorization import authentic, is_copy, leave_one_out, nearest_photo
from personalize.evaluation.metrics.similarity import Embeddings


def embedded(n, k=0):
    rows = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator(0, "copying", k)), dim=-1)
    return Embeddings(rows, rows)


def at(*degrees):
    """Images on a circle: their cosines are those of the angles between them."""
    rows = torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])
    return Embeddings(rows, rows)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def test_nearest_and_leave_one_out_are_their_definitions_in_loops():
    images, photos = embedded(7), embedded(4, k=1)
    want = [max(dot(row, photo) for photo in photos.dino) for row in images.dino]
    assert nearest_photo(images, photos).tolist() == pytest.approx(want, abs=1e-6)
    among = [max(dot(photos.dino[i], photos.dino[j]) for j in range(4) if j != i) for i in range(4)]
    assert leave_one_out(photos).tolist() == pytest.approx(among, abs=1e-6)


def test_an_image_is_a_copy_if_nearer_to_a_photo_than_any_two_photos_are():
    photos = at(0, 20, 60)
    assert is_copy(at(0, 61, 75, 85, 180), photos).tolist() == [True, True, True, False, False]
    assert leave_one_out(photos).tolist() == pytest.approx([math.cos(math.radians(d)) for d in (20, 20, 40)], abs=1e-6)


def test_the_limit_of_a_copy_is_the_nearest_pair_of_the_photos():
    assert is_copy(at(0), at(5, 60, 90)).tolist() == [True]  # 5 degrees from a photo, where photos are 30 apart
    assert is_copy(at(0), at(5, 8, 90)).tolist() == [False]  # the photos are 3 degrees apart themselves
    assert is_copy(at(0, 60), at(5, 60, 90)).tolist() == [True, True]


def test_authentic_is_its_definition_in_loops():
    images, photos = embedded(40), embedded(6, k=1)
    expected = []
    for row in images.dino:
        far = [distance(row, photo) for photo in photos.dino]
        photo = far.index(min(far))
        own = min(distance(photos.dino[photo], photos.dino[j]) for j in range(6) if j != photo)
        expected.append(far[photo] > own)
    assert 0 < sum(expected) < 40
    assert authentic(images, photos).tolist() == expected


def test_an_image_is_measured_by_its_own_nearest_photo():
    photos = at(0, 20, 100)  # nearest others: 20, 20 and 80 degrees away
    assert not authentic(at(0, 20, 100), photos).any()
    assert authentic(at(-30, 250), photos).all()
    # both 30 degrees from a photo, of which the second stands alone
    assert authentic(at(-30, 130), photos).tolist() == [True, False]
    assert is_copy(at(-30, 130), photos).tolist() == [False, False]
    assert not authentic(at(0), at(0, 0, 90)).any()  # no nearer than the photos' own repeat, and no farther


def test_a_single_photo_tells_no_copies():
    one = embedded(1)
    assert leave_one_out(one) is None and is_copy(embedded(3), one) is None and authentic(embedded(3), one) is None
    assert nearest_photo(one, one).tolist() == pytest.approx([1])
