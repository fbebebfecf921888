"""A grid holds every image it was given, whole and in reading order."""

import numpy as np
from PIL import Image

from personalize.data.image_grid import grid


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def colours(n):
    """n saturated colours that neither paper, words nor each other have."""
    return [(255, 7 * k % 256, 11 * k % 199 + 1) for k in range(n)]


def places(page, wanted):
    """Where each colour's centre of mass is: [(x, y) or None]."""
    data = np.array(page)
    spots = [np.argwhere((data == colour).all(-1)) for colour in wanted]
    return [tuple(spot.mean(0)[::-1].tolist()) if len(spot) else None for spot in spots]


def test_grid_places_every_image_at_full_size():
    wanted = colours(7)
    page = grid([plain(c) for c in wanted], 3)
    assert page.size == (3 * 64 + 2 * 4, 3 * 64 + 2 * 4)
    found = places(page, wanted)
    assert found == [(k % 3 * 68 + 31.5, k // 3 * 68 + 31.5) for k in range(7)]
    assert grid([plain((1, 2, 3))], 4).size == (64, 64)
