"""Toyland: a small world with known truth. A seed gives a scene; a scene gives an image, a caption and its truth.

Pretraining draws from seeds below HELD_OUT only; example and evaluation subjects and scenes from seeds at or above it.
"""

import colorsys
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

HELD_OUT = 1 << 32
PROBE_SEED = 1 << 31  # the first seed of the truth probes; the base and its encoders learn from seeds that count up from 0
ANIMALS = ("dog", "cat", "rabbit", "horse", "duck", "owl")
CLASSES = (*ANIMALS, "teapot", "car", "boat", "robot", "backpack", "clock")
PLACES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "city": "in the city at night",
    "mountains": "in the mountains",
    "desert": "in the desert",
    "room": "in a room",
    "meadow": "on a meadow",
    "moon": "on the moon",
    "kitchen": "in a kitchen",
    "castle": "in front of a castle",
    "cave": "in a cave",
}
ACTIONS = {
    "standing": "standing",
    "swimming": "swimming",
    "jumping": "jumping",
    "sleeping": "sleeping",
    "flying": "flying",
    "riding": "riding a skateboard",
}
ACCESSORIES = {  # %s: its colour word with article, "a red"; glasses need none
    "hat": "wearing %s hat",
    "crown": "wearing %s crown",
    "glasses": "wearing %s glasses",
    "scarf": "wearing %s scarf",
    "balloon": "with %s balloon",
    "flag": "with %s flag",
}
PATTERNS = ("plain", "spots", "stripes", "saddle", "belt", "belly")
EARS = ("floppy", "pointed", "round")  # of a thing: its sail, knob, roof, antenna, handle or bells
TAILS = ("up", "curled", "stub")  # of a thing: its handle, arms, strap, stern or hands
PART_NAMES = {  # class -> what shows the second colour, the detail colour, the kind of ear and of tail
    "dog": ("ears", "feet and tail", "ears", "tail"),
    "cat": ("ears", "feet and tip of the tail", "ears", "tail"),
    "rabbit": ("ears", "feet and tail", "ears", "tail"),
    "horse": ("mane and tail", "feet", "mane", "tail"),
    "duck": ("wing", "tail", "crest", "tail"),
    "owl": ("rings around the eyes", "wings and tufts", "tufts", "wings"),
    "teapot": ("lid", "handle, knob and foot", "knob", "handle"),
    "car": ("wheels", "sill", "roof", "rear"),
    "boat": ("sail", "rail and keel", "sail", "stern"),
    "robot": ("screen and antennas", "arms and feet", "antennas", "arms"),
    "backpack": ("flap", "pocket and straps", "loop", "side"),
    "clock": ("rim", "bells and feet", "bells", "hands"),
}
PROPORTIONS = {"length": (0.82, 1.18), "height": (0.82, 1.18), "legs": (0.65, 1.35), "head": (0.82, 1.18)}  # spans
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
VIEWS = 3  # scenes of each subject that the identity encoder learns from

STANDING_SHARE = 1 / 3  # of scenes; the other actions share the rest equally
ACCESSORY_SHARE = 0.6
RIGHT_SHARE = 0.85  # of scenes that face right: free facing costs a small model sharpness
MIN_COLOUR_DISTANCE = 0.16  # least distance of a subject's three colours

EMPTY_SHARE = 0.05  # of captions
SHORT_SHARE = 0.04  # no more than what it is
COLOUR_SHARE = 0.5
RARE_SHARE = 0.01
ACCESSORY_MENTION = 0.99  # of the longer ones, so that it is 0.9 of all
ACTION_MENTION = 0.99
STANDING_MENTION = 0.15
PLACE_MENTION = 0.85
INVERTED_SHARE = 0.15  # "on the moon, a sleeping robot"

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """One individual: class and the identity that words cannot pin down. Proportions are factors around 1."""

    class_word: str
    body: Colour
    second: Colour
    detail: Colour
    pattern: str
    length: float
    height: float
    legs: float
    head: float
    ear: str
    tail: str


