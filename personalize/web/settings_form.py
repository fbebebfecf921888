"""The form of all settings, made from the recipe's fields: their meanings are its tooltips, their defaults its values."""

from pathlib import Path
from typing import get_args, get_origin

import gradio as gr

import personalize
from personalize.commands.session import resolve
from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS, flat_settings, load_recipe
from personalize.common.settings import Setting, Value, parse_value, to_toml_value, validated
from personalize.web.workspace import Workspace

ELSEWHERE = ("base", "class_word", "train.methods")  # which the page asks for above the form
RECIPES = Path(personalize.__file__).parents[1] / "recipes"  # of a checkout
KEYS = [key for key in SETTINGS if key not in ELSEWHERE]
SECTION_NAMES = {"": "Run", "prior": "Class images", "train": "Training", "lora": "LoRA", "draw": "Drawing"}


def recipes() -> list[str]:
    return [str(path.relative_to(RECIPES)) for path in sorted(RECIPES.rglob("*.toml"))]


def recipe_path(name: str) -> Path | None:
    """The file of a recipe of the list. UserError for another name."""
    if not name:
        return None
    if name not in recipes():
        raise UserError(f"there is no recipe {name!r}. Choose one from the list.")
    return RECIPES / name


def foundation(base: str, method: str) -> list[str]:
    """The settings above the form as texts of --set; what is left empty is the recipe's."""
    return [f"base={base}"] * bool(base) + [f"train.methods={method}"] * bool(method)


def defaults(base: str, method: str, recipe: str) -> dict:
    """The value of each setting where nothing in the form is changed."""
    return flat_settings(resolve(recipe_path(recipe), foundation(base, method)))


def shown(value) -> str | bool:
    """A setting's value as its field shows it; a number as text, which keeps each of its digits."""
    return value if isinstance(value, bool) else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fields() -> dict[str, gr.components.Component]:
    """A labelled field for each setting, in a fold for each section."""
    made, start = {}, defaults("toyland", "", "")
    for section in dict.fromkeys(key.rpartition(".")[0] for key in KEYS):
        with gr.Accordion(SECTION_NAMES.get(section, section.capitalize()), open=False), gr.Row(elem_classes="settings"):
            for key in KEYS:
                if key.rpartition(".")[0] == section:
                    made[key] = _field(SETTINGS[key], start[key])
    return made


def _field(s: Setting, value) -> gr.components.Component:
    options = {"label": s.key.rpartition(".")[2], "info": s.doc, "elem_id": element(s.key), "interactive": True}
    options |= {"value": shown(value), "min_width": 150}
    if s.kind is bool:
        return gr.Checkbox(**options)
    if s.choices and get_origin(s.kind) is not tuple:
        return gr.Dropdown([(str(c) or "—", c) for c in s.choices], **options)
    return gr.Textbox(**options, max_lines=1)


def element(key: str) -> str:
    return "set-" + key.replace(".", "-").replace("_", "-")


def changes(values: dict, start: dict) -> dict[str, Value]:
    """Fields' values, the defaults -> what differs, by key. UserError for what a setting cannot be."""
    found = {}
    for key, value in values.items():
        s = SETTINGS[key]
        if str(value) == str(shown(start[key])) or (s.kind is not str and not get_args(s.kind) and value in ("", None)):
            continue  # an emptied number is its default
        parsed = parse_value(value, s.kind) if isinstance(value, str) and s.kind is not str else value
        if (right := validated(s, parsed, "the form")) != start[key]:
            found[key] = right
    return found


def settings_of(space: Workspace, values: dict, head: tuple[str, str, str], bases: tuple[str, ...]) -> list[str]:
    """Texts of --set for what is chosen and changed. UserError for values that are not allowed, and for paths outside."""
    base, method, recipe = head
    changed = changes(values, defaults(*head))
    for value in (base, *changed.values()):
        for item in value if isinstance(value, tuple) else (value,):
            space.require_plain(str(item), bases)
    texts = foundation(base, method) + [f"{key}={to_toml_value(value)}" for key, value in changed.items()]
    load_recipe(recipe_path(recipe), texts)
    return texts
