"""What comes with a subject: the six accessories, and the things of its action (wings, bed, skateboard, clouds, lines)."""

from personalize.toyland.world.backdrops import cloud
from personalize.toyland.world.faces import GROUND, WHITE, Anchors
from personalize.toyland.world.pen import INK, Pen, blend, lightness, shade
from personalize.toyland.world.scenes import COLOURS, Accessory, Colour
from personalize.toyland.world.shapes import box, curve, ellipse, rotate, rounded

MIN_Y = 0.2  # y of a balloon or a flag
BLANKET = 0.725  # y of its upper edge


def draw_back_accessory(pen: Pen, accessory: Accessory | None, anchors: Anchors):
    """What stands behind the subject: a flag or a balloon, tied to its back."""
    if accessory is None or accessory.kind not in ("flag", "balloon"):
        return
    colour, (x, y) = COLOURS[accessory.colour], anchors.back
    if accessory.kind == "flag":
        top = max(MIN_Y - 0.04, y - 0.36)
        pen.stroke([(x, y + 0.08), (x - 0.03, top)], 0.02, (150, 110, 75))
        wave = curve([(x - 0.03, top), (x - 0.12, top - 0.02), (x - 0.21, top + 0.015)])
        pen.fill([*wave, *[(u + 0.005, v + 0.125) for u, v in reversed(wave)]], colour)
    else:
        u, v = x - 0.075, max(MIN_Y, y - 0.32)
        pen.stroke(curve([(x, y + 0.05), (x - 0.02, 0.5 * (y + v)), (u, v + 0.1)]), 0.014, (250, 250, 250))
        pen.fill([(u, v + 0.09), (u - 0.022, v + 0.125), (u + 0.022, v + 0.125)], shade(colour, 0.85))
        pen.fill(ellipse(u, v, 0.088, 0.102), colour, soft=True)
        pen.fill(ellipse(u - 0.032, v - 0.035, 0.02, 0.028), blend(colour, WHITE, 0.65), rim=False)


def draw_worn_accessory(pen: Pen, accessory: Accessory | None, anchors: Anchors):
    """What is on the subject: hat, crown, glasses or scarf."""
    if accessory and accessory.kind in WORN_ACCESSORIES:
        WORN_ACCESSORIES[accessory.kind](pen, anchors, COLOURS[accessory.colour])


def hat(pen: Pen, anchors: Anchors, colour: Colour):
    x, y = anchors.top
    pen.fill(box(x - 0.07, y - 0.13, x + 0.07, y + 0.01, r=0.02), colour, soft=True)
    pen.fill(box(x - 0.07, y - 0.045, x + 0.07, y - 0.012), band(colour), rim=False)
    pen.fill(ellipse(x, y + 0.006, 0.125, 0.024), colour)


def crown(pen: Pen, anchors: Anchors, colour: Colour):
    x, y = anchors.top
    points = [(-0.085, 0.02), (-0.105, -0.11), (-0.048, -0.05), (0, -0.135), (0.048, -0.05), (0.105, -0.11), (0.085, 0.02)]
    pen.fill([(x + dx, y + dy) for dx, dy in points], colour)
    for dx, dy in ((-0.105, -0.11), (0, -0.135), (0.105, -0.11)):
        pen.fill(ellipse(x + dx, y + dy, 0.018, 0.018), colour)
    for dx in (-0.045, 0.0, 0.045):
        pen.fill(ellipse(x + dx, y - 0.008, 0.014, 0.014), band(colour), rim=False)


def glasses(pen: Pen, anchors: Anchors, colour: Colour):
    """Thick frames, since at 64 px a thin one has no colour; the eyes are seen through them."""
    (x, y), radius = anchors.eyes, max(0.066, anchors.eye_offset + 0.006)
    bar = [(x - anchors.eye_offset - radius - 0.025, y - 0.015), (x + anchors.eye_offset + radius + 0.025, y - 0.015)]
    pen.stroke(bar, 0.026, colour)
    for side in (-1, 1):
        pen.fill(ellipse(x + side * anchors.eye_offset, y, radius, radius), colour)
    for side in (-1, 1):
        ex, inner = x + side * anchors.eye_offset, 0.56 * radius
        pen.fill(ellipse(ex, y, inner, inner), WHITE, rim=False)
        if pen.asleep:
            pen.stroke(ellipse(ex, y - 0.1 * inner, 0.8 * inner, 0.6 * inner, start=0.04, end=0.46), 0.014, INK, rim=False)
        else:
            pen.fill(ellipse(ex + 0.2 * inner, y, 0.62 * inner, 0.7 * inner), INK, rim=False)
            pen.fill(ellipse(ex + 0.4 * inner, y - 0.3 * inner, 0.2 * inner, 0.2 * inner), WHITE, rim=False)


