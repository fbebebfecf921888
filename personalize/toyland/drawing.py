"""Draws Toyland scenes: rasterised at 4x and averaged down."""

import math
import random

from PIL import Image, ImageChops

from personalize.toyland.pen import Pen, box, ellipse, gradient, shade
from personalize.toyland.subjects import DRAW, GROUND
from personalize.toyland.world import COLOURS, Colour, Scene

OVERSAMPLE = 4
SKY = {  # top and horizon colour of the backdrop, ground colour
    "beach": ((120, 195, 240), (215, 240, 250), (236, 214, 160)),
    "snow": ((165, 190, 215), (225, 235, 245), (240, 244, 250)),
    "forest": ((95, 150, 120), (150, 190, 140), (66, 100, 50)),
    "city": ((14, 16, 48), (44, 40, 92), (62, 62, 70)),
    "mountains": ((135, 185, 235), (205, 225, 245), (110, 150, 85)),
    "desert": ((250, 190, 110), (255, 225, 165), (222, 160, 90)),
    "room": ((238, 214, 186), (230, 204, 176), (150, 98, 66)),
    "meadow": ((130, 200, 255), (205, 235, 255), (96, 180, 76)),
}


def draw_hat(pen: Pen, x: float, y: float, colour: Colour):
    pen.fill(box(x - 0.065, y - 0.12, x + 0.065, y + 0.01), colour)
    pen.fill(box(x - 0.067, y - 0.035, x + 0.067, y - 0.005), shade(colour, 0.55))
    pen.fill(box(x - 0.11, y - 0.005, x + 0.11, y + 0.03), colour)


def backdrop(of: Scene, side: int) -> Image.Image:
    """(side, side) RGB: sky or wall, what stands far away, and the ground or, for a swimmer, the water."""
    r = random.Random(of.detail)
    top, horizon, ground = (shade(c, of.light) for c in SKY[of.place])
    image = gradient(side, top, horizon)
    pen = Pen(side)
    FAR[of.place](pen, r, of.light)
    image.paste(pen.layer, mask=pen.layer)
    level = round(0.62 * side)
    if of.action == "swimming":
        dark = 0.55 if of.place == "city" else 1.0
        floor = gradient(side, shade((90, 165, 220), dark), shade((40, 110, 190), dark))
    else:
        floor = gradient(side, shade(ground, 0.92), shade(ground, 1.06))
    image.paste(floor.crop((0, 0, side, side - level)), (0, level))
    return image


def far_beach(pen: Pen, r: random.Random, light: float):
    x = r.choice((0.14, 0.86))
    pen.fill(ellipse(x, 0.15, 0.075, 0.075), (255, 236, 120))
    pen.fill(box(0, 0.46, 1, 0.64), shade((55, 140, 205), light))


def far_snow(pen: Pen, r: random.Random, light: float):
    for x in (0.1, 0.9):
        shift = x + r.uniform(-0.05, 0.05)
        for k in range(3):
            half, foot = 0.08 + 0.02 * k, 0.4 + 0.11 * k
            snow = shade((225, 235, 242), 1 - 0.07 * k)
            pen.fill([(shift, 0.2 + 0.1 * k), (shift - half, foot), (shift + half, foot)], snow)


def far_forest(pen: Pen, r: random.Random, light: float):
    for x in (0.06, 0.24, 0.76, 0.94):
        x, tall = x + r.uniform(-0.03, 0.03), r.uniform(0.05, 0.2)
        pen.fill(box(x - 0.02, 0.5, x + 0.02, 0.64), (80, 55, 40))
        pen.fill([(x, tall), (x - 0.12, 0.56), (x + 0.12, 0.56)], shade((30, 90, 55), light))


def far_city(pen: Pen, r: random.Random, light: float):
    for k in range(5):
        x, top = 0.2 * k, r.uniform(0.08, 0.34)
        pen.fill(box(x + 0.005, top, x + 0.195, 0.63), (30, 30, 58))
        for row in range(4):
            for column in range(2):
                y = top + 0.05 + 0.1 * row
                if y < 0.58 and r.random() < 0.7:
                    pen.fill(box(x + 0.035 + 0.08 * column, y, x + 0.085 + 0.08 * column, y + 0.05), (250, 220, 110))


