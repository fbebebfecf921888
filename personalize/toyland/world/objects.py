"""Toyland's things, which have faces too. Each draw_* paints one that stands on GROUND, facing right; returns its anchors."""

from personalize.toyland.world.faces import GROUND, WHITE, Anchors, eyes, line_colour, smile
from personalize.toyland.world.pen import INK, Pen, blend, shade
from personalize.toyland.world.scenes import Subject
from personalize.toyland.world.shapes import box, curve, ellipse, rounded

GLASS = (196, 230, 244)
GREY = (150, 152, 162)


def draw_teapot(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, foot = 0.175 * subject.length, 0.15 * subject.height, 0.035 * subject.legs
    cx, cy, lid = 0.48, GROUND - foot - 0.95 * ry, 0.115 * subject.head
    top = cy - 0.9 * ry
    if subject.tail == "up":
        pen.stroke(ellipse(cx, top + 0.03, 0.85 * rx, 0.17, start=0.5, end=1.0), 0.035, subject.detail)
    elif subject.tail == "curled":
        pen.stroke(ellipse(cx - rx, cy, 0.1, 0.095, start=0.22, end=0.78), 0.04, subject.detail)
    else:
        pen.stroke([(cx - 0.8 * rx, cy - 0.02), (cx - rx - 0.1, cy - 0.09)], 0.05, subject.detail)
    pen.fill(rounded([(cx + 0.6 * rx, cy + 0.1), (cx + rx + 0.1, cy - 0.14), (cx + rx + 0.17, cy - 0.13),
                   (cx + 0.9 * rx, cy - 0.06)], 0.025), subject.body)  # fmt: skip
    pen.fill(box(cx - 0.6 * rx, GROUND - foot - 0.03, cx + 0.6 * rx, GROUND, r=0.012), subject.detail)
    knob = {"floppy": (0.075, 0.024), "round": (0.045, 0.045), "pointed": (0.022, 0.075)}[subject.ear]
    pen.fill(ellipse(cx, top - 0.045 - 0.8 * knob[1], *knob), subject.detail)
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject)
    pen.fill(ellipse(cx, top - 0.012, lid, 0.48 * lid), subject.second, soft=True, edge=True)
    pen.stroke(ellipse(cx, cy, 0.72 * rx, 0.7 * ry, start=0.54, end=0.64), 0.018, blend(subject.body, WHITE, 0.55), rim=False)
    eyes(pen, cx + 0.03, cy - 0.02, 0.058, background=subject.body, radius=0.034)
    smile(pen, cx + 0.035, cy + 0.035, subject.body)
    peak = top - 0.05 - 0.5 * knob[1]
    return Anchors((cx, peak), (cx + 0.03, cy - 0.02), 0.058, (cx, cy + 0.62 * ry), 0.85 * rx, (cx - 0.75 * rx, cy - 0.6 * ry))


