"""Figures of the report as inline SVG, coloured by page.css: range bars, the checkpoint path, a histogram."""

import math

from markupsafe import Markup

from personalize.evaluation.report.tables import number

WIDE, HIGH = 440, 300  # px of the checkpoint figure
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 18, 46  # its margins
ROOM = 96  # right margin of the losses, for their names
STRIP, BINS = 130, 24  # px height of the histogram, and its bars


def el(tag: str, *children: str | None, **attributes: str | float) -> Markup:
    """One element; floats are px, to a tenth. None children are left out; `class_` is class and `stroke_width` stroke-width."""
    texts = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in attributes.items()}
    pairs = (Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), text) for name, text in texts.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup().join(pairs), Markup().join(child for child in children if child))


def _figure(height: int, label: str, *children: Markup) -> Markup:
    return el("svg", *children, viewBox=f"0 0 {WIDE} {height}", class_="figure", role="img", aria_label=label)


def range_bar(row: dict) -> Markup:
    """floor, score, ceiling and low to high on one axis from 0 to 1, the same for every row."""
    floor, score, ceiling, low, high = (row.get(key) for key in ("floor", "score", "ceiling", "low", "high"))
    known = [v for v in (floor, score, ceiling, low, high) if v is not None]
    least, most = min(0.0, *known), max(1.0, *known)

    def at(value):
        return f"{100 * (value - least) / (most - least):.2f}%"

    def bar(one, other, class_):
        if one is not None and other is not None:
            return el("line", x1=at(min(one, other)), x2=at(max(one, other)), y1=10, y2=10, class_=class_)

    inside = (
        el("line", x1="0", x2="100%", y1=10, y2=10, class_="track"),
        bar(floor, ceiling, "span"),
        bar(floor, score, "fill"),
        bar(low, high, "whisker"),
        *(el("line", x1=at(v), x2=at(v), y1=3, y2=17, class_="end") for v in (floor, ceiling) if v is not None),
        None if score is None else el("circle", cx=at(score), cy=10, r=4, class_="dot"),
    )
    return el("svg", *inside, class_="range", height=20, role="img", aria_label=f"{number(score)} on a bar from 0 to 1")


def checkpoint_path(rows: list[dict]) -> Markup:
    """Obedience (CLIP-T minus the base's) to the right, identity upwards; a line in order of steps."""
    rows = sorted(rows, key=lambda row: row["step"])
    adherence = [row["obeys"] - row["base_obeys"] for row in rows]
    identity = [row["identity"] for row in rows]
    bounds = [row[k] for row in rows for k in ("low", "high") if row.get(k) is not None]
    across, up = _Axis([*adherence, 0.0], LEFT, WIDE - RIGHT), _Axis([*identity, *bounds], HIGH - BOTTOM, TOP)
    dots = [(across.at(x), up.at(y)) for x, y in zip(adherence, identity)]
    path = el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in dots), class_="path")
    whiskers = [
        el("line", x1=x, x2=x, y1=up.at(row["low"]), y2=up.at(row["high"]), class_="whisker")
        for row, (x, _) in zip(rows, dots)
        if row.get("low") is not None and row.get("high") is not None
    ]
    label = f"identity against adherence for {len(rows)} checkpoints"
    return _figure(HIGH, label, *_frame(across, up), path, *whiskers, *_checkpoints(rows, dots))


LOSSES = {"fixed_subject": "photos", "held_out": "held out", "fixed_prior": "class images"}  # of a row: what it is of

LOGGED = {"subject": "fixed_subject", "prior": "fixed_prior"}  # of a row of log.jsonl: its line


def loss_paths(rows: list[dict], what: str = "losses on fixed noise") -> Markup:
    """Steps to the right, losses upwards; a line for each of LOSSES, named at its end. what: they are, for who cannot see."""
    lines = {name: [(row["step"], row[name]) for row in rows if name in row] for name in LOSSES}
    lines = {name: points for name, points in lines.items() if points}
    across = _Axis([float(row["step"]) for row in rows], LEFT, WIDE - ROOM)
    up = _Axis([value for points in lines.values() for _, value in points], HIGH - BOTTOM, TOP, least=1e-3)
    foot, parts, taken = HIGH - BOTTOM, [], []
    for tick in up.ticks():
        parts.append(el("line", x1=LEFT, x2=WIDE - ROOM, y1=up.at(tick), y2=up.at(tick), class_="grid"))
        parts.append(el("text", number(tick, up.form), x=LEFT - 8, y=up.at(tick) + 4, class_="tick last"))
    parts += [
        el("text", f"{tick:g}", x=across.at(tick), y=foot + 18, class_="tick mid") for tick in across.ticks() if tick >= 0
    ]
    parts.append(el("line", x1=LEFT, x2=WIDE - ROOM, y1=foot, y2=foot, class_="axis"))
    parts.append(el("text", "step →", x=WIDE - ROOM, y=HIGH - 6, class_="name last"))
    for name, points in sorted(lines.items(), key=lambda line: -line[1][-1][1]):  # from the top, so that names make room
        dots = " ".join(f"{across.at(float(step)):.1f},{up.at(value):.1f}" for step, value in points)
        parts.append(el("polyline", points=dots, class_=f"path {name.replace('_', '-')}"))
        taken.append(max(up.at(points[-1][1]) + 4, taken[-1] + 14 if taken else 0.0))
        parts.append(el("text", LOSSES[name], x=WIDE - ROOM + 6.0, y=taken[-1], class_="label"))
    return _figure(HIGH, f"{what} at {len(rows)} steps", *parts)


