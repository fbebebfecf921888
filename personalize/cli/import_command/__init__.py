"""Commands of other trainers -> recipes.

What people arrive with: `accelerate launch train_dreambooth.py …` of diffusers, its siblings, and PEFT's example. A
recipe that does the same work says what the script's own defaults are where ours differ; whatever has no counterpart
is told. Standard library only: the terminal imports this when it starts.
"""

import shlex
from dataclasses import dataclass, replace

from personalize.cli.import_command import convert, parse
from personalize.cli.import_command.draft import text_of
from personalize.common.recipe import Recipe, load_recipe, recipe_to_dict, recipe_to_toml


@dataclass(frozen=True)
class Imported:
    """A command as settings ("train.steps=400", for --set). photos, runs: "" where the command does not say.

    notices: what is different here; unknown: what has no counterpart and is left out. Both in plain words.
    """

    script: str
    photos: str
    class_word: str
    method: str
    settings: list[str]
    runs: str
    notices: list[str]
    unknown: list[str]


def recipe_from(command: str) -> Imported:
    """The command line of a training script of diffusers or PEFT, as it is pasted, `export` lines before it and all.

    UserError for another script, an unknown flag, a value that is no number or that a recipe does not allow.
    """
    draft = convert.convert_call(parse.parse_command(command))
    settings = [text_of(key, value) for key, value in draft.settings.items()]
    load_recipe(None, settings)  # refuses what no recipe may say
    return Imported(
        draft.call.script.title, draft.photos, ", ".join(draft.settings.get("class_word", ())), draft.method,
        settings, draft.call.text("output_dir"), draft.notices, draft.unknown,
    )  # fmt: skip


def toml(imported: Imported, *, start: Recipe | None = None, name: str = "recipe.toml") -> str:
    """The recipe as TOML; comments at its head say how to use it, as the file `name`, and what is different.

    start: what a recipe of this base and method starts from, so that the file says what differs from that; `foundation`
    gives the settings to resolve it with. Without it, the plain defaults.
    """
    start = start or Recipe()
    runs = f" --runs {_quoted(imported.runs)}" if imported.runs else ""
    lines = [f"From {imported.script}. Use:", f"personalize train {_quoted(imported.photos or 'PHOTOS')} --recipe {name}{runs}"]
    for title, notes in (("What differs:", imported.notices), ("What has no counterpart and is left out:", imported.unknown)):
        lines += ["", title, *(f"- {note}" for note in notes)] if notes else []
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    full = load_recipe(None, imported.settings, defaults=recipe_to_dict(start))
    # Base and method are what `start` was found by, so the file has to say them.
    bare = replace(start, base=Recipe().base, train=replace(start.train, methods=Recipe().train.methods))
    return head + "\n" + recipe_to_toml(full, only_differences_from=bare)


def foundation(imported: Imported) -> list[str]:
    """The settings that decide what a recipe starts from: base and method."""
    return [text for text in imported.settings if text.startswith(("base=", "train.methods="))]


def _quoted(word: str) -> str:
    """For a shell, variables still working."""
    return f'"{word}"' if "$" in word else shlex.quote(word)
