"""Toyland's animals. Each draw_* paints one with its feet on GROUND, facing right, and returns its anchors."""

from personalize.toyland.world.faces import (
    BEAK,
    CREAM,
    GROUND,
    NOSE,
    WHITE,
    Anchors,
    ear_pair,
    eyes,
    far_side_colour,
    feet,
    line_colour,
    smile,
)
from personalize.toyland.world.pen import INK, Pen, blend, shade
from personalize.toyland.world.scenes import Subject
from personalize.toyland.world.shapes import box, curve, ellipse, rotate, rounded


def tail(pen: Pen, subject: Subject, x: float, y: float, *, width: float = 0.045):
    if subject.tail == "up":
        pen.stroke(curve([(x + 0.04, y + 0.03), (x - 0.04, y - 0.03), (x - 0.05, y - 0.17)]), width, subject.detail)
    elif subject.tail == "curled":
        pen.stroke(curve([(x + 0.05, y + 0.03), (x - 0.06, y + 0.04), (x - 0.12, y - 0.03), (x - 0.085, y - 0.1),
                          (x - 0.03, y - 0.06)]), width, subject.detail)  # fmt: skip
    else:
        pen.fill(ellipse(x - 0.01, y - 0.01, 0.055, 0.05), subject.detail, soft=True)


def draw_dog(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, leg = 0.18 * subject.length, 0.105 * subject.height, 0.095 * subject.legs
    cx, cy, r = 0.46, GROUND - leg - 0.85 * ry, 0.125 * subject.head
    hx, hy = cx + 0.9 * rx, cy - ry - 0.45 * r
    tail(pen, subject, cx - rx, cy - 0.03)
    feet(
        pen,
        (cx - 0.45 * rx, cx + 0.8 * rx),
        cy,
        0.058,
        colours=(far_side_colour(subject.body), far_side_colour(subject.detail)),
    )
    feet(pen, (cx - 0.78 * rx, cx + 0.42 * rx), cy, 0.062, colours=(subject.body, subject.detail))
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject)
    if subject.ear != "floppy":
        ear_pair(pen, subject, hx, hy, r=r)
    pen.fill(ellipse(hx - 0.02, hy + 0.8 * r, 0.6 * r, 0.5 * r), shade(subject.body, 0.9), rim=False)
    pen.fill(ellipse(hx, hy, r * 1.05, r), subject.body, soft=True, edge=True)
    if subject.ear == "floppy":
        ear_pair(pen, subject, hx, hy, r=r)
    pen.fill(ellipse(hx + 0.035, hy + 0.5 * r, 0.6 * r, 0.42 * r), blend(subject.body, CREAM, 0.55))
    pen.fill(ellipse(hx + 0.05, hy + 0.26 * r, 0.03, 0.023), INK, rim=False)
    smile(pen, hx + 0.045, hy + 0.5 * r, CREAM, width=0.026)
    eyes(pen, hx + 0.02, hy - 0.2 * r, 0.05, background=subject.body)
    return Anchors(
        (hx, hy - 0.9 * r), (hx + 0.02, hy - 0.2 * r), 0.05, (hx - 0.01, hy + 0.98 * r), 0.75 * r, (cx - 0.1, cy - ry)
    )