class Accessory(NamedTuple):
    kind: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A subject somewhere, doing something. x, y: shift in units of the image; light: backdrop brightness factor."""

    subject: Subject
    place: str
    action: str
    accessory: Accessory | None
    facing: str
    x: float
    y: float
    scale: float
    light: float
    detail: int


def sample_subject(seed: int, class_word: str | None = None) -> Subject:
    """The individual of this seed; `class_word` fixes its class."""
    r = random.Random(f"subject/{seed}")
    random_class = r.choice(CLASSES)
    colours: list[Colour] = []
    while len(colours) < 3:
        colour = sample_colour(r)
        if all(distance(colour, other) >= MIN_COLOUR_DISTANCE for other in colours):
            colours.append(colour)
    return Subject(
        class_word or random_class,
        *colours,
        r.choice(PATTERNS),
        **{name: r.uniform(*span) for name, span in PROPORTIONS.items()},
        ear=r.choice(EARS),
        tail=r.choice(TAILS),
    )


def sample_scene(
    seed: int,
    *,
    subject: Subject | None = None,
    place: str = "",
    action: str = "",
    accessory: Accessory | tuple[str, str] | str | None = "any",
    facing: str = "",
) -> Scene:
    """The scene of this seed. What is given stays fixed; the rest is drawn. accessory: kind and colour, None or "any"."""
    r = random.Random(f"scene/{seed}")
    other_weight = (1 - STANDING_SHARE) / (len(ACTIONS) - 1)
    random_accessory = Accessory(r.choice(tuple(ACCESSORIES)), r.choice(tuple(COLOURS)))
    random_scene = Scene(
        subject=sample_subject(seed),
        place=r.choice(tuple(PLACES)),
        action=r.choices(tuple(ACTIONS), [STANDING_SHARE if a == "standing" else other_weight for a in ACTIONS])[0],
        accessory=random_accessory if r.random() < ACCESSORY_SHARE else None,
        facing="right" if r.random() < RIGHT_SHARE else "left",
        x=r.uniform(-0.06, 0.06),
        y=r.uniform(-0.015, 0.03),
        scale=r.uniform(0.98, 1.2),
        light=r.uniform(0.93, 1.05),
        detail=r.randrange(1 << 16),
    )
    return replace(
        random_scene,
        subject=subject or random_scene.subject,
        place=place or random_scene.place,
        action=action or random_scene.action,
        accessory=random_scene.accessory if accessory == "any" else accessory and Accessory(*accessory),
        facing=facing or random_scene.facing,
    )


def caption(scene: Scene, seed: int) -> str:
    """One wording of what is to be seen; some say little or nothing, about 1 % carry a rare token without meaning."""
    r = random.Random(f"caption/{seed}")
    length = r.random()
    if length < EMPTY_SHARE:
        return ""
    noun = scene.subject.class_word
    if r.random() < COLOUR_SHARE / (1 - EMPTY_SHARE):
        noun = f"{colour_word(scene.subject.body)} {noun}"
    if r.random() < RARE_SHARE / (1 - EMPTY_SHARE):
        noun = f"{r.choice(RARE_TOKENS)} {noun}"
    opening = r.choices(("", "a photo of ", "a picture of "), (4, 1, 1))[0]
    if length < EMPTY_SHARE + SHORT_SHARE:
        return opening + with_article(noun)
    return _long_caption(scene, noun, opening, r)


def _long_caption(scene: Scene, noun: str, opening: str, r: random.Random) -> str:
    inverted = r.random() < INVERTED_SHARE
    accessory = accessory_words(scene.accessory) if scene.accessory and r.random() < ACCESSORY_MENTION else ""
    action = ACTIONS[scene.action] if r.random() < (STANDING_MENTION if scene.action == "standing" else ACTION_MENTION) else ""
    place = PLACES[scene.place] if r.random() < PLACE_MENTION else ""
    if inverted and place:
        if action and action == scene.action and r.random() < 0.5:
            noun, action = f"{action} {noun}", ""
        return ", ".join(part for part in (place, " ".join(filter(None, (with_article(noun), accessory))), action) if part)
    rest = [accessory, action] if r.random() < 0.7 else [action, accessory]
    comma = "," if all(rest) and rest[0] == accessory and r.random() < 0.5 else ""
    return " ".join(part for part in (opening + with_article(noun), rest[0] + comma, rest[1], place) if part)


def accessory_words(accessory: Accessory) -> str:
    """ "wearing a red hat", "with an orange balloon", "wearing blue glasses"."""
    return ACCESSORIES[accessory.kind] % (accessory.colour if accessory.kind == "glasses" else with_article(accessory.colour))


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def colour_word(rgb: Colour) -> str:
    """The nearest of the ten colour words."""
    return min(COLOURS, key=lambda word: distance(COLOURS[word], rgb))


def distance(a: Colour, b: Colour) -> float:
    """Difference of two colours in opponent axes, where hue counts as much as lightness; 0 to about 1."""
    la, lb = (opponent(c) for c in (a, b))
    return sum((x - y) ** 2 for x, y in zip(la, lb)) ** 0.5


def opponent(colour: Colour) -> tuple[float, float, float]:
    """Lightness, red against green, both against blue; for colours of 0 to 255."""
    red, green, blue = (v / 255 for v in colour)
    return (0.6 * (red + green + blue) / 3, 0.8 * (red - green), 0.5 * (0.5 * (red + green) - blue))


def sample_colour(r: random.Random) -> Colour:
    if r.random() < 0.35:
        base = COLOURS[r.choice(("white", "black", "brown", "orange"))]
        return tuple(max(0, min(255, c + r.randint(-22, 22))) for c in base)
    rgb = colorsys.hsv_to_rgb(r.random(), r.uniform(0.45, 0.9), r.uniform(0.5, 0.95))
    return tuple(round(255 * c) for c in rgb)