def draw_car(pen: Pen, subject: Subject) -> Anchors:
    half, tall, wheel = 0.27 * subject.length, 0.115 * subject.height, 0.068 * subject.legs
    low = GROUND - 0.75 * wheel
    waist, roof = low - tall, low - tall - 0.15 * subject.head
    if subject.tail == "up":
        pen.fill(rounded([(0.5 - half, waist + 0.03), (0.5 - 1.16 * half, waist - 0.11), (0.5 - 0.7 * half, waist - 0.05),
                       (0.5 - 0.7 * half, waist + 0.03)], 0.012), subject.detail)  # fmt: skip
    elif subject.tail == "curled":
        pen.fill(ellipse(0.5 - half - 0.02, waist + 0.3 * tall, 0.05, 0.07), subject.detail)
    lean = {"floppy": (0.02, 0.02), "round": (0.09, 0.1), "pointed": (0.16, 0.02)}[subject.ear]
    cabin = [(0.5 - 0.78 * half, waist + 0.03), (0.5 - 0.74 * half + lean[1], roof), (0.5 + 0.55 * half - lean[0], roof),
             (0.5 + 0.6 * half, waist + 0.03)]  # fmt: skip
    round_by = 0.09 if subject.ear == "round" else 0.03
    pen.fill(rounded(cabin, round_by), subject.body)
    mid = 0.5 - 0.09 * half
    pen.fill(rounded([(mid + 0.84 * (x - mid), roof + 0.03 + 0.78 * (y - roof)) for x, y in cabin], round_by), GLASS, rim=False)
    hull = [
        (0.5 - half, low),
        (0.5 - half, waist),
        (0.5 + 0.7 * half, waist),
        (0.5 + half, waist + 0.35 * tall),
        (0.5 + half, low),
    ]
    pen.fill_pattern(rounded(hull, 0.035), subject)
    pen.fill(box(0.5 - 1.03 * half, low - 0.016, 0.5 + 1.03 * half, low + 0.02, r=0.015), subject.detail, edge=True)
    pen.fill(ellipse(0.5 + 0.9 * half, waist + 0.5 * tall, 0.026, 0.028), (255, 240, 150))
    for x in (-0.58, 0.58):
        pen.fill(ellipse(0.5 + x * half, GROUND - wheel, wheel, wheel), INK)
        pen.fill(ellipse(0.5 + x * half, GROUND - wheel, 0.55 * wheel, 0.55 * wheel), subject.second, rim=False)
    ex, ey = 0.5 + 0.05 * half, 0.45 * roof + 0.55 * waist
    eyes(pen, ex, ey, 0.055, background=GLASS, radius=0.036)
    smile(pen, 0.5 + 0.1 * half, waist + 0.25 * tall, subject.body, width=0.035)
    return Anchors(
        (0.5 - 0.12 * half, roof + 0.01),
        (ex, ey),
        0.055,
        (0.5 - 0.08 * half, waist + 0.015),
        0.62 * half,
        (0.5 - 0.72 * half, waist),
    )


def draw_boat(pen: Pen, subject: Subject) -> Anchors:
    half, tall, keel = 0.26 * subject.length, 0.2 * subject.height, 0.035 * subject.legs
    x, low = 0.46, GROUND - keel
    deck, mast = low - tall, low - tall - 0.27 * subject.head
    keel_shape = [
        (x - 0.4 * half, low - 0.03),
        (x + 0.4 * half, low - 0.03),
        (x + 0.25 * half, GROUND),
        (x - 0.25 * half, GROUND),
    ]
    pen.fill(rounded(keel_shape, 0.01), shade(subject.detail, 0.8))
    pen.stroke([(x, deck + 0.03), (x, mast)], 0.022, (120, 82, 52))
    _sails(pen, subject, (x, mast), (0.72 * half, deck - 0.03))
    stern = -0.09 if subject.tail == "up" else 0.0
    back, front = (0.5 - half, deck + stern), (0.5 + 1.12 * half, deck - 0.02)
    step = (0.5 - 0.6 * half, deck + 0.25 * stern)
    pen.fill_pattern(rounded([back, step, front, (0.5 + 0.68 * half, low), (0.5 - 0.78 * half, low)], 0.03), subject)
    rail = [(back[0] + 0.06 * half, back[1] + 0.012), (step[0], step[1] + 0.012), (front[0] - 0.08 * half, deck)]
    pen.stroke(rail, 0.028, subject.detail, rim=False)
    if subject.tail == "curled":
        pen.stroke(ellipse(0.5 - 0.62 * half, deck + 0.45 * tall, 0.042, 0.042), 0.026, WHITE)
    ex, ey = 0.5 + 0.32 * half, deck + 0.42 * tall
    eyes(pen, ex, ey, 0.05, background=subject.body, radius=0.033)
    smile(pen, ex + 0.005, ey + 0.045, subject.body, width=0.028)
    return Anchors((x, mast), (ex, ey), 0.05, (0.5 + 0.05 * half, low - 0.02), 0.75 * half, (0.5 - 0.82 * half, deck))