def draw_cat(pen: Pen, subject: Subject) -> Anchors:
    """It sits, so that it is no dog."""
    rx, ry, r = 0.125 * subject.length, 0.155 * subject.height, 0.125 * subject.head
    cx, cy = 0.48, GROUND - 0.9 * ry
    hx, hy = cx + 0.035, cy - ry - 0.4 * r
    x = cx - 0.75 * rx
    paths = {
        "up": [(x, GROUND - 0.05), (x - 0.1, GROUND - 0.07), (x - 0.11, GROUND - 0.2), (x - 0.09, GROUND - 0.33)],
        "curled": [(x, GROUND - 0.03), (x - 0.13, GROUND - 0.03), (x - 0.17, GROUND - 0.13), (x - 0.1, GROUND - 0.19),
                   (x - 0.07, GROUND - 0.13)],
        "stub": [(x, GROUND - 0.04), (x - 0.07, GROUND - 0.06)],
    }  # fmt: skip
    pen.stroke(curve(paths[subject.tail]), 0.048, subject.body)
    pen.stroke(curve(paths[subject.tail])[-5:], 0.048, subject.detail, rim=False)
    body = rounded([(cx - 0.55 * rx, cy - ry), (cx + 0.75 * rx, cy - ry), (cx + rx, GROUND), (cx - 1.25 * rx, GROUND)], 0.11)
    pen.fill_pattern(body, subject)
    for x in (cx + 0.08 * rx, cx + 0.7 * rx):
        pen.stroke([(x, GROUND - 0.115 * subject.legs), (x + 0.012, GROUND - 0.03)], 0.056, subject.detail)
    for side in (-1, 1):
        ex = hx + side * 0.72 * r
        tip = {"pointed": (side * 0.035, -1.6), "floppy": (side * 0.11, -0.95), "round": (side * 0.02, -1.2)}[subject.ear]
        pen.fill(rounded([(ex - 0.065, hy - 0.35 * r), (ex + tip[0], hy + tip[1] * r), (ex + 0.065, hy - 0.35 * r)],
                      0.06 if subject.ear == "round" else 0.015), subject.second)  # fmt: skip
    pen.fill(ellipse(hx, hy, r * 1.15, 0.95 * r), subject.body, soft=True, edge=True)
    whisker = line_colour(subject.body)
    for side in (-1, 1):
        for dy in (0.2, 0.45):
            pen.stroke([(hx + 0.015 + side * 0.07, hy + 0.36 * r), (hx + 0.015 + side * 0.145, hy + dy * r)], 0.008, whisker,
                       rim=False)  # fmt: skip
    pen.fill(ellipse(hx + 0.015, hy + 0.25 * r, 0.02, 0.015), NOSE, rim=False)
    smile(pen, hx + 0.015, hy + 0.4 * r, subject.body, width=0.026)
    eyes(pen, hx + 0.015, hy - 0.12 * r, 0.055, background=subject.body)
    return Anchors(
        (hx, hy - 0.82 * r), (hx + 0.015, hy - 0.12 * r), 0.055, (hx, hy + 0.95 * r), 0.75 * r, (cx - rx, cy - 0.3 * ry)
    )


def draw_rabbit(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, r = 0.165 * subject.length, 0.13 * subject.height, 0.115 * subject.head
    cx, cy = 0.46, GROUND - 0.045 * subject.legs - 0.8 * ry
    hx, hy = cx + 0.75 * rx, cy - ry - 0.35 * r
    size = {"up": 0.05, "curled": 0.068, "stub": 0.034}[subject.tail]
    pen.fill(ellipse(cx - rx - 0.015, cy + (-0.05 if subject.tail == "up" else 0.03), size, size), subject.detail, soft=True)
    _long_ears(pen, subject, hx, hy, r=r)
    feet(pen, (cx + 0.55 * rx, cx + 0.9 * rx), cy, 0.055, colours=(subject.body, subject.detail))
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject)
    pen.fill(ellipse(cx - 0.4 * rx, GROUND - 0.027, 0.085 * (0.5 + 0.5 * subject.legs), 0.032), subject.detail)
    pen.fill(ellipse(hx, hy, r * 1.1, r), subject.body, soft=True, edge=True)
    if subject.ear == "floppy":
        _long_ears(pen, subject, hx, hy, r=r)
    for x in (hx + 0.007, hx + 0.027):
        pen.fill(box(x, hy + 0.5 * r, x + 0.02, hy + 0.84 * r), WHITE, rim=False)
    pen.fill(ellipse(hx + 0.027, hy + 0.32 * r, 0.024, 0.018), NOSE, rim=False)
    smile(pen, hx + 0.027, hy + 0.42 * r, subject.body, width=0.03)
    eyes(pen, hx + 0.02, hy - 0.18 * r, 0.047, background=subject.body)
    return Anchors(
        (hx, hy - 0.88 * r), (hx + 0.02, hy - 0.18 * r), 0.047, (hx - 0.01, hy + 0.98 * r), 0.75 * r, (cx - 0.08, cy - ry)
    )


