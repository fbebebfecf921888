"""Figures of the report as inline SVG, coloured by page.css: range bars, the checkpoint path, a histogram."""

import math

from markupsafe import Markup

from personalize.evaluation.report.tables import number

WIDE, HIGH = 440, 300  # px of the checkpoint figure
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 18, 46  # its margins
STRIP, BINS = 130, 24  # px height of the histogram, and its bars


def el(tag: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """One element. None children and attributes are left out; `class_` is class and `stroke_width` stroke-width."""
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    inside = Markup().join(child for child in children if child)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup().join(Markup(' {}="{}"').format(*pair) for pair in pairs), inside)


def range_bar(row: dict) -> Markup:
    """floor, score, ceiling and low to high on one axis from 0 to 1, the same for every row."""
    floor, score, ceiling, low, high = (row.get(key) for key in ("floor", "score", "ceiling", "low", "high"))
    known = [v for v in (floor, score, ceiling, low, high) if v is not None]
    least, most = min(0.0, *known), max(1.0, *known)

    def at(value):
        return f"{100 * (value - least) / (most - least):.2f}%"

    def bar(one, other, class_):
        if one is None or other is None:
            return None
        return el("line", x1=at(min(one, other)), x2=at(max(one, other)), y1=10, y2=10, class_=class_)

    ends = [el("line", x1=at(v), x2=at(v), y1=3, y2=17, class_="end") for v in (floor, ceiling) if v is not None]
    inside = (
        el("line", x1="0", x2="100%", y1=10, y2=10, class_="track"),
        bar(floor, ceiling, "span"), bar(floor, score, "fill"), bar(low, high, "whisker"), *ends,
        None if score is None else el("circle", cx=at(score), cy=10, r=4, class_="dot"),
    )  # fmt: skip
    return el("svg", *inside, class_="range", height=20, role="img", aria_label=f"{number(score)} on a bar from 0 to 1")


def checkpoint_path(rows: list[dict]) -> Markup:
    """Obedience (CLIP-T minus the base's) to the right, identity upwards; a line in order of steps."""
    rows = sorted(rows, key=lambda row: row["step"])
    obeys = [row["obeys"] - row["base_obeys"] for row in rows]
    heights = [row["identity"] for row in rows]
    tails = [row[k] for row in rows for k in ("low", "high") if row.get(k) is not None]
    across = _Axis([*obeys, 0.0], LEFT, WIDE - RIGHT)
    up = _Axis([*heights, *tails], HIGH - BOTTOM, TOP)
    dots = [(across.at(x), up.at(y)) for x, y in zip(obeys, heights)]
    path = el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in dots), class_="path")
    inside = (_frame(across, up), path, *_whiskers(rows, dots, up), *_checkpoints(rows, dots))
    what = f"identity against adherence for {len(rows)} checkpoints"
    return el("svg", *inside, viewBox=f"0 0 {WIDE} {HIGH}", class_="figure", role="img", aria_label=what)


def histogram(nearest: list[float], apart: list[float]) -> Markup:
    """Images by the cosine to their nearest photo, over the range of photos to their nearest other photo."""
    axis = _Axis([*nearest, *apart], 8, WIDE - 8, least=0.05)
    base, counts = STRIP - 28, [0] * BINS
    for value in nearest:
        counts[min(BINS - 1, int(BINS * (value - axis.low) / (axis.high - axis.low)))] += 1
    wide, unit, parts = (WIDE - 16) / BINS, (base - 10) / max(1, *counts), []
    if apart:
        left, right = axis.at(min(apart)), axis.at(max(apart))
        parts.append(el("rect", x=f"{left:.1f}", y=4, width=f"{max(2, right - left):.1f}", height=base - 4, class_="band"))
    for k, count in enumerate(counts):
        x, tall = 8 + k * wide + 1, count * unit
        middle = axis.low + (k + 0.5) / BINS * (axis.high - axis.low)
        over = " over" if apart and middle > max(apart) else ""
        if count:
            parts.append(el("rect", x=f"{x:.1f}", y=f"{base - tall:.1f}", width=f"{wide - 2:.1f}", height=f"{tall:.1f}", rx=1.5,
                            class_=f"bar{over}"))  # fmt: skip
    parts.append(el("line", x1=8, x2=WIDE - 8, y1=base, y2=base, class_="axis"))
    parts += [el("text", number(t, axis.form), x=f"{axis.at(t):.1f}", y=base + 18, class_="tick mid") for t in axis.ticks()]
    what = f"{len(nearest)} images by the cosine to their nearest photo"
    return el("svg", *parts, viewBox=f"0 0 {WIDE} {STRIP}", class_="figure", role="img", aria_label=what)


