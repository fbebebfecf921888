"""Outlines and lines in unit coordinates, as lists of points."""

import math

Shape = list[tuple[float, float]]


def ellipse(cx, cy, rx, ry, *, start=0.0, end=1.0) -> Shape:
    """An ellipse, or the part of it between two fractions of a turn (clockwise from the right)."""
    n = 14 + round(60 * max(rx, ry))
    turns = [2 * math.pi * (start + (end - start) * k / n) for k in range(n + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in turns]


def box(x0, y0, x1, y1, *, r=0.0) -> Shape:
    """A rectangle, its corners rounded by r."""
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    return rounded(corners, r) if r else corners


def rounded(corners: Shape, r: float) -> Shape:
    """A polygon whose corners are rounded: each is cut r before and after, at most at half of a side."""
    out = []
    for k, (x, y) in enumerate(corners):
        a, b = (_step_towards((x, y), corners[j], r) for j in (k - 1, (k + 1) % len(corners)))
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            u, v, w = (1 - t) ** 2, 2 * t * (1 - t), t**2
            out.append((u * a[0] + v * x + w * b[0], u * a[1] + v * y + w * b[1]))
    return out


def _step_towards(p, q, r: float):
    length = math.dist(p, q)
    share = min(0.5, r / length) if length else 0.0
    return p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])


def curve(points: Shape, steps: int = 6) -> Shape:
    """A smooth line through the points (Catmull-Rom)."""
    p, out = [points[0], *points, points[-1]], []
    for window in zip(p, p[1:], p[2:], p[3:]):
        out.extend(tuple(_catmull_rom(axis, i / steps) for axis in zip(*window)) for i in range(steps))
    return [*out, points[-1]]


def _catmull_rom(window: tuple[float, ...], t: float) -> float:
    a, b, c, d = window
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def rotate(shape: Shape, cx, cy, angle) -> Shape:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(cx + cos * (x - cx) - sin * (y - cy), cy + sin * (x - cx) + cos * (y - cy)) for x, y in shape]
