"""Prompt templates with {token} and {class}, and the DreamBench prompt lists."""

import re
import string
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.untrusted import read_bytes

PLACEHOLDERS = ("token", "class")
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
