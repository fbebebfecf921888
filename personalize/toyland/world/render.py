"""Draws Toyland scenes: rasterised at 4x (at 3x from 128 px on) and averaged down."""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from personalize.toyland.world import animals, objects
from personalize.toyland.world import props as extras
from personalize.toyland.world.backdrops import HORIZON, WATER_BRIGHTNESS, backdrop
from personalize.toyland.world.faces import Anchors
from personalize.toyland.world.pen import CENTRE, INK, Pen, gradient, rim_colour, shade
from personalize.toyland.world.props import BLANKET, bed, blanket, draw_back_accessory, hops, letters, puffs, skateboard
from personalize.toyland.world.scenes import COLOURS, Scene

LARGE = 128  # px from which on 3x is enough
WING_RIM, PROP_RIM, OVER_RIM = (126, 138, 178), (92, 78, 92), (74, 84, 136)
TURN = {"jumping": -0.26, "flying": -0.12}  # rad
RISE = {"jumping": -0.14, "flying": -0.15, "riding": -0.055}
WATER = 0.71  # y of its line
UNDER = 0.3  # share of a swimmer's or a sleeper's height that is covered
EDGE = 0.032  # what is kept free at the edges of the picture, the rim included
FLOOR = 0.83  # y of the shadow's middle
DEPTH = {"standing": 0.3, "riding": 0.36, "sleeping": 0.46, "jumping": 0.2, "flying": 0.17}  # half the shadow's width

# A class word -> what draws it: a pen and a subject in, its anchors out.
DRAW = {
    "dog": animals.draw_dog,
    "cat": animals.draw_cat,
    "rabbit": animals.draw_rabbit,
    "horse": animals.draw_horse,
    "duck": animals.draw_duck,
    "owl": animals.draw_owl,
    "teapot": objects.draw_teapot,
    "car": objects.draw_car,
    "boat": objects.draw_boat,
    "robot": objects.draw_robot,
    "backpack": objects.draw_backpack,
    "clock": objects.draw_clock,
}


class Parts(NamedTuple):
    """What moves together, in the order of drawing. A wing is no part of the subject, so its mask has none."""

    wings: Pen
    back: Pen
    body: Pen
    worn: Pen


def draw_scene(of: Scene, size: int = 64, body: int = 255) -> tuple[Image.Image, Image.Image]:
    """The picture (size, size) RGB and the mask of its visible subject, accessory included, (size, size) L.

    body: what the mask is where the subject itself shows; an accessory is 255.
    """
    times = 3 if size >= LARGE else 4
    side = times * size
    image, mask = backdrop(of, side), Image.new("L", (side, side))
    parts, at = _draw_subject(of)
    shift = _subject_shift(of, parts, at)
    props, over = _action_props(of, at, shift)
    if of.action == "swimming":
        _draw_lake(image, of)
    else:
        _draw_shadow(image, of, _ground_shift(of, shift))
    props.ink(image, rim=PROP_RIM)
    own = rim_colour(COLOURS[of.accessory.colour]) if of.accessory else INK
    for pen, rim in zip(parts, (WING_RIM, own, rim_colour(of.subject.body), own)):
        pen.shift = shift
        pen.ink(image, None if pen is parts.wings else mask, rim, body if pen is parts.body else 255)
    if of.action == "swimming":
        mask = _draw_water(image, mask, of)
    if over.marks:
        covered = Image.new("L", (side, side))
        over.ink(image, covered, rim=OVER_RIM)
        mask = ImageChops.subtract(mask, covered)
    return image.reduce(times), mask.reduce(times)


def _draw_subject(of: Scene) -> tuple[Parts, Anchors]:
    how = {"scale": of.scale, "mirror": of.facing == "left", "asleep": of.action == "sleeping"}
    parts = Parts(*(Pen(**how, angle=TURN.get(of.action, 0.0)) for _ in range(4)))
    at = DRAW[of.subject.class_word](parts.body, of.subject)
    draw_back_accessory(parts.back, of.accessory, at)
    if of.action == "flying":
        extras.wings(parts.wings, at)
    extras.draw_worn_accessory(parts.worn, of.accessory, at)
    return parts, at


def _subject_shift(of: Scene, parts: Parts, at: Anchors) -> tuple[float, float]:
    """Where the subject is shifted: as the scene and the action ask, as far as nothing is cut off at the top or the sides."""
    if of.action in ("swimming", "sleeping"):
        level = WATER if of.action == "swimming" else BLANKET
        dy = level - CENTRE[1] - of.scale * (_cover_line(of, parts.body, at) - CENTRE[1])
    else:
        dy = of.y + RISE.get(of.action, 0.0)
    (left, right), top = _bounds(parts)
    if right - left > 1:  # a wing may be cut off
        (left, right), _ = _bounds([parts.back, parts.body, parts.worn])
    return max(-left, min(1 - right, of.x)), max(dy, -top)


