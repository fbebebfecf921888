"""Draws Toyland scenes: shapes in unit coordinates (x right, y down, 0 to 1), rasterised at 4× and averaged down."""

import math
import random

from PIL import Image, ImageChops, ImageDraw

from personalize.toyland.world import COLOURS, Colour, Scene, Subject

OVERSAMPLE = 4
GROUND = 0.74  # y of the feet
INK = (28, 28, 34)
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


class Pen:
    """Draws transformed polygons on an RGBA layer. The transform turns by `angle` and scales about (cx, cy), then shifts."""

    def __init__(self, side: int, *, scale: float = 1.0, angle: float = 0.0, shift=(0.0, 0.0), centre=(0.5, 0.6)):
        self.side, self.centre, self.shift = side, centre, shift
        self.cos, self.sin = scale * math.cos(angle), scale * math.sin(angle)
        self.layer = Image.new("RGBA", (side, side))
        self.draw = ImageDraw.Draw(self.layer)

    def points(self, shape):
        (cx, cy), (dx, dy) = self.centre, self.shift
        for x, y in shape:
            x, y = x - cx, y - cy
            yield (
                self.side * (cx + dx + self.cos * x - self.sin * y),
                self.side * (cy + dy + self.sin * x + self.cos * y),
            )

    def fill(self, shape, colour: Colour):
        self.draw.polygon(list(self.points(shape)), fill=(*colour, 255))

    def stroke(self, shape, width: float, colour: Colour):
        """A line with round ends; width in units of the picture."""
        path, half = list(self.points(shape)), max(1.0, width * self.side * math.hypot(self.cos, self.sin) / 2)
        self.draw.line(path, fill=(*colour, 255), width=round(2 * half), joint="curve")
        for x, y in (path[0], path[-1]):
            self.draw.ellipse((x - half, y - half, x + half, y + half), fill=(*colour, 255))

    def patterned(self, shape, who: Subject):
        """Fills a body part with the body colour and the subject's pattern, clipped to the part."""
        self.fill(shape, who.body)
        if who.pattern == "plain":
            return
        mask = Image.new("L", self.layer.size)
        ImageDraw.Draw(mask).polygon(list(self.points(shape)), fill=255)
        xs, ys = [p[0] for p in shape], [p[1] for p in shape]
        over = Pen(self.side, centre=self.centre, shift=self.shift)
        over.cos, over.sin = self.cos, self.sin
        for part in pattern(who.pattern, min(xs), min(ys), max(xs), max(ys)):
            over.fill(part, who.second)
        self.layer.paste(over.layer, mask=ImageChops.multiply(over.layer.getchannel("A"), mask))


def pattern(kind: str, x0: float, y0: float, x1: float, y1: float):
    """Shapes of a pattern that covers the box."""
    w, h = x1 - x0, y1 - y0
    if kind == "spots":
        places = ((0.2, 0.32), (0.5, 0.25), (0.8, 0.36), (0.35, 0.7), (0.66, 0.72))
        return [ellipse(x0 + u * w, y0 + v * h, 0.045, 0.045) for u, v in places]
    if kind == "stripes":
        return [box(x0 + u * w, y0, x0 + (u + 0.13) * w, y1) for u in (0.08, 0.34, 0.6, 0.86)]
    if kind == "saddle":
        return [ellipse(x0 + 0.5 * w, y0 + 0.1 * h, 0.33 * w, 0.45 * h)]
    if kind == "belt":
        return [box(x0 + 0.4 * w, y0, x0 + 0.65 * w, y1)]
    return [box(x0, y0 + 0.6 * h, x1, y1)]


