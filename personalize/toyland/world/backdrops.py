"""Toyland's places. Each paints its whole backdrop: what stands far away, the ground from HORIZON on, what is near."""

import random

from PIL import Image

from personalize.toyland.world.pen import Pen, gradient, shade
from personalize.toyland.world.scenes import Colour, Scene
from personalize.toyland.world.shapes import Shape, box, curve, ellipse, rounded

HORIZON = 0.6
SKY = {  # its colour at the top and at the horizon
    "beach": ((110, 195, 245), (215, 242, 252)),
    "snow": ((150, 180, 212), (218, 230, 242)),
    "forest": ((60, 120, 90), (150, 196, 130)),
    "city": ((26, 28, 88), (98, 78, 158)),
    "mountains": ((140, 180, 240), (216, 226, 250)),
    "desert": ((252, 176, 92), (255, 228, 160)),
    "room": ((244, 190, 170), (250, 208, 188)),
    "meadow": ((120, 200, 255), (210, 240, 255)),
    "moon": ((16, 12, 34), (38, 30, 66)),
    "kitchen": ((150, 214, 204), (176, 226, 216)),
    "castle": ((190, 160, 230), (252, 214, 222)),
    "cave": ((58, 44, 56), (84, 62, 66)),
}
WATER_BRIGHTNESS = {"city": 0.6, "moon": 0.55, "cave": 0.6}  # brightness of water there
STARS = ((0.08, 0.1), (0.24, 0.28), (0.36, 0.08), (0.55, 0.2), (0.7, 0.06), (0.92, 0.34), (0.12, 0.44), (0.8, 0.46))


def backdrop(scene: Scene, side: int) -> Image.Image:
    """(side, side) RGB."""
    image = gradient((side, side), *(shade(c, scene.light) for c in SKY[scene.place]))
    pen = Pen(light=scene.light)
    PLACE[scene.place](pen, random.Random(scene.detail))
    pen.ink(image)
    return image


def ground(pen: Pen, colour: Colour):
    pen.fill(box(-0.01, HORIZON, 1.01, 1.2), colour, soft=True)


def left_or_right(r: random.Random, left: float, right: float) -> float:
    return r.choice((left, right)) + r.uniform(-0.03, 0.03)


def cloud(pen: Pen, x: float, y: float, colour: Colour = (255, 255, 255), *, rim=False):
    for dx, dy, radius in ((-0.075, 0.012, 0.052), (0, -0.01, 0.07), (0.08, 0.01, 0.056)):
        pen.fill(ellipse(x + dx, y + dy, radius, 0.75 * radius), colour, rim=rim)


def pine(pen: Pen, x: float, top: float, *, foot: float, colour: Colour):
    wide = 0.34 * (foot - top)
    pen.fill(box(x - 0.02, foot - 0.03, x + 0.02, foot + 0.05), (96, 66, 48))
    for share, size in ((0.45, 0.62), (0.72, 0.82), (1.0, 1.0)):
        low, high = top + share * (foot - top), top + (share - 0.45) * (foot - top)
        pen.fill([(x, high), (x - size * wide, low), (x + size * wide, low)], shade(colour, 1.2 - 0.2 * share))


def beach(pen: Pen, r: random.Random):
    x = left_or_right(r, 0.13, 0.87)
    pen.fill(ellipse(1 - x, 0.16, 0.085, 0.085), (255, 232, 110))
    pen.fill(box(-0.01, 0.44, 1.01, 0.7), (45, 150, 215))
    ground(pen, (244, 220, 160))
    pen.stroke([(-0.05, HORIZON), (1.05, HORIZON)], 0.02, (235, 248, 252))
    lean = 0.05 if x < 0.5 else -0.05
    pen.stroke(curve([(x - lean, 0.68), (x - 0.3 * lean, 0.45), (x, 0.2)]), 0.04, (150, 105, 66))
    for dx, dy in ((-0.15, 0.1), (-0.13, -0.04), (0.0, -0.1), (0.13, -0.04), (0.15, 0.1)):
        pen.fill(
            rounded([(x, 0.17), (x + 0.5 * dx, 0.15 + 0.5 * dy - 0.05), (x + dx, 0.2 + dy), (x, 0.24)], 0.03), (50, 150, 80)
        )