def _sails(pen: Pen, subject: Subject, top: tuple[float, float], foot: tuple[float, float]):
    """On a mast whose top is at `top`; foot: half the width of the sail and its lower edge."""
    (x, y), (wide, low) = top, foot
    if subject.ear == "floppy":
        pen.fill(box(x - 0.75 * wide, y + 0.02, x + wide * 0.85, low - 0.005, r=0.02), subject.second, soft=True)
    elif subject.ear == "round":
        sail = [(x + 0.012, y + 0.015), (x + 1.5 * wide, y + 0.6 * (low - y)), (x + wide, low), (x + 0.012, low)]
        pen.fill(rounded(sail, 0.1), subject.second, soft=True)
    else:
        pen.fill(rounded([(x + 0.015, y + 0.01), (x + 1.15 * wide, low), (x + 0.015, low)], 0.012), subject.second, soft=True)
        pen.fill(rounded([(x - 0.015, y + 0.06), (x - 0.015, low), (x - 0.8 * wide, low)], 0.012), subject.detail, soft=True)


def draw_robot(pen: Pen, subject: Subject) -> Anchors:
    half, tall, leg = 0.12 * subject.length, 0.19 * subject.height, 0.085 * subject.legs
    low = GROUND - leg
    top, head = low - tall, 0.105 * subject.head
    middle = top - 0.85 * head
    for side in (-0.55, 0.55):
        pen.fill(box(0.5 + side * half - 0.032, low - 0.02, 0.5 + side * half + 0.032, GROUND, r=0.01), GREY)
        pen.fill(box(0.5 + side * half - 0.045, GROUND - 0.03, 0.5 + side * half + 0.055, GROUND, r=0.012), subject.detail)
    arm = {"up": [(0.08, 0.0), (0.12, -0.15)], "curled": [(0.09, 0.07), (0.0, 0.11)], "stub": [(0.04, 0.04), (0.06, 0.15)]}[
        subject.tail
    ]
    for side in (-1, 1):
        path = [(0.5 + side * half * 0.9, top + 0.04), *((0.5 + side * (half + dx), top + 0.04 + dy) for dx, dy in arm)]
        pen.stroke(curve(path), 0.048, subject.detail)
    _antennas(pen, subject, middle, head)
    pen.fill_pattern(box(0.5 - half, top, 0.5 + half, low, r=0.03), subject)
    shape = (
        ellipse(0.5, middle, 1.2 * head, head)
        if subject.ear == "round"
        else box(0.5 - 1.15 * head, middle - head, 0.5 + 1.15 * head, middle + head, r=0.03)
    )
    pen.fill(shape, subject.body, soft=True, edge=True)
    pen.fill(
        box(0.5 - 0.85 * head + 0.012, middle - 0.6 * head, 0.5 + 0.85 * head + 0.012, middle + 0.5 * head, r=0.03),
        blend(subject.second, WHITE, 0.25),
        rim=False,
    )
    eyes(pen, 0.515, middle - 0.1 * head, 0.045, background=blend(subject.second, WHITE, 0.25), radius=0.034)
    smile(pen, 0.515, middle + 0.2 * head, blend(subject.second, WHITE, 0.25), width=0.022)
    return Anchors(
        (0.5, middle - 0.95 * head),
        (0.515, middle - 0.1 * head),
        0.045,
        (0.5, top + 0.005),
        0.8 * half,
        (0.5 - half, top + 0.08),
    )


def _antennas(pen: Pen, subject: Subject, middle: float, head: float):
    if subject.ear == "pointed":
        pen.stroke([(0.5, middle), (0.5, middle - head - 0.07)], 0.022, GREY)
        pen.fill(ellipse(0.5, middle - head - 0.08, 0.034, 0.034), subject.second)
        return
    for side in (-1, 1):
        if subject.ear == "round":
            pen.fill(ellipse(0.5 + side * 1.2 * head, middle, 0.035, 0.055), subject.second)
        else:
            tip = (0.5 + side * (0.7 * head + 0.055), middle - head - 0.06)
            pen.stroke([(0.5 + side * 0.5 * head, middle), tip], 0.022, GREY)
            pen.fill(ellipse(*tip, 0.028, 0.028), subject.second)