def ellipse(cx, cy, rx, ry, start=0.0, end=1.0):
    """An ellipse, or the part of it between two fractions of a turn (clockwise from the right)."""
    n = 36
    turns = [2 * math.pi * (start + (end - start) * k / n) for k in range(n + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in turns]


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(max(0, min(255, round(c * factor))) for c in colour)


def eye(pen: Pen, x: float, y: float, radius: float = 0.026):
    pen.fill(ellipse(x, y, radius, radius), (255, 255, 255))
    pen.fill(ellipse(x + 0.3 * radius, y, 0.6 * radius, 0.6 * radius), INK)


def draw_dog(pen: Pen, who: Subject) -> tuple[float, float]:
    """Each draw_* paints its subject with feet on GROUND, facing right, and returns the top of its head."""
    rx, ry, leg = 0.20 * who.length, 0.115 * who.height, 0.12 * who.legs
    top = GROUND - leg - ry
    far, hx, hy, r = shade(who.body, 0.8), 0.48 + rx + 0.02, top - 0.13, 0.105 * who.head
    tail(pen, who, 0.48 - rx, top - 0.03)
    for x in (-0.55, 0.75):
        pen.stroke([(0.48 + x * rx, top), (0.48 + x * rx, GROUND - 0.02)], 0.06, far)
    pen.patterned(ellipse(0.48, top, rx, ry), who)
    for x in (-0.8, 0.5):
        pen.stroke([(0.48 + x * rx, top + 0.03), (0.48 + x * rx, GROUND - 0.02)], 0.065, who.body)
    pen.fill(ellipse(hx - 0.02, hy + 0.09, 0.075, 0.1), who.body)
    pen.fill(ellipse(hx, hy, r, 0.92 * r), who.body)
    pen.fill(ellipse(hx + 0.10, hy + 0.035, 0.07, 0.048), shade(who.body, 1.12))
    pen.fill(ellipse(hx + 0.155, hy + 0.015, 0.025, 0.022), INK)
    eye(pen, hx + 0.035, hy - 0.025)
    ears(pen, who, hx - 0.05, hy - 0.03, r)
    return hx, hy - 0.88 * r


def ears(pen: Pen, who: Subject, x: float, y: float, r: float):
    if who.ear == "floppy":
        pen.fill(ellipse(x - 0.02, y + 0.055, 0.038, 0.085), who.second)
    elif who.ear == "round":
        pen.fill(ellipse(x - 0.005, y - 0.06, 0.05, 0.05), who.second)
    else:
        pen.fill([(x - 0.045, y + 0.01), (x - 0.03, y - 0.02 - 1.15 * r), (x + 0.045, y - 0.05)], who.second)


def tail(pen: Pen, who: Subject, x: float, y: float):
    if who.tail == "up":
        pen.stroke([(x + 0.03, y), (x - 0.07, y - 0.15)], 0.042, who.body)
    elif who.tail == "curled":
        pen.stroke(ellipse(x - 0.03, y - 0.06, 0.055, 0.055, 0.2, 0.95), 0.038, who.body)
    else:
        pen.fill(ellipse(x, y - 0.01, 0.05, 0.04), who.body)


def draw_cat(pen: Pen, who: Subject) -> tuple[float, float]:
    rx, ry, leg = 0.17 * who.length, 0.10 * who.height, 0.11 * who.legs
    top = GROUND - leg - ry
    hx, hy, r = 0.48 + rx, top - 0.12, 0.115 * who.head
    back = 0.48 - rx
    if who.tail == "stub":
        pen.stroke([(back + 0.02, top), (back - 0.1, top - 0.06)], 0.045, who.body)
    elif who.tail == "up":
        pen.stroke([(back + 0.02, top), (back - 0.07, top - 0.08), (back - 0.04, top - 0.26)], 0.04, who.body)
    else:
        pen.stroke([(back + 0.02, top), (back - 0.1, top - 0.02), (back - 0.13, top - 0.16), (back - 0.05, top - 0.2)],
                   0.04, who.body)  # fmt: skip
    for x in (-0.5, 0.7):
        pen.stroke([(0.48 + x * rx, top), (0.48 + x * rx, GROUND - 0.02)], 0.045, shade(who.body, 0.8))
    pen.patterned(ellipse(0.48, top, rx, ry), who)
    for x in (-0.8, 0.45):
        pen.stroke([(0.48 + x * rx, top + 0.03), (0.48 + x * rx, GROUND - 0.02)], 0.05, who.body)
    spread = {"pointed": 0.085, "floppy": 0.1, "round": 0.065}[who.ear]
    for side in (-1, 1):
        x = hx + side * 0.65 * r
        pen.fill([(x - 0.045, hy - 0.4 * r), (x + side * spread * 0.5, hy - r - 0.07), (x + 0.045, hy - 0.4 * r)],
                 who.second)  # fmt: skip
    pen.fill(ellipse(hx, hy, r * 1.08, 0.9 * r), who.body)
    for side in (-1, 1):
        eye(pen, hx + side * 0.05, hy - 0.015, 0.028)
    pen.fill([(hx - 0.02, hy + 0.03), (hx + 0.02, hy + 0.03), (hx, hy + 0.055)], (230, 120, 140))
    return hx, hy - 0.85 * r


def draw_duck(pen: Pen, who: Subject) -> tuple[float, float]:
    rx, ry = 0.21 * who.length, 0.125 * who.height
    top = GROUND - 0.05 * who.legs - ry
    hx, hy, r = 0.47 + 0.75 * rx, top - 0.19, 0.095 * who.head
    beak = (245, 150, 40)
    for x in (0.45, 0.53):
        pen.stroke([(x, top + ry - 0.02), (x, GROUND - 0.01), (x + 0.05, GROUND - 0.01)], 0.025, beak)
    pen.stroke([(hx - 0.03, top - 0.02), (hx, hy)], 0.1, who.body)
    lift = {"up": 0.17, "curled": 0.12, "stub": 0.05}[who.tail]
    pen.fill([(0.47 - rx - 0.07, top - lift), (0.47 - 0.5 * rx, top - 0.7 * ry), (0.47 - 0.6 * rx, top + 0.6 * ry)], who.body)
    pen.patterned(ellipse(0.47, top, rx, ry), who)
    pen.fill(ellipse(0.45, top - 0.005, 0.55 * rx, 0.5 * ry, 0.0, 0.5), who.second)
    pen.fill(ellipse(hx, hy, r, r), who.body)
    if who.ear == "pointed":
        pen.fill([(hx - 0.07, hy - 0.06), (hx - 0.1, hy - 0.16), (hx + 0.01, hy - 0.08)], who.second)
    elif who.ear == "round":
        pen.fill(ellipse(hx - 0.03, hy + r, 0.085, 0.03), who.second)
    pen.fill([(hx + 0.07, hy - 0.02), (hx + 0.18, hy + 0.025), (hx + 0.07, hy + 0.05)], beak)
    eye(pen, hx + 0.03, hy - 0.025)
    return hx, hy - 0.9 * r


def draw_teapot(pen: Pen, who: Subject) -> tuple[float, float]:
    rx, ry = 0.185 * who.length, 0.165 * who.height
    cy = GROUND - ry
    pen.stroke(ellipse(0.48 - rx, cy - 0.01, 0.10, 0.10 * who.legs, 0.25, 0.75), 0.04, who.second)
    pen.fill([(0.48 + 0.6 * rx, cy + 0.09), (0.48 + rx + 0.14, cy - 0.14), (0.48 + rx + 0.19, cy - 0.11),
              (0.48 + 0.9 * rx, cy - 0.05)], who.body)  # fmt: skip
    pen.patterned(ellipse(0.48, cy, rx, ry), who)
    pen.fill(ellipse(0.48, cy - 0.9 * ry, 0.095 * who.head, 0.04), who.second)
    knob = {"floppy": 0.03, "round": 0.042, "pointed": 0.025}[who.ear]
    pen.fill(ellipse(0.48, cy - 0.9 * ry - 0.05, knob, 0.032), who.second)
    pen.fill(box(0.48 - 0.6 * rx, GROUND - 0.025, 0.48 + 0.6 * rx, GROUND), shade(who.body, 0.75))
    return 0.48, cy - 0.9 * ry - 0.07


def draw_car(pen: Pen, who: Subject) -> tuple[float, float]:
    half, tall, wheel = 0.29 * who.length, 0.12 * who.height, 0.07 * who.legs
    low = GROUND - 0.8 * wheel
    roof = low - tall - 0.13 * who.head
    slope = {"floppy": 0.09, "round": 0.05, "pointed": 0.13}[who.ear]
    cabin = [(0.5 - 0.6 * half - slope * 0.3, low - tall + 0.01), (0.5 - 0.55 * half, roof), (0.5 + 0.3 * half, roof),
             (0.5 + 0.3 * half + slope, low - tall + 0.01)]  # fmt: skip
    pen.fill(cabin, who.body)
    glass = [(0.5 + (x - 0.5) * 0.82, roof + 0.025 + (y - roof) * 0.75) for x, y in cabin]
    pen.fill(glass, (190, 225, 240))
    pen.fill(box(0.5 - 0.17 * half, roof, 0.5 - 0.05 * half, low - tall + 0.02), who.body)
    pen.patterned([(0.5 - half, low), (0.5 - half, low - 0.9 * tall), (0.5 - 0.8 * half, low - tall),
                   (0.5 + 0.75 * half, low - tall), (0.5 + half, low - 0.6 * tall), (0.5 + half, low)], who)  # fmt: skip
    pen.fill(ellipse(0.5 + 0.93 * half, low - 0.5 * tall, 0.028, 0.028), (255, 240, 150))
    for x in (-0.58, 0.58):
        pen.fill(ellipse(0.5 + x * half, low, wheel, wheel), INK)
        pen.fill(ellipse(0.5 + x * half, low, 0.5 * wheel, 0.5 * wheel), who.second)
    return 0.5 - 0.12 * half, roof


def draw_robot(pen: Pen, who: Subject) -> tuple[float, float]:
    half, tall, leg = 0.135 * who.length, 0.23 * who.height, 0.12 * who.legs
    low = GROUND - leg
    top = low - tall
    head = 0.10 * who.head
    for x in (-0.5, 0.5):
        pen.fill(box(0.5 + x * half - 0.035, low - 0.01, 0.5 + x * half + 0.035, GROUND), shade(who.body, 0.75))
    bend = {"up": -0.14, "curled": 0.02, "stub": 0.13}[who.tail]
    for side in (-1, 1):
        pen.stroke([(0.5 + side * half, top + 0.05), (0.5 + side * (half + 0.1), top + 0.05 + bend)], 0.05, who.second)
    pen.patterned(box(0.5 - half, top, 0.5 + half, low), who)
    middle = top - head - 0.01
    pen.stroke([(0.5, middle), (0.5, middle - head - 0.05)], 0.018, shade(who.body, 0.7))
    pen.fill(ellipse(0.5, middle - head - 0.06, 0.026, 0.026), who.second)
    if who.ear == "round":
        pen.fill(ellipse(0.5, middle, 1.15 * head, head), who.body)
    else:
        pen.fill(box(0.5 - 1.1 * head, middle - head, 0.5 + 1.1 * head, middle + head), who.body)
    for side in (-1, 1):
        eye(pen, 0.5 + side * 0.045, middle - 0.015, 0.032)
    mouth = (0.05, 0.012) if who.ear == "pointed" else (0.035, 0.02)
    pen.fill(ellipse(0.5, middle + 0.055, *mouth), INK)
    return 0.5, middle - 0.9 * head


DRAW = {
    "dog": draw_dog,
    "cat": draw_cat,
    "duck": draw_duck,
    "teapot": draw_teapot,
    "car": draw_car,
    "robot": draw_robot,
}


def draw_hat(pen: Pen, x: float, y: float, colour: Colour):
    pen.fill(box(x - 0.065, y - 0.12, x + 0.065, y + 0.01), colour)
    pen.fill(box(x - 0.067, y - 0.035, x + 0.067, y - 0.005), shade(colour, 0.55))
    pen.fill(box(x - 0.11, y - 0.005, x + 0.11, y + 0.03), colour)


def gradient(side: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.new("RGB", (1, 2))
    ramp.putpixel((0, 0), top)
    ramp.putpixel((0, 1), bottom)
    return ramp.resize((side, side), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))


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
            pen.fill([(shift, 0.2 + 0.1 * k), (shift - 0.08 - 0.02 * k, 0.4 + 0.11 * k), (shift + 0.08 + 0.02 * k, 0.4 + 0.11 * k)],
                     shade((225, 235, 242), 1 - 0.07 * k))  # fmt: skip


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