def scarf(pen: Pen, anchors: Anchors, colour: Colour):
    (x, y), half_width = anchors.neck, anchors.collar
    end = [
        (x - 0.55 * half_width - 0.04, y),
        (x - 0.55 * half_width + 0.035, y),
        (x - 0.55 * half_width + 0.02, y + 0.15),
        (x - 0.55 * half_width - 0.06, y + 0.145),
    ]
    pen.fill(rounded(end, 0.012), shade(colour, 0.88))
    pen.stroke(curve([(x - half_width, y - 0.012), (x, y + 0.018), (x + half_width, y - 0.012)]), 0.062, colour)


WORN_ACCESSORIES = {"hat": hat, "crown": crown, "glasses": glasses, "scarf": scarf}


def band(colour: Colour) -> Colour:
    return shade(colour, 0.6) if lightness(colour) > 0.3 else blend(colour, WHITE, 0.45)


def wings(pen: Pen, anchors: Anchors):
    """White wings: one at each side of what is seen from the front, else both on the back."""
    (x, y), front = anchors.back, abs(anchors.top[0] - 0.5) < 0.03
    if front:
        wing(pen, x + 0.02, y + 0.03, -1, lift=0.5)
        wing(pen, 2 * anchors.top[0] - x - 0.02, y + 0.03, 1, lift=0.5)
    else:
        wing(pen, x + 0.1, y + 0.05, -1, lift=1.05)
        wing(pen, x + 0.02, y + 0.05, -1, lift=0.55)


def wing(pen: Pen, x: float, y: float, side: int, *, lift: float):
    for k, (length, turn) in enumerate(((0.14, -0.5), (0.18, 0.0), (0.21, 0.5))):
        feather = rotate(ellipse(x - length, y, length, 0.052), x, y, lift + 0.8 * turn)
        pen.fill([(x + side * (x - u), v) if side > 0 else (u, v) for u, v in feather], (232 + 10 * k, 238 + 7 * k, 250))


def skateboard(pen: Pen):
    for x in (0.31, 0.69):
        pen.fill(ellipse(x, GROUND + 0.055, 0.042, 0.042), INK)
        pen.fill(ellipse(x, GROUND + 0.055, 0.018, 0.018), (240, 240, 240), rim=False)
    deck = curve([(0.16, GROUND - 0.035), (0.23, GROUND + 0.014), (0.77, GROUND + 0.014), (0.84, GROUND - 0.035)])
    pen.stroke(deck, 0.042, (236, 158, 70))


def bed(pen: Pen):
    """What is behind a sleeper: headboard and pillow."""
    pen.fill(box(0.04, 0.5, 0.12, 0.98, r=0.03), (168, 112, 70))
    pen.fill(box(0.09, 0.6, 0.32, 0.8, r=0.06), (250, 250, 252), soft=True)
    pen.fill(box(0.08, 0.76, 0.9, 0.9), (246, 246, 250))


def blanket(pen: Pen):
    """What is before a sleeper, and the foot of the bed."""
    y = BLANKET
    top = curve([(0.18, y + 0.01), (0.35, y - 0.012), (0.52, y + 0.008), (0.7, y - 0.012), (0.9, y + 0.01)])
    pen.fill(box(0.08, 0.84, 0.92, 0.96), (190, 132, 84))
    pen.fill([*top, (0.9, 0.885), (0.18, 0.885)], (122, 150, 226), soft=True)
    pen.stroke(top, 0.034, (236, 240, 252), rim=False)
    pen.fill(box(0.88, 0.64, 0.96, 0.98, r=0.03), (168, 112, 70))


def letters(pen: Pen, head: tuple[float, float], *, mirror: bool):
    """Two letters Z that rise from the top of the head; upright, also where the image is mirrored."""
    for dx, dy, size in ((0.2, 0.0, 0.036), (0.3, -0.15, 0.056)):
        x, y = min(0.6, head[0]) + dx, max(0.27, head[1]) + dy
        path = [(x - size, y - size), (x + size, y - size), (x - size, y + size), (x + size, y + size)]
        pen.stroke([(2 * x - u, v) for u, v in path] if mirror else path, 0.6 * size + 0.006, WHITE)


def puffs(pen: Pen):
    """Clouds below one who flies."""
    for x, y in ((0.2, 0.86), (0.78, 0.9)):
        cloud(pen, x, y, rim=True)


def hops(pen: Pen):
    """Lines below one who jumps."""
    for x, lean in ((0.33, -0.045), (0.5, 0.0), (0.67, 0.045)):
        pen.stroke([(x, 0.81), (x + lean, 0.9)], 0.032, WHITE)