def _long_ears(pen: Pen, subject: Subject, x: float, y: float, *, r: float):
    for side in (-1, 1):
        if subject.ear == "floppy":
            pen.fill(
                rotate(ellipse(x + side * 1.15 * r, y + 0.35 * r, 0.04, 0.115), x + side * r, y, -side * 0.25), subject.second
            )
            continue
        wide, long = (0.046, 0.085) if subject.ear == "round" else (0.034, 0.13)
        ear = ellipse(x + side * 0.5 * r, y - 0.8 * r - 0.8 * long, wide, long)
        pen.fill(rotate(ear, x + side * 0.5 * r, y - 0.8 * r, side * 0.2), subject.second)


def draw_horse(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, leg = 0.17 * subject.length, 0.095 * subject.height, 0.125 * subject.legs
    cx, cy = 0.44, GROUND - leg - 0.85 * ry
    r = 0.085 * subject.head
    hx, hy = cx + rx + 0.05, cy - ry - 0.16
    tail_path = {"up": [(0, -0.02), (-0.08, -0.1), (-0.11, 0.0)], "curled": [(0, 0), (-0.09, 0.0), (-0.08, 0.12), (-0.12, 0.2)],
            "stub": [(0, 0), (-0.05, 0.03), (-0.05, 0.1)]}[subject.tail]  # fmt: skip
    pen.stroke(curve([(cx - 0.93 * rx + dx, cy - 0.02 + dy) for dx, dy in tail_path]), 0.055, subject.second)
    feet(
        pen,
        (cx - 0.5 * rx, cx + 0.85 * rx),
        cy,
        0.046,
        colours=(far_side_colour(subject.body), far_side_colour(subject.detail)),
    )
    feet(pen, (cx - 0.82 * rx, cx + 0.5 * rx), cy, 0.05, colours=(subject.body, subject.detail))
    neck = [(cx + 0.35 * rx, cy - 0.3 * ry), (hx - 0.075, hy - 0.02), (hx + 0.02, hy), (cx + 1.0 * rx, cy + 0.2 * ry)]
    pen.fill(rounded(neck, 0.04), subject.body)
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject)
    mane = {"floppy": 0.06, "round": 0.045, "pointed": 0.035}[subject.ear]
    pen.stroke([(hx - 0.055, hy - 0.02), (cx + 0.4 * rx, cy - 0.75 * ry)], 2 * mane * 0.8, subject.second)
    for side in (0.0, 0.06):
        ear = rounded(
            [(hx - 0.05 + side, hy - 0.5 * r), (hx - 0.045 + side, hy - 1.0 * r - mane * 1.3), (hx + 0.0 + side, hy - 0.5 * r)],
            0.012,
        )
        pen.fill(ear, subject.body)
    pen.fill(
        rotate(ellipse(hx + 0.05, hy + 0.055, 0.085 * subject.head + 0.05, r), hx + 0.02, hy, 0.7),
        subject.body,
        soft=True,
        edge=True,
    )
    pen.fill(ellipse(hx + 0.115, hy + 0.135, 0.062, 0.052), blend(subject.body, CREAM, 0.55))
    pen.fill(ellipse(hx + 0.135, hy + 0.12, 0.011, 0.011), INK, rim=False)
    smile(pen, hx + 0.12, hy + 0.145, CREAM, width=0.028)
    eyes(pen, hx + 0.025, hy + 0.02, 0.042, background=subject.body, radius=0.031)
    return Anchors((hx + 0.0, hy - 0.75 * r), (hx + 0.025, hy + 0.02), 0.042, (hx - 0.05, hy + 0.15), 0.1, (cx - 0.08, cy - ry))


