"""Commands of other trainers, such as `accelerate launch train_dreambooth.py …` of diffusers, turned into recipes.

The recipe does the same work: it states the script's defaults where they differ from ours, and its comments name whatever
has no counterpart. Standard library only.
"""

import shlex
from dataclasses import dataclass, replace

from personalize.cli.import_command import convert, parse
from personalize.common.recipe import SETTINGS, Recipe, load_recipe, recipe_to_dict
from personalize.common.recipe_text import recipe_to_toml
from personalize.common.settings import Value, parse_value, to_toml_value


@dataclass(frozen=True)
class Imported:
    """A command as settings ("train.steps=400", for --set). photos and runs are "" where the command does not say them.

    notices: sentences on what is different here; unknown: on what has no counterpart and is left out.
    """

    script: str
    photos: str
    settings: list[str]
    runs: str
    notices: list[str]
    unknown: list[str]


def recipe_from(command: str) -> Imported:
    """The recipe of a pasted command line of a training script of diffusers or PEFT, with any `export` lines before it.

    UserError for another script, an unknown flag, and a value that is not a number or that a recipe does not allow.
    """
    draft = convert.convert_call(parse.parse_command(command))
    settings = [_text(key, value) for key, value in draft.settings.items()]
    load_recipe(None, settings)  # for its UserErrors
    runs = draft.call.text("output_dir")
    return Imported(draft.call.script.title, draft.photos, settings, runs, draft.notices, draft.unknown)


def toml(imported: Imported, *, start: Recipe | None = None, name: str = "recipe.toml") -> str:
    """The recipe as TOML; comments at its head say how to use it, as the file `name`, and what is different.

    The file states what differs from `start`, the defaults of its base and method (`foundation` gives the settings to
    resolve them with), else from the plain defaults.
    """
    start = start or Recipe()
    runs = f" --runs {_quoted(imported.runs)}" if imported.runs else ""
    lines = [f"From {imported.script}. Use:", f"personalize train {_quoted(imported.photos or 'PHOTOS')} --recipe {name}{runs}"]
    for title, notes in (("What differs:", imported.notices), ("What has no counterpart and is left out:", imported.unknown)):
        lines += ["", title, *(f"- {note}" for note in notes)] if notes else []
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    full = load_recipe(None, imported.settings, defaults=recipe_to_dict(start))
    # `start` depends on base and method, so the file has to state them.
    bare = replace(start, base=Recipe().base, train=replace(start.train, methods=Recipe().train.methods))
    return comments + "\n" + recipe_to_toml(full, only_differences_from=bare)


def foundation(imported: Imported) -> list[str]:
    """The settings that a recipe's defaults depend on: base and method."""
    return [text for text in imported.settings if text.startswith(("base=", "train.methods="))]


def _text(key: str, value: Value) -> str:
    """A setting as --set takes it: bare where that is parsed as the same value, else as TOML."""
    plain = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    kind = SETTINGS[key].kind
    reads_back = parse_value(plain, kind) == (list(value) if isinstance(value, tuple) else value)
    return f"{key}={plain if reads_back and plain == plain.strip() else to_toml_value(value)}"


def _quoted(word: str) -> str:
    """For a shell, variables still working."""
    return f'"{word}"' if "$" in word else shlex.quote(word)