class _Axis:
    """Values onto pixels from `start` to `end`, with some room at both ends and round ticks."""

    def __init__(self, values: list[float], start: float, end: float, *, least: float = 0.02):
        room = 0.1 * max(least, max(values) - min(values))
        self.low, self.high, self.start, self.end = min(values) - room, max(values) + room, start, end
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        self.step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        self.form = f".{max(1, -math.floor(math.log10(self.step) + 1e-9))}f"

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [k * self.step for k in range(first, last + 1)]


def _frame(across: _Axis, up: _Axis) -> Markup:
    """Grid lines, tick labels and the names of both axes; the base's adherence as a line of its own."""
    foot, parts = HIGH - BOTTOM, []
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(el("line", x1=LEFT, x2=WIDE - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(el("text", number(tick, up.form), x=LEFT - 8, y=f"{y + 4:.1f}", class_="tick last"))
    for tick in across.ticks():
        words = number(tick, "+" + across.form) if abs(tick) > 1e-9 else "0"
        parts.append(el("text", words, x=f"{across.at(tick):.1f}", y=foot + 18, class_="tick mid"))
    zero = across.at(0.0)
    parts.append(el("line", x1=f"{zero:.1f}", x2=f"{zero:.1f}", y1=TOP, y2=foot, class_="zero"))
    parts.append(el("text", "base", x=f"{zero:.1f}", y=TOP - 4, class_="tick mid"))
    parts.append(el("line", x1=LEFT, x2=WIDE - RIGHT, y1=foot, y2=foot, class_="axis"))
    parts.append(el("text", "adherence: CLIP-T minus the base →", x=WIDE - RIGHT, y=HIGH - 6, class_="name last"))
    parts.append(el("text", "identity ↑", x=LEFT + 6, y=TOP + 6, class_="name"))
    return Markup().join(parts)


def _whiskers(rows: list[dict], dots: list[tuple[float, float]], up: _Axis) -> list[Markup]:
    drawn = []
    for row, (x, _) in zip(rows, dots):
        if row.get("low") is not None and row.get("high") is not None:
            ends = {"y1": f"{up.at(row['low']):.1f}", "y2": f"{up.at(row['high']):.1f}"}
            drawn.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", **ends, class_="whisker"))
    return drawn


def _checkpoints(rows: list[dict], dots: list[tuple[float, float]]) -> list[Markup]:
    """A dot and its step for each: hollow where it breaks a limit, ringed where it was chosen."""
    along = [(a + (c - a) * k / 9, b + (d - b) * k / 9) for (a, b), (c, d) in zip(dots, dots[1:]) for k in range(10)]
    drawn, taken = [], [(x - 3, y - 3, x + 3, y + 3) for x, y in along] + [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for row, (x, y) in zip(rows, dots):
        chosen, at = row.get("chosen"), {"cx": f"{x:.1f}", "cy": f"{y:.1f}"}
        if chosen:
            drawn.append(el("circle", **at, r=10, class_="ring"))
        kind = f"step{' chosen' * bool(chosen)}{' hollow' * (not row['qualifies'])}"
        drawn.append(el("circle", **at, r=5.5, class_=kind))
        words = f"{row['step']}, chosen" if chosen else str(row["step"])
        left, foot = _free_spot(x, y, 7.2 * len(words), taken, away=15 if chosen else 10)
        drawn.append(el("text", words, x=f"{left:.1f}", y=f"{foot:.1f}", class_="label" + (" chosen" if chosen else "")))
    return drawn


def _free_spot(x: float, y: float, wide: float, taken: list[tuple], *, away: float) -> tuple[float, float]:
    """Left and baseline of a label beside (x, y) that covers the least of what is `taken`; takes its box."""
    spots = [(x + away, y + 4), (x - away - wide, y + 4), (x - wide / 2, y - away - 2), (x - wide / 2, y + away + 11)]
    spots += [(x + away, y - away), (x - away - wide, y - away), (x + away, y + away + 8), (x - away - wide, y + away + 8)]

    def cost(spot):
        a, b, c, d = spot[0], spot[1] - 11, spot[0] + wide, spot[1] + 2
        cover = sum(max(0, min(c, r) - max(a, p)) * max(0, min(d, s) - max(b, q)) for p, q, r, s in taken)
        return cover + 1000 * (a < LEFT or c > WIDE or b < 0 or d > HIGH - BOTTOM)

    left, foot = min(spots, key=cost)
    taken.append((left, foot - 11, left + wide, foot + 2))
    return left, foot
