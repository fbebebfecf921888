"""Toyland's subjects. Each draw_* paints one with its feet on GROUND, facing right, and returns the top of its head."""

from personalize.toyland.pen import INK, Pen, box, ellipse, shade
from personalize.toyland.world import Subject

GROUND = 0.74  # y of the feet


def eye(pen: Pen, x: float, y: float, radius: float = 0.026):
    pen.fill(ellipse(x, y, radius, radius), (255, 255, 255))
    pen.fill(ellipse(x + 0.3 * radius, y, 0.6 * radius, 0.6 * radius), INK)


def draw_dog(pen: Pen, who: Subject) -> tuple[float, float]:
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