def training_losses(rows: list[dict], *, points: int = 300) -> Markup:
    """The losses of log.jsonl as `loss_paths` shows them, each the mean of the 40th of the run that ends at its step."""
    window, every, curve = max(1, len(rows) // 40), max(1, len(rows) // points), []
    for k in sorted({*range(0, len(rows), every), len(rows) - 1}):
        last = rows[max(0, k - window + 1) : k + 1]
        means = {to: sum(row[of] for row in last) / len(last) for of, to in LOGGED.items() if rows[k][of]}
        curve.append({"step": rows[k]["step"]} | means)
    return loss_paths(curve, "training losses, smoothed,")


def histogram(nearest: list[float], apart: list[float]) -> Markup:
    """Images by the cosine to their nearest photo, over the range of photos to their nearest other photo."""
    axis = _Axis([*nearest, *apart], 8, WIDE - 8, least=0.05)
    base, span, counts = STRIP - 28, axis.high - axis.low, [0] * BINS
    for value in nearest:
        counts[min(BINS - 1, int(BINS * (value - axis.low) / span))] += 1
    wide, unit, parts = (WIDE - 16) / BINS, (base - 10) / max(1, *counts), []
    if apart:
        left, right = axis.at(min(apart)), axis.at(max(apart))
        parts.append(el("rect", x=left, y=4, width=max(2.0, right - left), height=base - 4, class_="band"))
    for k, count in enumerate(counts):
        suspect = apart and axis.low + (k + 0.5) / BINS * span > max(apart)
        box = {"x": 8 + k * wide + 1, "y": base - count * unit, "width": wide - 2, "height": count * unit}
        if count:
            parts.append(el("rect", **box, rx=1.5, class_="bar over" if suspect else "bar"))
    parts.append(el("line", x1=8, x2=WIDE - 8, y1=base, y2=base, class_="axis"))
    parts += [el("text", number(t, axis.form), x=axis.at(t), y=base + 18, class_="tick mid") for t in axis.ticks()]
    return _figure(STRIP, f"{len(nearest)} images by the cosine to their nearest photo", *parts)


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


def _frame(across: _Axis, up: _Axis) -> list[Markup]:
    """Grid lines, tick labels and the names of both axes; the base's adherence as a line of its own."""
    foot, zero, parts = HIGH - BOTTOM, across.at(0.0), []
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(el("line", x1=LEFT, x2=WIDE - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(el("text", number(tick, up.form), x=LEFT - 8, y=y + 4, class_="tick last"))
    for tick in across.ticks():
        text = number(tick, "+" + across.form) if abs(tick) > 1e-9 else "0"
        parts.append(el("text", text, x=across.at(tick), y=foot + 18, class_="tick mid"))
    return [
        *parts,
        el("line", x1=zero, x2=zero, y1=TOP, y2=foot, class_="zero"),
        el("text", "base", x=zero, y=TOP - 4, class_="tick mid"),
        el("line", x1=LEFT, x2=WIDE - RIGHT, y1=foot, y2=foot, class_="axis"),
        el("text", "adherence: CLIP-T minus the base →", x=WIDE - RIGHT, y=HIGH - 6, class_="name last"),
        el("text", "identity ↑", x=LEFT + 6, y=TOP + 6, class_="name"),
    ]


def _checkpoints(rows: list[dict], dots: list[tuple[float, float]]) -> list[Markup]:
    """A dot and its step for each: hollow where it breaks a limit, ringed where it was chosen."""
    along = [(a + (c - a) * k / 9, b + (d - b) * k / 9) for (a, b), (c, d) in zip(dots, dots[1:]) for k in range(10)]
    marks, taken = [], [(x - 3, y - 3, x + 3, y + 3) for x, y in along] + [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for row, (x, y) in zip(rows, dots):
        chosen = " chosen" if row.get("chosen") else ""
        if chosen:
            marks.append(el("circle", cx=x, cy=y, r=10, class_="ring"))
        marks.append(el("circle", cx=x, cy=y, r=5.5, class_=f"step{chosen}{' hollow' * (not row['qualifies'])}"))
        state = str(row["step"]) + (f" × {row['strength']:g}" if row.get("strength", 1.0) != 1 else "")
        text = f"{state}, chosen" if chosen else state
        left, foot = _free_spot(x, y, 7.2 * len(text), taken, away=15 if chosen else 10)
        marks.append(el("text", text, x=left, y=foot, class_="label" + chosen))
    return marks


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
