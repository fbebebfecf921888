"""What a subject is judged on: prompts, images of each, class images. The dev split shares no prompt with the rest."""

from dataclasses import dataclass

from personalize.common import prompts
from personalize.common.recipe_sections import Evaluate

# For choosing a checkpoint: none of these is in another list, so the final numbers come from prompts it did not see.
TOYLAND_DEV = (
    "a photo of a {token} {class} on the beach",
    "a {token} {class} jumping in the snow",
    "a {token} {class} wearing a green crown on a meadow",
    "a {token} {class} flying in the mountains",
    "a photo of a {token} {class} in a room",
    "a {token} {class} with a pink flag in the desert",
    "a {token} {class} swimming in the forest",
    "a {token} {class} sleeping in the city at night",
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
    """Prompt templates, images of each, and images of the class prompt."""

    name: str
    templates: tuple[str, ...]
    count: int
    class_count: int


def protocol(ask: Evaluate, has_world: bool, class_word: str) -> Protocol:
    """What the settings ask for; "" is toyland for Toyland and standard otherwise. Counts that are given win."""
    name = ask.protocol or ("toyland" if has_world else "standard")
    quick, own = name == "quick", name == "toyland" or (name == "quick" and has_world)
    listed = prompts.TOYLAND if own else prompts.dreambench(class_word)
    templates = listed[:: len(listed) // 8][:8] if quick else listed
    count, class_count = (2, 8) if quick else (4, 16)
    given = tuple(dict.fromkeys(ask.prompts))
    class_count = class_count if ask.class_count < 0 else ask.class_count
    return Protocol("own prompts" if given else name, given or templates, ask.count or count, class_count)


def dev_templates(given: tuple[str, ...], has_world: bool) -> tuple[str, ...]:
    """The prompts that checkpoints are chosen by."""
    return tuple(dict.fromkeys(given)) or (TOYLAND_DEV if has_world else DEV)