def draw_backpack(pen: Pen, subject: Subject) -> Anchors:
    half, tall = 0.155 * subject.length, 0.38 * subject.height
    top, flap, pocket = GROUND - tall, 0.27 * subject.head, 0.26 * subject.legs
    loop = {"pointed": (0.05, 0.075), "round": (0.075, 0.055), "floppy": (0.03, 0.035)}[subject.ear]
    pen.stroke(ellipse(0.5, top + 0.01, *loop, start=0.5, end=1.0), 0.03, subject.detail)
    if subject.tail == "up":
        pen.stroke(
            curve([(0.5 - 0.8 * half, top + 0.06), (0.5 - half - 0.085, top + 0.17), (0.5 - 0.85 * half, GROUND - 0.04)]),
            0.04,
            subject.detail,
        )
    elif subject.tail == "curled":
        pen.fill(box(0.5 - half - 0.06, GROUND - 0.2, 0.5 - half + 0.03, GROUND - 0.03, r=0.02), GLASS)
        pen.fill(box(0.5 - half - 0.045, GROUND - 0.235, 0.5 - half + 0.01, GROUND - 0.19, r=0.01), subject.detail)
    else:
        pen.fill(ellipse(0.5 - half, GROUND - 0.09, 0.055, 0.075), subject.detail, soft=True)
    pen.fill_pattern(box(0.5 - half, top, 0.5 + half, GROUND, r=0.1), subject)
    edge = top + flap * tall
    pen.fill(rounded([(0.5 - half, top + 0.06), (0.5 - 0.6 * half, top), (0.5 + 0.6 * half, top), (0.5 + half, top + 0.06),
                   (0.5 + half, edge), (0.5 - half, edge)], 0.06), subject.second, soft=True, edge=True)  # fmt: skip
    pen.fill(
        box(0.5 - 0.68 * half, GROUND - pocket * tall, 0.5 + 0.68 * half, GROUND - 0.02, r=0.03), subject.detail, edge=True
    )
    ex, ey = 0.515, edge + 0.045
    eyes(pen, ex, ey, 0.055, background=subject.body, radius=0.034)
    smile(pen, ex, ey + 0.045, subject.body)
    return Anchors((0.5, top + 0.005), (ex, ey), 0.055, (0.5, ey + 0.1), half, (0.5 - 0.9 * half, top + 0.08))


def draw_clock(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, leg = 0.175 * subject.length, 0.175 * subject.height, 0.05 * subject.legs
    cy = GROUND - leg - ry
    for side in (-1, 1):
        pen.stroke([(0.5 + side * 0.5 * rx, cy + 0.7 * ry), (0.5 + side * 0.8 * rx, GROUND - 0.02)], 0.045, subject.detail)
        bell = 0.075 * subject.head
        x, y = 0.5 + side * 0.66 * rx, cy - 0.92 * ry
        if subject.ear == "round":
            pen.fill(ellipse(x, y, bell, 0.85 * bell), subject.detail, soft=True)
        elif subject.ear == "pointed":
            pen.fill(
                rounded([(x - bell, y + 0.7 * bell), (x + side * 0.04, y - 1.3 * bell), (x + bell, y + 0.7 * bell)], 0.015),
                subject.detail,
            )
        else:
            pen.fill(ellipse(x + side * 0.03, y + 0.03, bell, 0.6 * bell), subject.detail, soft=True)
    pen.fill(ellipse(0.5, cy, rx, ry), subject.second, soft=True)
    pen.fill_pattern(ellipse(0.5, cy, 0.83 * rx, 0.83 * ry), subject)
    x, y, ink = 0.5, cy - 0.26 * ry, line_colour(subject.body)
    short, long = {
        "up": ((0.22, -0.3), (0.0, -0.46)),
        "curled": ((-0.36, 0.0), (0.0, -0.46)),
        "stub": ((0.2, 0.16), (0.52, 0.0)),
    }[subject.tail]
    pen.stroke([(x, y), (x + short[0] * rx, y + short[1] * ry)], 0.036, ink, rim=False)
    pen.stroke([(x, y), (x + long[0] * rx, y + long[1] * ry)], 0.026, ink, rim=False)
    eyes(pen, 0.515, cy + 0.24 * ry, 0.06, background=subject.body, radius=0.036)
    smile(pen, 0.515, cy + 0.48 * ry, subject.body)
    return Anchors(
        (0.5, cy - 0.97 * ry), (0.515, cy + 0.24 * ry), 0.06, (0.5, cy + 0.78 * ry), 0.75 * rx, (0.5 - 0.8 * rx, cy - 0.3 * ry)
    )
