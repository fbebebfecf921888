"""Draws Toyland scenes: rasterised at 4x (at 3x from 128 px on) and averaged down."""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from personalize.toyland.world import animals, objects
from personalize.toyland.world.backdrops import HORIZON, WATER_BRIGHTNESS, backdrop
from personalize.toyland.world.faces import Anchors
from personalize.toyland.world.pen import CENTRE, INK, Pen, gradient, rim_colour, shade
from personalize.toyland.world.props import (
    BLANKET,
    bed,
    blanket,
    draw_back_accessory,
    draw_worn_accessory,
    hops,
    letters,
    puffs,
    skateboard,
    wings,
)
from personalize.toyland.world.scenes import COLOURS, Scene

LARGE = 128  # px from which on 3x is enough
WING_RIM, BACKGROUND_RIM, FOREGROUND_RIM = (126, 138, 178), (92, 78, 92), (74, 84, 136)
TURN = {"jumping": -0.26, "flying": -0.12}  # rad
RISE = {"jumping": -0.14, "flying": -0.15, "riding": -0.055}
WATER = 0.71  # y of its line
COVERED_SHARE = 0.3  # share of a swimmer's or a sleeper's height that is covered
EDGE = 0.032  # the margin at the edges of the image, the rim included
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
    back_accessory: Pen
    body: Pen
    accessory: Pen


def draw_scene(scene: Scene, size: int = 64, body: int = 255) -> tuple[Image.Image, Image.Image]:
    """The image (size, size) RGB and the mask of its visible subject, accessory included, (size, size) L.

    body: what the mask is where the subject itself shows; an accessory is 255.
    """
    supersampling = 3 if size >= LARGE else 4
    side = supersampling * size
    image, mask = backdrop(scene, side), Image.new("L", (side, side))
    parts, anchors = _draw_subject(scene)
    shift = _subject_shift(scene, parts, anchors)
    background, foreground = _action_props(scene, anchors, shift)
    if scene.action == "swimming":
        _draw_lake(image, scene)
    else:
        _draw_shadow(image, scene, _ground_shift(scene, shift))
    background.ink(image, rim=BACKGROUND_RIM)
    accessory_rim = rim_colour(COLOURS[scene.accessory.colour]) if scene.accessory else INK
    for pen, rim in zip(parts, (WING_RIM, accessory_rim, rim_colour(scene.subject.body), accessory_rim)):
        pen.shift = shift
        pen.ink(image, None if pen is parts.wings else mask, rim, body if pen is parts.body else 255)
    if scene.action == "swimming":
        mask = _draw_water(image, mask, scene)
    if foreground.marks:
        occlusion = Image.new("L", (side, side))
        foreground.ink(image, occlusion, rim=FOREGROUND_RIM)
        mask = ImageChops.subtract(mask, occlusion)
    return image.reduce(supersampling), mask.reduce(supersampling)


def _draw_subject(scene: Scene) -> tuple[Parts, Anchors]:
    transform = {"scale": scene.scale, "mirror": scene.facing == "left", "asleep": scene.action == "sleeping"}
    parts = Parts(*(Pen(**transform, angle=TURN.get(scene.action, 0.0)) for _ in range(4)))
    anchors = DRAW[scene.subject.class_word](parts.body, scene.subject)
    draw_back_accessory(parts.back_accessory, scene.accessory, anchors)
    if scene.action == "flying":
        wings(parts.wings, anchors)
    draw_worn_accessory(parts.accessory, scene.accessory, anchors)
    return parts, anchors


def _subject_shift(scene: Scene, parts: Parts, anchors: Anchors) -> tuple[float, float]:
    """Where the subject is shifted: as the scene and the action ask, as far as nothing is cut off at the top or the sides."""
    if scene.action in ("swimming", "sleeping"):
        level = WATER if scene.action == "swimming" else BLANKET
        dy = level - CENTRE[1] - scene.scale * (_cover_line(scene, parts.body, anchors) - CENTRE[1])
    else:
        dy = scene.y + RISE.get(scene.action, 0.0)
    (left, right), top = _bounds(parts)
    if right - left > 1:  # a wing may be cut off
        (left, right), _ = _bounds([parts.back_accessory, parts.body, parts.accessory])
    return max(-left, min(1 - right, scene.x)), max(dy, -top)