def _bounds(pens: Iterable[Pen]) -> tuple[tuple[float, float], float]:
    """From where to where in x, and from where in y, EDGE included."""
    marks = [mark for pen in pens for mark in pen.placed(1)]
    left = min(x - mark.width / 2 for mark in marks for x, _ in mark.path) - EDGE
    right = max(x + mark.width / 2 for mark in marks for x, _ in mark.path) + EDGE
    return (left, right), min(y - mark.width / 2 for mark in marks for _, y in mark.path) - EDGE


def _ground_shift(of: Scene, shift: tuple[float, float]) -> tuple[float, float]:
    """How far what it stands on is shifted."""
    return shift[0], shift[1] - RISE.get(of.action, 0.0) if of.action in ("standing", "riding") else of.y


def _cover_line(of: Scene, body: Pen, at: Anchors) -> float:
    """Below that y a swimmer or a sleeper is covered, but never its face nor its scarf."""
    ys = [y for mark in body.marks for _, y in mark.path]
    scarf = of.accessory and of.accessory.kind == "scarf"
    return max(max(ys) - UNDER * (max(ys) - min(ys)), at.eyes[1] + 0.075, at.neck[1] + 0.035 if scarf else 0.0)


def _action_props(of: Scene, at: Anchors, shift: tuple[float, float]) -> tuple[Pen, Pen]:
    """What belongs to the action, behind the subject and before it."""
    left = of.facing == "left"
    props, over = (Pen(scale=of.scale, mirror=left, shift=_ground_shift(of, shift)) for _ in range(2))
    if of.action == "sleeping":
        props, over = (Pen(mirror=left, shift=(0.3 * shift[0], 0.0)) for _ in range(2))
        bed(props)
        blanket(over)
        x, y = at.top
        x += (-0.7 if left else 0.7) * shift[0]
        letters(over, (x, CENTRE[1] + of.scale * (y - CENTRE[1]) + shift[1]), mirror=left)
    elif of.action == "riding":
        skateboard(props)
    elif of.action == "jumping":
        hops(props)
    elif of.action == "flying":
        puffs(over)
    return props, over


@cache
def _shadow_image() -> Image.Image:
    """A soft round shadow, L."""
    return Image.radial_gradient("L").point([max(0, min(110, round(1.3 * (225 - 1.25 * v)))) for v in range(256)])


def _draw_shadow(image: Image.Image, of: Scene, shift: tuple[float, float]):
    side, rx = image.width, of.scale * DEPTH[of.action]
    ry = 0.16 * rx + 0.01
    x, y = CENTRE[0] + shift[0], CENTRE[1] + shift[1] + of.scale * (FLOOR - CENTRE[1]) + (0.05, -0.02)[of.action == "standing"]
    spot = _shadow_image().resize((round(2 * rx * side), round(2 * ry * side)))
    image.paste((30, 24, 44), (round((x - rx) * side), round((y - ry) * side)), spot)


def _draw_lake(image: Image.Image, of: Scene):
    side, dark = image.width, WATER_BRIGHTNESS.get(of.place, 1.0)
    top, bottom = (shade(c, dark) for c in ((110, 190, 238), (40, 118, 205)))
    level = round(HORIZON * side)
    image.paste(gradient((side, side - level), top, bottom), (0, level))


def _draw_water(image: Image.Image, mask: Image.Image, of: Scene) -> Image.Image:
    """Covers what is under the water line; returns the mask of what still shows."""
    side, dark = image.width, WATER_BRIGHTNESS.get(of.place, 1.0)
    wave = [(x / 40, WATER + 0.012 * math.sin(x * 1.6)) for x in range(41)]
    under = Image.new("L", (side, side))
    ImageDraw.Draw(under).polygon([(side * x, side * y) for x, y in [*wave, (1, 1.01), (0, 1.01)]], fill=255)
    level = round((WATER - 0.02) * side)
    water = gradient((side, side - level), *(shade(c, dark) for c in ((92, 176, 232), (34, 106, 192))))
    image.paste(water, (0, level), under.crop((0, level, side, side)).point(lambda a: a * 0.88))
    crest = Pen()
    crest.stroke(wave, 0.02, (232, 246, 254))
    crest.ink(image)
    return ImageChops.subtract(mask, under)
