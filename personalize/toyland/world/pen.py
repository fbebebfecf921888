"""A pen for Toyland. Shapes in unit coordinates (x right, y down, 0 to 1) are collected, then inked on a large image."""

import math
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from personalize.toyland.world.scenes import Colour, Subject
from personalize.toyland.world.shapes import Shape, box, ellipse

INK = (38, 34, 46)
CENTRE = (0.5, 0.62)  # about which a subject is turned and scaled
RIM = 0.013  # width of the dark line around a subject
MIN_JOINT_WIDTH = 11  # px of a line from which on its corners would show, and are rounded; at 64 and 128 px they need not
TOP_BRIGHTNESS, BOTTOM_BRIGHTNESS = 1.14, 0.82  # brightness at the top and at the bottom of a round part


@dataclass(frozen=True)
class Mark:
    """One thing to ink, in unit coordinates. width: of a line, 0 for a filled outline; soft: light above, darker below."""

    path: Shape
    colour: Colour
    width: float = 0.0
    soft: bool = False
    rim: bool = True
    edge: bool = False  # a thin line around it, also where it lies on other parts
    clip: Shape = ()  # the outline that it is clipped to


class Pen:
    """Collects marks. Inked, they are turned by `angle` and scaled about CENTRE, mirrored if asked, then shifted."""

    def __init__(self, *, scale=1.0, angle=0.0, shift=(0.0, 0.0), mirror=False, asleep=False, light=1.0):
        self.scale, self.angle, self.shift, self.mirror = scale, angle, shift, mirror
        self.asleep, self.light = asleep, light
        self.marks: list[Mark] = []

    def fill(self, shape: Shape, colour: Colour, *, soft=False, rim=True, edge=False):
        self.marks.append(Mark(shape, shade(colour, self.light), 0.0, soft, rim, edge))

    def stroke(self, shape: Shape, width: float, colour: Colour, *, rim=True):
        """A line with round ends; width in units of the image."""
        self.marks.append(Mark(shape, shade(colour, self.light), width, False, rim))

    def fill_clipped(self, parts: list[Shape], shape: Shape, colour: Colour):
        """Fills the parts as far as they lie within the shape."""
        self.marks.extend(Mark(part, colour, soft=True, rim=False, clip=shape) for part in parts)

    def fill_pattern(self, shape: Shape, subject: Subject, *, top: float | None = None):
        """A body part in the body colour, with the subject's pattern; `top`: from that y on, where a face is above it."""
        self.fill(shape, subject.body, soft=True)
        if subject.pattern != "plain":
            xs, ys = [p[0] for p in shape], [p[1] for p in shape]
            high = min(ys) if top is None else top
            self.fill_clipped(pattern(subject.pattern, (min(xs), high), (max(xs), max(ys))), shape, subject.second)

    def to_pixels(self, side: int) -> list[Mark]:
        """The marks in pixels of an image of that side."""
        (cx, cy), flip = CENTRE, -1 if self.mirror else 1
        a, b = side * self.scale * math.cos(self.angle), side * self.scale * math.sin(self.angle)
        x0, y0 = (cx + self.shift[0]) * side, (cy + self.shift[1]) * side

        def points(shape: Shape) -> Shape:
            return [(x0 + flip * (a * (x - cx) - b * (y - cy)), y0 + b * (x - cx) + a * (y - cy)) for x, y in shape]

        thick = side * self.scale
        return [Mark(points(m.path), m.colour, m.width * thick, m.soft, m.rim, m.edge, points(m.clip)) for m in self.marks]

    def ink(self, image: Image.Image, mask: Image.Image | None = None, rim: Colour | None = None, level: int = 255):
        """Draws the marks on an RGB image, their silhouette as `level` on an L mask; with a rim around them."""
        marks, rim_width = self.to_pixels(image.width), 2 * RIM * image.width
        if rim:
            for mark in marks:
                if mark.rim:
                    _draw_outline(image, mark, rim_width, rim)
        for mark in marks:
            if mark.edge and rim:
                _draw_outline(image, mark, 0.9 * rim_width, blend(rim, mark.colour, 0.25))
            if mark.soft:
                _fill_shaded(image, mark)
            else:
                _fill_flat(image, mark, mark.colour)
        if mask:
            for mark in marks:
                if mark.rim and rim:
                    _draw_outline(mask, mark, rim_width, level)
                if not mark.clip:
                    _fill_flat(mask, mark, level)


def _fill_flat(image: Image.Image, mark: Mark, colour):
    draw = ImageDraw.Draw(image)
    if mark.width:
        _draw_line(draw, mark.path, mark.width, colour)
    else:
        draw.polygon(mark.path, fill=colour)