def _bounds(pens: Iterable[Pen]) -> tuple[tuple[float, float], float]:
    """From where to where in x, and from where in y, EDGE included."""
    marks = [mark for pen in pens for mark in pen.to_pixels(1)]
    left = min(x - mark.width / 2 for mark in marks for x, _ in mark.path) - EDGE
    right = max(x + mark.width / 2 for mark in marks for x, _ in mark.path) + EDGE
    return (left, right), min(y - mark.width / 2 for mark in marks for _, y in mark.path) - EDGE


def _ground_shift(scene: Scene, shift: tuple[float, float]) -> tuple[float, float]:
    """How far what it stands on is shifted."""
    return shift[0], shift[1] - RISE.get(scene.action, 0.0) if scene.action in ("standing", "riding") else scene.y


def _cover_line(scene: Scene, body: Pen, anchors: Anchors) -> float:
    """Below that y a swimmer or a sleeper is covered, but never its face nor its scarf."""
    ys = [y for mark in body.marks for _, y in mark.path]
    scarf = scene.accessory and scene.accessory.kind == "scarf"
    return max(
        max(ys) - COVERED_SHARE * (max(ys) - min(ys)), anchors.eyes[1] + 0.075, anchors.neck[1] + 0.035 if scarf else 0.0
    )


def _action_props(scene: Scene, anchors: Anchors, shift: tuple[float, float]) -> tuple[Pen, Pen]:
    """What belongs to the action, behind the subject and before it."""
    mirror = scene.facing == "left"
    background, foreground = (Pen(scale=scene.scale, mirror=mirror, shift=_ground_shift(scene, shift)) for _ in range(2))
    if scene.action == "sleeping":
        background, foreground = (Pen(mirror=mirror, shift=(0.3 * shift[0], 0.0)) for _ in range(2))
        bed(background)
        blanket(foreground)
        x, y = anchors.top
        x += (-0.7 if mirror else 0.7) * shift[0]
        letters(foreground, (x, CENTRE[1] + scene.scale * (y - CENTRE[1]) + shift[1]), mirror=mirror)
    elif scene.action == "riding":
        skateboard(background)
    elif scene.action == "jumping":
        hops(background)
    elif scene.action == "flying":
        puffs(foreground)
    return background, foreground


@cache
def _shadow_image() -> Image.Image:
    """A soft round shadow, L."""
    return Image.radial_gradient("L").point([max(0, min(110, round(1.3 * (225 - 1.25 * v)))) for v in range(256)])


def _draw_shadow(image: Image.Image, scene: Scene, shift: tuple[float, float]):
    side, rx = image.width, scene.scale * DEPTH[scene.action]
    ry = 0.16 * rx + 0.01
    x = CENTRE[0] + shift[0]
    y = CENTRE[1] + shift[1] + scene.scale * (FLOOR - CENTRE[1]) + (0.05, -0.02)[scene.action == "standing"]
    shadow = _shadow_image().resize((round(2 * rx * side), round(2 * ry * side)))
    image.paste((30, 24, 44), (round((x - rx) * side), round((y - ry) * side)), shadow)


def _draw_lake(image: Image.Image, scene: Scene):
    side, brightness = image.width, WATER_BRIGHTNESS.get(scene.place, 1.0)
    top, bottom = (shade(c, brightness) for c in ((110, 190, 238), (40, 118, 205)))
    level = round(HORIZON * side)
    image.paste(gradient((side, side - level), top, bottom), (0, level))


def _draw_water(image: Image.Image, mask: Image.Image, scene: Scene) -> Image.Image:
    """Covers what is under the water line; returns the mask of what still shows."""
    side, brightness = image.width, WATER_BRIGHTNESS.get(scene.place, 1.0)
    wave = [(x / 40, WATER + 0.012 * math.sin(x * 1.6)) for x in range(41)]
    underwater = Image.new("L", (side, side))
    ImageDraw.Draw(underwater).polygon([(side * x, side * y) for x, y in [*wave, (1, 1.01), (0, 1.01)]], fill=255)
    level = round((WATER - 0.02) * side)
    water = gradient((side, side - level), *(shade(c, brightness) for c in ((92, 176, 232), (34, 106, 192))))
    image.paste(water, (0, level), underwater.crop((0, level, side, side)).point(lambda a: a * 0.88))
    crest = Pen()
    crest.stroke(wave, 0.02, (232, 246, 254))
    crest.ink(image)
    return ImageChops.subtract(mask, underwater)
