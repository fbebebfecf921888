"""What Toyland's subjects share: eyes, a mouth, ears, and where on a subject an accessory goes."""

from typing import NamedTuple

from personalize.toyland.world.pen import INK, Pen, lightness, shade
from personalize.toyland.world.scenes import Colour, Subject
from personalize.toyland.world.shapes import ellipse, rounded

GROUND = 0.8  # y of the feet
WHITE = (255, 255, 255)
CREAM = (255, 246, 228)
BEAK = (250, 165, 45)
NOSE = (240, 130, 150)


class Anchors(NamedTuple):
    """Where accessories and wings go, (x, y) before the pen's own turn and shift."""

    top: tuple[float, float]  # of the head
    eyes: tuple[float, float]  # the middle between them
    eye_offset: float  # half the distance of the eyes
    neck: tuple[float, float]
    collar: float  # half the width of the neck
    back: tuple[float, float]


def eyes(pen: Pen, x: float, y: float, eye_offset: float, *, background: Colour, radius: float = 0.033):
    """Two eyes that look ahead; of a sleeper, closed ones. on: the colour around them."""
    for side in (-1, 1):
        ex = x + side * eye_offset
        if pen.asleep:
            pen.stroke(
                ellipse(ex, y - 0.2 * radius, 1.1 * radius, radius, start=0.02, end=0.48),
                0.022,
                line_colour(background),
                rim=False,
            )
            continue
        pen.fill(ellipse(ex, y, radius, radius * 1.1), WHITE, rim=False)
        pen.fill(ellipse(ex + 0.25 * radius, y + 0.05 * radius, 0.68 * radius, 0.78 * radius), INK, rim=False)
        pen.fill(ellipse(ex + 0.46 * radius, y - 0.3 * radius, 0.24 * radius, 0.24 * radius), WHITE, rim=False)


def line_colour(colour: Colour) -> Colour:
    """Of a line on that colour: dark, or light on what is dark."""
    return INK if lightness(colour) > 0.33 else CREAM


def smile(pen: Pen, x: float, y: float, background: Colour, *, width: float = 0.03):
    pen.stroke(ellipse(x, y, width, 0.75 * width, start=0.06, end=0.44), 0.013, line_colour(background), rim=False)


def ear_pair(pen: Pen, subject: Subject, x: float, y: float, *, r: float):
    """A dog's: (x, y) the middle of a head of radius r. To be drawn before the head where they stand, after where they hang."""
    for side in (-1, 1):
        ex = x + side * 0.82 * r
        if subject.ear == "floppy":
            pen.fill(rounded([(ex - 0.04, y - 0.6 * r), (ex + 0.04, y - 0.6 * r), (ex + side * 0.05 + 0.035, y + 0.62 * r),
                           (ex + side * 0.05 - 0.045, y + 0.62 * r)], 0.04), subject.second)  # fmt: skip
        elif subject.ear == "round":
            pen.fill(ellipse(ex, y - 0.68 * r, 0.06, 0.06), subject.second)
        else:
            ear = [(ex - 0.055, y - 0.3 * r), (ex + side * 0.03, y - 1.6 * r), (ex + 0.055, y - 0.3 * r)]
            pen.fill(rounded(ear, 0.02), subject.second)


def feet(pen: Pen, xs: tuple[float, ...], top: float, width: float, *, colours: tuple[Colour, Colour]):
    """Legs from `top` to the ground, in the first colour, with socks in the second."""
    for x in xs:
        pen.stroke([(x, top), (x, GROUND - width / 2)], width, colours[0])
    for x in xs:
        pen.stroke([(x, GROUND - 0.75 * width), (x + 0.015, GROUND - width / 2)], width, colours[1], rim=False)


def far_side_colour(colour: Colour) -> Colour:
    """Of a part on the far side."""
    return shade(colour, 0.72)
