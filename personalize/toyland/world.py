"""Toyland: a small world with known truth. A seed gives a scene; a scene gives a picture, a caption and its truth.

Pretraining draws from seeds below HELD_OUT only; example and evaluation subjects and scenes from seeds at or above it.
"""

import colorsys
import random
from dataclasses import dataclass, replace

HELD_OUT = 1 << 32
PROBES = 1 << 31  # the first seed of the truth probes; the base and its encoders learn from seeds that count up from 0
CLASSES = ("dog", "cat", "duck", "teapot", "car", "robot")
PLACES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "city": "in the city at night",
    "mountains": "in the mountains",
    "desert": "in the desert",
    "room": "in a room",
    "meadow": "on a meadow",
}
ACTIONS = ("standing", "swimming", "jumping")
PATTERNS = ("plain", "spots", "stripes", "saddle", "belt", "belly")
EARS = ("floppy", "pointed", "round")
TAILS = ("up", "curled", "stub")
PROPORTIONS = {"length": (0.85, 1.15), "height": (0.85, 1.15), "legs": (0.75, 1.25), "head": (0.88, 1.14)}  # spans
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 70),
    "green": (60, 160, 75),
    "blue": (50, 95, 210),
    "purple": (135, 65, 175),
    "pink": (240, 140, 185),
    "brown": (125, 80, 45),
    "white": (240, 240, 238),
    "black": (45, 45, 50),
}
RARE_TOKENS = ("sks", "zwx", "pql", "vhk")
RARE_SHARE = 0.01
VIEWS = 3  # scenes of each subject that the identity encoder learns from

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """One individual: class and the identity that words cannot pin down. Proportions are factors around 1."""

    class_word: str
    body: Colour
    second: Colour
    pattern: str
    length: float
    height: float
    legs: float
    head: float
    ear: str
    tail: str


@dataclass(frozen=True)
class Scene:
    """A subject somewhere, doing something. x, y: shift in units of the picture; light: backdrop brightness factor."""

    subject: Subject
    place: str
    action: str
    hat: str | None
    x: float
    y: float
    scale: float
    light: float
    detail: int


def subject(seed: int, class_word: str | None = None) -> Subject:
    """The individual of this seed; `class_word` fixes its class."""
    r = random.Random(f"subject/{seed}")
    drawn_class = r.choice(CLASSES)
    body = _colour(r)
    second = _colour(r)
    while _distance(body, second) < 0.16:
        second = _colour(r)
    return Subject(
        class_word or drawn_class,
        body,
        second,
        r.choice(PATTERNS),
        **{name: r.uniform(*span) for name, span in PROPORTIONS.items()},
        ear=r.choice(EARS),
        tail=r.choice(TAILS),
    )


def scene(seed: int, *, who: Subject | None = None, place: str = "", action: str = "", hat: str | None = "any") -> Scene:
    """The scene of this seed. What is given stays fixed; the rest is drawn. hat: a colour word, None or "any"."""
    r = random.Random(f"scene/{seed}")
    drawn = Scene(
        subject=subject(seed),
        place=r.choice(tuple(PLACES)),
        action=r.choices(ACTIONS, (2, 1, 1))[0],
        hat=r.choice(tuple(COLOURS)) if r.random() < 0.25 else None,
        x=r.uniform(-0.06, 0.06),
        y=r.uniform(-0.02, 0.03),
        scale=r.uniform(0.88, 1.08),
        light=r.uniform(0.9, 1.06),
        detail=r.randrange(1 << 16),
    )
    return replace(
        drawn,
        subject=who or drawn.subject,
        place=place or drawn.place,
        action=action or drawn.action,
        hat=drawn.hat if hat == "any" else hat,
    )


def caption(of: Scene, seed: int) -> str:
    """One wording of what is to be seen; some say little, about 1 % carry a rare token without meaning."""
    r = random.Random(f"caption/{seed}")
    noun = of.subject.class_word
    if r.random() < 0.4:
        noun = f"{colour_word(of.subject.body)} {noun}"
    if r.random() < RARE_SHARE:
        noun = f"{r.choice(RARE_TOKENS)} {noun}"
    article = "an" if noun[0] in "aeiou" else "a"
    words = r.choices(("", "a photo of ", "a picture of "), (4, 1, 1))[0] + f"{article} {noun}"
    if r.random() < 0.08:
        return words
    if of.hat and r.random() < 0.9:
        words += f" wearing {'an' if of.hat[0] in 'aeiou' else 'a'} {of.hat} hat"
    if of.action != "standing" and r.random() < 0.9:
        words += f" {of.action}"
    elif of.action == "standing" and r.random() < 0.15:
        words += " standing"
    if r.random() < 0.85:
        words += f" {PLACES[of.place]}"
    return words


def colour_word(rgb: Colour) -> str:
    """The nearest of the ten colour words."""
    return min(COLOURS, key=lambda word: _distance(COLOURS[word], rgb))


def _distance(a: Colour, b: Colour) -> float:
    """Difference of two colours in opponent axes, where hue counts as much as lightness; 0 to about 1."""
    la, lb = (opponent(c) for c in (a, b))
    return sum((x - y) ** 2 for x, y in zip(la, lb)) ** 0.5


def opponent(c: Colour) -> tuple[float, float, float]:
    """Lightness, red against green, both against blue; for colours of 0 to 255."""
    red, green, blue = (v / 255 for v in c)
    return (0.6 * (red + green + blue) / 3, 0.8 * (red - green), 0.5 * (0.5 * (red + green) - blue))


def _colour(r: random.Random) -> Colour:
    if r.random() < 0.35:
        base = COLOURS[r.choice(("white", "black", "brown", "orange"))]
        return tuple(max(0, min(255, c + r.randint(-22, 22))) for c in base)
    rgb = colorsys.hsv_to_rgb(r.random(), r.uniform(0.45, 0.9), r.uniform(0.5, 0.95))
    return tuple(round(255 * c) for c in rgb)