def draw_duck(pen: Pen, subject: Subject) -> Anchors:
    rx, ry, leg = 0.19 * subject.length, 0.115 * subject.height, 0.06 * subject.legs
    cx, cy, r = 0.45, GROUND - leg - 0.9 * ry, 0.105 * subject.head
    hx, hy = cx + 0.78 * rx, cy - ry - 0.75 * r
    for x in (cx - 0.05, cx + 0.06):
        pen.stroke([(x, cy + 0.5 * ry), (x, GROUND - 0.012), (x + 0.055, GROUND - 0.012)], 0.028, BEAK)
    tail_lift = {"up": 0.2, "curled": 0.11, "stub": 0.03}[subject.tail]
    pen.fill(
        rounded([(cx - rx - 0.08, cy - tail_lift), (cx - 0.3 * rx, cy - 0.9 * ry), (cx - 0.5 * rx, cy + 0.8 * ry)], 0.04),
        subject.detail,
    )
    pen.stroke([(hx - 0.03, cy - 0.02), (hx - 0.01, hy)], 0.12, subject.body)
    if subject.ear == "pointed":
        for tail_lift in (0.75, 0.35):
            pen.stroke(
                curve(
                    [
                        (hx - 0.5 * r, hy - 0.6 * r),
                        (hx - 0.9 * r, hy - tail_lift * r - 0.03),
                        (hx - 1.5 * r, hy - tail_lift * r),
                    ]
                ),
                0.036,
                subject.detail,
            )
    elif subject.ear == "floppy":
        pen.fill(ellipse(hx - r, hy - 0.3 * r, 0.07, 0.04), subject.detail)
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject)
    pen.fill(rotate(ellipse(cx - 0.03, cy - 0.01, 0.55 * rx, 0.52 * ry), cx, cy, -0.2), subject.second, edge=True)
    pen.fill(ellipse(hx, hy, r * 1.03, r), subject.body, soft=True)
    if subject.ear == "round":
        pen.stroke([(hx - 0.05, hy + 0.95 * r), (hx + 0.04, hy + 0.98 * r)], 0.035, subject.detail)
    pen.fill(ellipse(hx + 0.075, hy + 0.42 * r, 0.085, 0.035), BEAK, edge=True)
    eyes(pen, hx + 0.022, hy - 0.22 * r, 0.045, background=subject.body, radius=0.032)
    return Anchors(
        (hx, hy - 0.9 * r), (hx + 0.022, hy - 0.22 * r), 0.045, (hx - 0.01, hy + r + 0.01), 0.07, (cx - 0.09, cy - ry)
    )


def draw_owl(pen: Pen, subject: Subject) -> Anchors:
    rx, ry = 0.145 * subject.length, 0.19 * subject.height
    cx, cy = 0.5, GROUND - 0.025 * subject.legs - ry
    hy, r = cy - 0.42 * ry, 0.075 * subject.head
    for side in (-1, 1):
        pen.fill(ellipse(cx + side * 0.06, GROUND - 0.02, 0.04, 0.028 * (0.4 + 0.6 * subject.legs)), BEAK)
        ex = cx + side * 0.66 * rx
        if subject.ear == "round":
            pen.fill(ellipse(ex, cy - 0.85 * ry, 0.052, 0.052), subject.detail)
        elif subject.ear == "floppy":
            tuft = ellipse(ex + side * 0.05, cy - 0.7 * ry, 0.075, 0.034)
            pen.fill(rotate(tuft, ex, cy - 0.7 * ry, side * 0.35), subject.detail)
        else:
            tuft = [(ex - 0.055, cy - 0.66 * ry), (ex + side * 0.045, cy - 1.22 * ry), (ex + 0.055, cy - 0.66 * ry)]
            pen.fill(rounded(tuft, 0.015), subject.detail)
    turn = {"up": 1.9, "curled": 0.75, "stub": 0.15}[subject.tail]
    for side in (-1, 1):
        wing = ellipse(cx + side * rx, cy + 0.32 * ry, 0.05, 0.11)
        pen.fill(rotate(wing, cx + side * 0.9 * rx, cy, -side * turn), subject.detail)
    pen.fill_pattern(ellipse(cx, cy, rx, ry), subject, top=hy + 0.6 * r)
    for side in (-1, 1):
        pen.fill(ellipse(cx + 0.02 + side * 0.85 * r, hy, r, r), subject.second, edge=True)
    eyes(pen, cx + 0.025, hy, 0.85 * r, background=subject.second, radius=0.043)
    beak = [(cx - 0.015, hy + 0.4 * r), (cx + 0.045, hy + 0.4 * r), (cx + 0.018, hy + 1.25 * r)]
    pen.fill(rounded(beak, 0.01), BEAK, edge=True)
    return Anchors(
        (cx, cy - 0.93 * ry), (cx + 0.025, hy), 0.85 * r, (cx, hy + r + 0.03), 0.9 * rx, (cx - 0.8 * rx, cy - 0.2 * ry)
    )