def far_mountains(pen: Pen, r: random.Random, light: float):
    for x, tall in ((0.16, r.uniform(0.2, 0.32)), (0.82, r.uniform(0.12, 0.26))):
        pen.fill([(x, tall), (x - 0.38, 0.63), (x + 0.38, 0.63)], shade((120, 128, 150), light))
        pen.fill([(x, tall), (x - 0.095, tall + 0.11), (x, tall + 0.09), (x + 0.095, tall + 0.11)], (250, 250, 255))


def far_desert(pen: Pen, r: random.Random, light: float):
    pen.fill(ellipse(0.3, 0.72, 0.55, 0.17), shade((235, 180, 105), light))
    x = r.choice((0.1, 0.9))
    green = (60, 130, 70)
    pen.stroke([(x, 0.34), (x, 0.63)], 0.055, green)
    pen.stroke([(x, 0.52), (x - 0.07, 0.5), (x - 0.07, 0.42)], 0.035, green)
    pen.stroke([(x, 0.48), (x + 0.07, 0.46), (x + 0.07, 0.39)], 0.035, green)


def far_room(pen: Pen, r: random.Random, light: float):
    x = r.choice((0.06, 0.68))
    pen.fill(box(x, 0.1, x + 0.26, 0.4), (250, 250, 250))
    for dx in (0.02, 0.14):
        pen.fill(box(x + dx, 0.12, x + dx + 0.1, 0.38), (150, 205, 245))
    pen.fill(box(0, 0.59, 1, 0.63), (245, 238, 228))


def far_meadow(pen: Pen, r: random.Random, light: float):
    x = r.uniform(0.15, 0.75)
    for dx, dy, radius in ((0, 0, 0.06), (0.07, -0.02, 0.075), (0.15, 0.01, 0.055)):
        pen.fill(ellipse(x + dx, 0.16 + dy, radius, 0.75 * radius), (255, 255, 255))
    pen.fill(ellipse(0.25, 0.68, 0.5, 0.14), shade((120, 195, 95), light))
    pen.fill(ellipse(0.85, 0.68, 0.45, 0.11), shade((110, 185, 88), light))


FAR = {"beach": far_beach, "snow": far_snow, "forest": far_forest, "city": far_city, "mountains": far_mountains,
       "desert": far_desert, "room": far_room, "meadow": far_meadow}  # fmt: skip


def draw(of: Scene, size: int = 64) -> tuple[Image.Image, Image.Image]:
    """The picture (size, size) RGB and the mask of its visible subject, hat included, (size, size) L."""
    side = OVERSAMPLE * size
    image = backdrop(of, side)
    jump = of.action == "jumping"
    shift = (of.x, of.y - (0.16 if jump else 0.0) + (0.06 if of.action == "swimming" else 0.0))
    if of.action != "swimming":
        shadow, width = Pen(side), 0.2 if jump else 0.27
        shadow.fill(ellipse(0.5 + of.x, GROUND + 0.015 + (0.12 if jump else of.y), width * of.scale, 0.035), (0, 0, 0))
        image.paste((0, 0, 0), mask=shadow.layer.getchannel("A").point(lambda a: a * 0.3))
    pen = Pen(side, scale=of.scale, angle=-0.3 if jump else 0.0, shift=shift)
    hx, hy = DRAW[of.subject.class_word](pen, of.subject)
    if of.hat:
        draw_hat(pen, hx, hy, COLOURS[of.hat])
    mask = pen.layer.getchannel("A")
    lit = ImageChops.multiply(pen.layer.convert("RGB"), gradient(side, (255, 255, 255), (205, 205, 212)))
    image.paste(lit, mask=mask)
    if of.action == "swimming":
        mask = water(image, mask, round(0.66 * side))
    return image.reduce(OVERSAMPLE), mask.reduce(OVERSAMPLE)


def water(image: Image.Image, mask: Image.Image, level: int) -> Image.Image:
    """Covers what is under the water line; returns the mask of what still shows."""
    side = image.width
    pen = Pen(side)
    wave = [(x / 40, level / side + 0.012 * math.sin(x * 1.6)) for x in range(41)]
    pen.fill([*wave, (1, 1), (0, 1)], (255, 255, 255))
    under = pen.layer.getchannel("A")
    image.paste(gradient(side, (95, 170, 225), (35, 100, 180)), mask=under.point(lambda a: a * 0.86))
    crest = Pen(side)
    crest.stroke(wave, 0.018, (225, 242, 252))
    image.paste(crest.layer, mask=crest.layer)
    return ImageChops.subtract(mask, under)