def snow(pen: Pen, r: random.Random):
    pen.fill(ellipse(0.2, 0.66, 0.5, 0.2), (196, 214, 232))
    pen.fill(ellipse(0.9, 0.66, 0.45, 0.16), (206, 222, 238))
    for x in (0.12, 0.88):
        x += r.uniform(-0.04, 0.04)
        pine(pen, x, 0.22, foot=0.6, colour=(90, 140, 150))
        pen.fill([(x, 0.22), (x - 0.045, 0.34), (x, 0.31), (x + 0.045, 0.34)], (255, 255, 255))
    ground(pen, (236, 241, 248))
    for x, y in ((0.06, 0.12), (0.28, 0.2), (0.42, 0.07), (0.6, 0.16), (0.76, 0.07), (0.95, 0.2), (0.33, 0.42), (0.69, 0.4)):
        pen.fill(ellipse(x, y, 0.015, 0.015), (255, 255, 255))


def forest(pen: Pen, r: random.Random):
    for x in (0.3, 0.5, 0.7):
        pine(pen, x + r.uniform(-0.03, 0.03), 0.22, foot=0.58, colour=(70, 140, 84))
    for x in (0.03, 0.17, 0.83, 0.97):
        pine(pen, x + r.uniform(-0.02, 0.02), 0.02, foot=0.6, colour=(36, 100, 60))
    ground(pen, (92, 124, 58))


def city(pen: Pen, r: random.Random):
    pen.fill(ellipse(0.5, 0.13, 0.065, 0.065), (250, 244, 205))
    for k, top in enumerate((0.16, 0.3, 0.36, 0.24, 0.12)):
        x, top = 0.2 * k, top + r.uniform(-0.03, 0.03)
        pen.fill(box(x + 0.006, top, x + 0.194, 0.63), (40, 38, 74) if k % 2 else (52, 48, 92))
        for row in range(3):
            for column in (0.035, 0.115):
                if (row + k + (column > 0.1)) % 3:
                    y = top + 0.045 + 0.105 * row
                    pen.fill(box(x + column, y, x + column + 0.05, y + 0.055), (255, 216, 100))
    ground(pen, (84, 82, 104))
    for x in (0.0, 0.36, 0.72):
        pen.fill(box(x, 0.9, x + 0.2, 0.925), (222, 220, 200))


def mountains(pen: Pen, r: random.Random):
    shift = r.uniform(-0.05, 0.05)
    for x, tall, half in ((0.5, 0.3, 0.3), (0.14, 0.14, 0.36), (0.86, 0.08, 0.38)):
        x, low, colour = x + shift, tall + 0.3 * (0.64 - tall), (150, 158, 190) if x == 0.5 else (116, 126, 160)
        pen.fill([(x, tall), (x - half, 0.64), (x + half, 0.64)], colour)
        jags = [(-0.3, low), (-0.1, low - 0.04), (0.08, low), (0.3, low)]
        pen.fill([(x, tall), *((x + share * half, y) for share, y in jags)], (252, 252, 255))
    ground(pen, (128, 168, 96))


def desert(pen: Pen, r: random.Random):
    x = left_or_right(r, 0.12, 0.88)
    pen.fill(ellipse(1 - x, 0.2, 0.11, 0.11), (255, 246, 190))
    pen.fill(ellipse(0.25, 0.66, 0.5, 0.16), (238, 176, 100))
    pen.fill(ellipse(0.85, 0.68, 0.5, 0.14), (230, 164, 90))
    ground(pen, (226, 158, 86))
    green = (64, 150, 84)
    pen.stroke([(x, 0.28), (x, 0.66)], 0.065, green)
    pen.stroke(curve([(x, 0.52), (x - 0.085, 0.5), (x - 0.085, 0.4)]), 0.042, green)
    pen.stroke(curve([(x, 0.46), (x + 0.085, 0.44), (x + 0.085, 0.35)]), 0.042, green)


