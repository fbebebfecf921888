"""A pen for Toyland: shapes in unit coordinates (x right, y down, 0 to 1) on a layer that is drawn large."""

import math

from PIL import Image, ImageChops, ImageDraw

from personalize.toyland.world import Colour, Subject

INK = (28, 28, 34)


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


def gradient(side: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.new("RGB", (1, 2))
    ramp.putpixel((0, 0), top)
    ramp.putpixel((0, 1), bottom)
    return ramp.resize((side, side), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))
