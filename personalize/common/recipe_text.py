"""A recipe as text: the TOML that gives it back, and the reference of all settings."""

from personalize.common.recipe import SECTIONS, SETTINGS, Recipe, flat_settings
from personalize.common.settings import meaning, to_toml_value


def recipe_to_toml(recipe: Recipe, only_differences_from: Recipe | None = None, *, comments: bool = False) -> str:
    """TOML that `load` turns into the same recipe; `only_differences_from` leaves out what that one has too."""
    same = {} if only_differences_from is None else flat_settings(only_differences_from)
    lines, current = [], ""
    for key, value in flat_settings(recipe).items():
        if key in same and same[key] == value:
            continue
        section, _, name = key.rpartition(".")
        if section != current:
            note = f"  # {SECTIONS[section].__doc__}" if comments else ""
            lines += [""] * bool(lines) + [f"[{section}]{note}"]
            current = section
        lines.append(f"{name} = {to_toml_value(value)}" + (f"  # {meaning(SETTINGS[key])}" if comments else ""))
    return "\n".join(lines) + "\n" if lines else ""


def settings_reference() -> str:
    """docs/settings.md: a Markdown table a section, of every setting, its default and its meaning."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m personalize.common.recipe_text > docs/settings.md` from the fields of the recipe.",
    ]
    for section, title in {"": Recipe.__doc__, **{name: kind.__doc__ for name, kind in SECTIONS.items()}}.items():
        lines += ["", f"## {section or 'recipe'}", "", title, "", "| setting | default | meaning |", "|---|---|---|"]
        settings = [s for s in SETTINGS.values() if s.key.rpartition(".")[0] == section]
        lines += [f"| `{s.key}` | `{to_toml_value(s.default)}` | {meaning(s)} |" for s in settings]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(settings_reference(), end="")