def room(pen: Pen, r: random.Random):
    x = left_or_right(r, 0.17, 0.83)
    pen.fill(box(x - 0.14, 0.08, x + 0.14, 0.42), (255, 252, 245))
    for dx in (-0.115, 0.01):
        pen.fill(box(x + dx, 0.105, x + dx + 0.105, 0.395), (150, 212, 250))
    pen.fill(box(0.9 - x, 0.14, 1.1 - x, 0.32), (176, 116, 70))
    pen.fill(box(0.92 - x, 0.16, 1.08 - x, 0.3), (255, 240, 205))
    ground(pen, (178, 112, 72))
    pen.fill(box(-0.01, HORIZON - 0.03, 1.01, HORIZON + 0.01), (255, 246, 236))
    pen.fill(ellipse(0.5, 0.86, 0.42, 0.09), (216, 92, 92))
    pen.fill(ellipse(0.5, 0.86, 0.34, 0.065), (240, 150, 130))


def meadow(pen: Pen, r: random.Random):
    x = left_or_right(r, 0.22, 0.78)
    cloud(pen, x, 0.17)
    pen.fill(ellipse(1 - x, 0.13, 0.075, 0.075), (255, 228, 100))
    pen.fill(ellipse(0.2, 0.66, 0.5, 0.15), (130, 205, 100))
    pen.fill(ellipse(0.85, 0.66, 0.45, 0.12), (116, 192, 92))
    ground(pen, (100, 186, 78))
    for k, (x, y) in enumerate(((0.07, 0.7), (0.18, 0.93), (0.36, 0.95), (0.62, 0.94), (0.9, 0.72), (0.86, 0.92))):
        pen.fill(ellipse(x, y, 0.024, 0.024), ((255, 250, 240), (255, 170, 190))[k % 2])
        pen.fill(ellipse(x, y, 0.01, 0.01), (255, 200, 60))


def moon(pen: Pen, r: random.Random):
    for x, y in STARS:
        pen.fill(ellipse(x, y, 0.011, 0.011), (255, 250, 220))
    x = left_or_right(r, 0.16, 0.84)
    pen.fill(ellipse(x, 0.19, 0.12, 0.12), (70, 140, 225))
    pen.fill(rounded([(x - 0.08, 0.12), (x + 0.02, 0.1), (x + 0.04, 0.17), (x - 0.03, 0.22)], 0.03), (96, 190, 110))
    pen.fill(rounded([(x, 0.22), (x + 0.08, 0.2), (x + 0.06, 0.27), (x + 0.01, 0.28)], 0.03), (96, 190, 110))
    pen.fill(ellipse(0.5, 0.74, 0.85, 0.17), (168, 166, 180))
    ground(pen, (168, 166, 180))
    for x, y, radius in ((0.12, 0.7, 0.085), (0.87, 0.67, 0.07), (0.3, 0.93, 0.1), (0.82, 0.9, 0.09)):
        pen.fill(ellipse(x, y, radius, 0.36 * radius), (134, 132, 150))