def _draw_line(draw: ImageDraw.ImageDraw, path: Shape, width: float, colour):
    width = max(1, width)
    draw.line(path, fill=colour, width=round(width))
    if width > 3:
        _draw_joints(draw, path, width / 2, colour)


def _draw_joints(draw: ImageDraw.ImageDraw, path: Shape, half: float, colour):
    for x, y in path:
        draw.ellipse((x - half, y - half, x + half, y + half), fill=colour)


def _draw_outline(image: Image.Image, mark: Mark, rim_width: float, colour):
    draw = ImageDraw.Draw(image)
    if mark.width:
        _draw_line(draw, mark.path, mark.width + rim_width, colour)
        return
    draw.line([*mark.path, *mark.path[:2]], fill=colour, width=round(rim_width))
    if rim_width > MIN_JOINT_WIDTH:
        _draw_joints(draw, mark.path, rim_width / 2, colour)


def _fill_shaded(image: Image.Image, mark: Mark):
    """Fills an outline with its colour, light above and darker below; clipped to `within`, whose light it takes."""
    light_path = mark.clip or mark.path
    xs, ys = [p[0] for p in mark.path], [p[1] for p in mark.path]
    top, bottom = min(p[1] for p in light_path), max(p[1] for p in light_path)
    x0, y0 = max(0, int(min(xs))), max(0, int(min(ys)))
    w, h = min(image.width, int(max(xs)) + 1) - x0, min(image.height, int(max(ys)) + 1) - y0
    if w <= 0 or h <= 0:
        return
    stencil = _polygon_mask(mark.path, x0, y0, (w, h))
    if mark.clip:
        stencil = ImageChops.darker(stencil, _polygon_mask(mark.clip, x0, y0, (w, h)))
    factors = [TOP_BRIGHTNESS + (BOTTOM_BRIGHTNESS - TOP_BRIGHTNESS) * (y - top) / max(1.0, bottom - top) for y in (y0, y0 + h)]
    image.paste(gradient((w, h), *(tint(mark.colour, factor) for factor in factors)), (x0, y0), stencil)


def _polygon_mask(path, x0: int, y0: int, size: tuple[int, int]) -> Image.Image:
    stencil = Image.new("L", size)
    ImageDraw.Draw(stencil).polygon([(x - x0, y - y0) for x, y in path], fill=255)
    return stencil


def pattern(kind: str, low: tuple[float, float], high: tuple[float, float]) -> list[Shape]:
    """Shapes of a pattern that covers the box from corner to corner."""
    (x0, y0), (x1, y1) = low, high
    w, h = x1 - x0, y1 - y0
    if kind == "spots":
        positions = ((0.18, 0.3), (0.5, 0.2), (0.82, 0.34), (0.33, 0.68), (0.68, 0.72))
        return [ellipse(x0 + u * w, y0 + v * h, 0.042, 0.042) for u, v in positions]
    if kind == "stripes":
        return [box(x0 + u * w, y0, x0 + (u + 0.13) * w, y1) for u in (0.08, 0.34, 0.6, 0.86)]
    if kind == "saddle":
        return [ellipse(x0 + 0.5 * w, y0 + 0.08 * h, 0.36 * w, 0.42 * h)]
    if kind == "belt":
        return [box(x0 + 0.38 * w, y0, x0 + 0.64 * w, y1)]
    return [box(x0, y0 + 0.6 * h, x1, y1)]


def shade(colour: Colour, factor: float) -> Colour:
    """Darker below 1, lighter above."""
    return tuple(max(0, min(255, round(c * factor))) for c in colour)


def tint(colour: Colour, factor: float) -> Colour:
    """`shade`, except that what is lighter goes towards white, so that black has a light side too."""
    if factor <= 1:
        return shade(colour, factor)
    return tuple(round(c + (factor - 1) * (255 - c)) for c in colour)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """From a (share 0) to b (share 1)."""
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b))


def lightness(colour: Colour) -> float:
    """Lightness, 0 to 1."""
    return (0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]) / 255


def rim_colour(colour: Colour) -> Colour:
    """The line around something of that colour: dark, bluish; lighter than it around what is very dark itself."""
    return blend(colour, (120, 120, 140), 0.75) if lightness(colour) < 0.22 else blend(shade(colour, 0.42), INK, 0.45)


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.new("RGB", (1, 2))
    ramp.putpixel((0, 0), top)
    ramp.putpixel((0, 1), bottom)
    return ramp.resize((1, size[1]), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5)).resize(size, Image.Resampling.NEAREST)
