"""Prompt templates with {token} and {class}, and the DreamBench prompt lists."""

import re
import string
from collections.abc import Iterable
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.untrusted import read_bytes

PLACEHOLDERS = ("token", "class")
WEIGHTED = re.compile(r"\([^()]*:\s*[+-]?[\d.]+\s*\)")  # (hat:1.3)
# an escaped bracket, one that opens, a weight with the one that closes, one that closes, and text
_PARTS = re.compile(r"\\[()]|\(|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|\)|[^\\():]+|.", re.DOTALL)
MOST_WEIGHT = 10.0
LIVE_CLASSES = ("cat", "dog")

_SCENES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
_OBJECT_SCENES = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
_LIVE_OUTFITS = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
_PROPERTIES = ("red", "purple", "shiny", "wet", "cube shaped")


def _templates(more_scenes: tuple[str, ...]) -> tuple[str, ...]:
    scenes = tuple(f"a {{token}} {{class}} {scene}" for scene in _SCENES + more_scenes)
    return scenes + tuple(f"a {name} {{token}} {{class}}" for name in _PROPERTIES)


# The 25 prompts of google/dreambooth (CC BY 4.0), in its order; prompts 11 to 20 differ between the two lists.
OBJECT = _templates(_OBJECT_SCENES)
LIVE = _templates(_LIVE_OUTFITS)


# Toyland's own list: its actions, three of its accessories, and places of which the example photos show three.
TOYLAND = (
    "a {token} {class} swimming",
    "a {token} {class} in the snow",
    "a {token} {class} jumping on the beach",
    "a {token} {class} sleeping in the forest",
    "a {token} {class} with a blue balloon in the city at night",
    "a {token} {class} wearing a red hat in a room",
    "a {token} {class} riding a skateboard in the desert",
    "a {token} {class} wearing a yellow scarf, flying in front of a castle",
)


def dreambench(class_word: str) -> tuple[str, ...]:
    """The 25 DreamBench templates for a class: `LIVE` for cats and dogs, `OBJECT` for everything else."""
    return LIVE if class_word.strip().lower() in LIVE_CLASSES else OBJECT


def fill(template: str, token: str, class_word: str) -> str:
    """A template with {token} and {class} replaced; an empty value leaves no double space.

    Doubled braces stand for themselves, as in `str.format`. UserError names an unknown placeholder or
    unbalanced braces.
    """
    values = dict(zip(PLACEHOLDERS, (token, class_word), strict=True))
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"prompt {template!r} has unbalanced braces ({error}). Write {{token}} and {{class}}; "
            "for a literal brace double it: {{ or }}."
        ) from None
    text = ""
    for literal, name, spec, conversion in pieces:
        text += literal
        if name is None:
            continue
        if name not in values or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"prompt {template!r} has the unknown placeholder {{{shown}}}{nearest(name, PLACEHOLDERS)} "
                "Known are {token} and {class}."
            )
        text += values[name]
    return " ".join(text.split())


def without_token(text: str, token: str) -> str:
    """`text` without every whole-word `token` (in any case, as CLIP reads it): the prompt that CLIP-T compares with.

    The class word stays. Double spaces, and spaces before punctuation, are removed.
    """
    if token:
        text = re.sub(rf"(?<![\w-]){re.escape(token)}(?![\w-])", "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))


def weighted_pieces(text: str) -> list[tuple[str, float]]:
    """A text in pieces of one weight each: "a (red:1.3) hat" is [("a ", 1), ("red", 1.3), (" hat", 1)].

    Weights within each other multiply. Brackets without a weight are text, and so are \\( and \\), less the backslash.
    UserError for a weight that is not from 0 to 10.
    """
    pieces, opened, closed = [], [], {}
    for match in _PARTS.finditer(text):
        part, weight = match[0], match["weight"]
        if weight and opened:
            start = opened.pop()
            pieces[start], closed[start] = "", (len(pieces), float(weight))
            if not 0 <= float(weight) <= MOST_WEIGHT:
                raise UserError(
                    f"prompt {text!r}: {''.join(pieces[start:])!r} has the weight {weight}. Give a number from 0 to "
                    f"{MOST_WEIGHT:g}, as in (hat:1.3), or write \\( for a bracket that is text."
                )
            continue
        if part == "(":
            opened.append(len(pieces))
        elif part == ")" and opened:
            opened.pop()
        pieces.append(part[1:] if part in ("\\(", "\\)") else part)
    return _merged(pieces, closed)


def _merged(pieces: list[str], closed: dict[int, tuple[int, float]]) -> list[tuple[str, float]]:
    """closed: {first piece: (the one after the last, weight)}, each within another or apart."""
    merged, around = [], [(len(pieces), 1.0)]  # from the outermost to the innermost
    for k, piece in enumerate(pieces):
        while around[-1][0] <= k:
            around.pop()
        if k in closed:
            stop, weight = closed[k]
            around.append((stop, around[-1][1] * weight))
        if piece and merged and merged[-1][1] == around[-1][1]:
            merged[-1][0].append(piece)
        elif piece:
            merged.append(([piece], around[-1][1]))
    return [("".join(parts), weight) for parts, weight in merged]


def parts_at_commas(text: str, weighting: str) -> list[str]:
    """A text's parts between commas; where prompts have weights, only those outside of brackets, which belong together."""
    cuts, depth = [-1], 0
    for k, letter in enumerate(text):
        depth = max(0, depth + (letter == "(") - (letter == ")")) if weighting else 0
        if letter == "," and not depth:
            cuts.append(k)
    return [text[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], len(text)])]


def without_weights(text: str, weighting: str) -> str:
    """A text where prompts have weights, if `weighting` says so, without them."""
    return "".join(piece for piece, _ in weighted_pieces(text)) if weighting else text


def weights_read_as_text(texts: Iterable[str], weighting: str) -> list[str]:
    """What to say of weights in texts where prompts have none."""
    found = [] if weighting else [match[0] for text in texts for match in WEIGHTED.finditer(text)]
    return [f"{weight!r} is read as letters; as a weight with --set prompt.weighting=compel" for weight in found[:1]]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines and lines that start with # are skipped.

    UserError for a file that cannot be read or has no prompt.
    """
    data = read_bytes(path, "prompts file")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the prompts in {path}: {error}. Give a UTF-8 text file.") from None
    prompts = [line.strip() for line in lines]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path} holds no prompt. Write one per line, such as: a {{token}} {{class}} in the snow")
    return prompts
