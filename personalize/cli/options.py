"""Options that several commands have, and how a command turns them into settings and its result into a line."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from personalize.common.recipe import METHODS, SETTINGS
from personalize.common.settings import meaning


def setting_option(key: str, *names: str, more: str = ""):
    """A shorter name for a setting: its help is the setting's own meaning, with its choices."""
    text = meaning(SETTINGS[key])
    return typer.Option(*names, help=f"{text[:1].upper()}{text[1:]}{more}.")


Method = StrEnum("Method", {name: name for name in METHODS})
Base = Annotated[str, setting_option("base")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file of settings.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.steps=400.")]
Seed = Annotated[int | None, setting_option("seed")]
Device = Annotated[str, setting_option("device")]
Dtype = Annotated[str, setting_option("dtype")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Run = Annotated[Path | None, typer.Option(help="Run folder; default: the newest finished one.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Priors = Annotated[Path, typer.Option(help="Folder of all sets of class images.")]
Checkpoint = Annotated[str, typer.Option(help="A checkpoint of the run, such as 200 or last, instead of its result.")]


def settings_of(texts: list[str], named: dict) -> list[str]:
    """--set texts, then the options that were given: an option is a shorter name of a setting."""
    shown = {key: json.dumps(value) if isinstance(value, list) else value for key, value in named.items() if value != []}
    return [*texts, *(f"{key}={value}" for key, value in shown.items() if value not in (None, ""))]


def show(values: dict, main_key: str, as_json: bool) -> None:
    print(json.dumps(values, default=str) if as_json else values[main_key])
