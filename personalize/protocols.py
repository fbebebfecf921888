"""What a subject is judged on: prompts, pictures of each, class pictures. The dev split shares no prompt with the rest."""

from dataclasses import dataclass

from personalize import prompts
from personalize.config import Evaluate

# For choosing a checkpoint: none of these is in another list, so the final numbers come from prompts it did not see.
TOYLAND_DEV = (
    "a photo of a {token} {class} on the beach",
    "a {token} {class} jumping in the snow",
    "a {token} {class} on a meadow",
    "a {token} {class} in the mountains",
    "a photo of a {token} {class} in a room",
    "a {token} {class} jumping in the desert",
    "a {token} {class} swimming in the forest",
    "a {token} {class} swimming in the city at night",
)
DEV = (
    "a {token} {class} in a kitchen",
    "a {token} {class} on a boat",
    "a {token} {class} in a bathtub",
    "a {token} {class} in front of a library",
    "a photo of a {token} {class} at night",
    "a watercolor painting of a {token} {class}",
    "a {token} {class} in a supermarket",
    "a green {token} {class}",
)


@dataclass(frozen=True)
class Protocol:
    """Prompt templates, pictures of each, and pictures of the class prompt."""

    name: str
    templates: tuple[str, ...]
    count: int
    class_count: int


def protocol(ask: Evaluate, base: str, class_word: str) -> Protocol:
    """What the settings ask for; "" is toyland for Toyland and standard otherwise. Counts that are given win."""
    name = ask.protocol or ("toyland" if base == "toyland" else "standard")
    listed = prompts.TOYLAND if base == "toyland" or name == "toyland" else prompts.dreambench(class_word)
    if name == "quick":
        found = Protocol(name, listed[:: max(1, len(listed) // 8)][:8], 2, 8)
    elif name == "toyland":
        found = Protocol(name, listed, 4, 16)
    else:
        found = Protocol(name, prompts.dreambench(class_word), 4, 16)
    templates = tuple(dict.fromkeys(ask.prompts)) or found.templates
    class_count = found.class_count if ask.class_count < 0 else ask.class_count
    return Protocol("own prompts" if ask.prompts else name, templates, ask.count or found.count, class_count)


def dev_templates(given: tuple[str, ...], base: str) -> tuple[str, ...]:
    """The prompts that checkpoints are chosen by."""
    return tuple(dict.fromkeys(given)) or (TOYLAND_DEV if base == "toyland" else DEV)