def kitchen(pen: Pen, r: random.Random):
    for y in (0.11, 0.22, 0.33):
        pen.fill(box(-0.01, y, 1.01, y + 0.008), (222, 246, 240))
    for k in range(1, 8):
        pen.fill(box(0.125 * k, 0, 0.125 * k + 0.008, 0.45), (222, 246, 240))
    x = left_or_right(r, 0.14, 0.86)
    pen.fill(box(-0.01, 0.42, 1.01, HORIZON), (250, 250, 250))
    pen.fill(box(-0.01, 0.41, 1.01, 0.445), (150, 104, 74))
    for k in range(4):
        pen.fill(box(0.03 + 0.25 * k, 0.47, 0.22 + 0.25 * k, 0.585), (226, 234, 236))
    pen.fill(box(x - 0.13, 0.08, x + 0.13, HORIZON + 0.02, r=0.03), (240, 96, 84))
    pen.fill(box(x - 0.13, 0.26, x + 0.13, 0.275), (190, 66, 60))
    pen.fill(box(x + 0.07, 0.15, x + 0.09, 0.23), (255, 240, 230))
    pen.fill(box(x + 0.07, 0.31, x + 0.09, 0.45), (255, 240, 230))
    ground(pen, (246, 238, 220))
    for row, (y0, y1) in enumerate(((HORIZON, 0.7), (0.7, 0.84), (0.84, 1.01))):
        for k in range(3):
            left = 0.4 * k + (0.2 if row % 2 else 0.0)
            pen.fill(_floor_tile(left, left + 0.2, y0, y1), (122, 180, 186))


def _floor_tile(x0: float, x1: float, y0: float, y1: float) -> Shape:
    """A tile of a floor that one looks along."""

    def at(x, y):
        return 0.5 + (x - 0.5) * (0.85 + 0.9 * (y - HORIZON)), y

    return [at(x0, y0), at(x1, y0), at(x1, y1), at(x0, y1)]


def castle(pen: Pen, r: random.Random):
    shift = r.uniform(-0.04, 0.04)
    stone, roof = (176, 170, 196), (84, 96, 190)
    pen.fill(box(0.2 + shift, 0.34, 0.8 + shift, 0.64), shade(stone, 0.92))
    for k in range(6):
        pen.fill(box(0.2 + 0.1067 * k + shift, 0.29, 0.265 + 0.1067 * k + shift, 0.36), shade(stone, 0.92))
    for x, top, half in ((0.14, 0.24, 0.1), (0.86, 0.24, 0.1), (0.5, 0.2, 0.11)):
        x += shift
        pen.fill(box(x - half, top, x + half, 0.64), stone)
        pen.fill([(x - 1.3 * half, top + 0.01), (x, top - 0.2), (x + 1.3 * half, top + 0.01)], roof)
        pen.fill(box(x - 0.025, top + 0.05, x + 0.025, top + 0.13, r=0.02), (80, 66, 110))
    ground(pen, (146, 190, 120))
    pen.fill([(0.42, HORIZON), (0.58, HORIZON), (0.85, 1.01), (0.15, 1.01)], (226, 204, 170))


def cave(pen: Pen, r: random.Random):
    shift = r.uniform(-0.04, 0.04)
    pen.fill(ellipse(0.5 + shift, 0.5, 0.36, 0.36), (255, 214, 140))
    pen.fill(ellipse(0.5 + shift, 0.5, 0.29, 0.3), (255, 240, 200))
    for x, low, half in (
        (0.06, 0.34, 0.09),
        (0.24, 0.2, 0.07),
        (0.4, 0.12, 0.05),
        (0.6, 0.14, 0.05),
        (0.78, 0.22, 0.07),
        (0.95, 0.36, 0.09),
    ):
        pen.fill(rounded([(x - half, -0.02), (x + half, -0.02), (x, low)], 0.02), (44, 33, 44))
    ground(pen, (122, 90, 78))
    for x, tall in ((0.07, 0.2), (0.15, 0.12), (0.93, 0.18), (0.86, 0.1)):
        pen.fill([(x, 0.66 - tall), (x - 0.045, 0.68), (x + 0.045, 0.68)], (120, 200, 220))


PLACE = {"beach": beach, "snow": snow, "forest": forest, "city": city, "mountains": mountains, "desert": desert, "room": room,
         "meadow": meadow, "moon": moon, "kitchen": kitchen, "castle": castle, "cave": cave}  # fmt: skip
