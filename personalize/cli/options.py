"""Options that several commands have, and how a command turns them into settings and its result into a line."""

import functools
import inspect
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_origin

import typer

from personalize.common.recipe import SETTINGS
from personalize.common.recipe_sections import METHODS
from personalize.common.settings import Edges, meaning
from personalize.common.terminal import Terminal, printable

REQUIRED = 3  # status where what an evaluation requires, or what `verify` compares, does not hold


def setting_option(key: str, *, more: str = ""):
    """A shorter name for a setting: its help is the setting's own meaning, with its choices."""
    text = meaning(SETTINGS[key])
    return typer.Option(help=f"{text[:1].upper()}{text[1:]}{more}.")


Method = StrEnum("Method", {name: name for name in METHODS})
Methods = Annotated[list[Method], setting_option("train.methods", more="; may be given twice")]
Base = Annotated[str, setting_option("base")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file of settings.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.steps=400.")]
Device = Annotated[str, setting_option("device")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Run = Annotated[Path | None, typer.Option(help="Run folder; default: the newest finished one.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Priors = Annotated[Path, typer.Option(help="Folder of all sets of class images.")]
Checkpoint = Annotated[str, typer.Option(help="A checkpoint of the run, such as 200 or last, instead of its result.")]
Image = Annotated[Path | None, typer.Option(metavar="FILE", help="Image to begin with; its middle is drawn anew.")]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="FILE|word:WORD", help="White where --image is painted, or a word of the prompt that it shows there."),
]
Strength = Annotated[
    float | None, typer.Option(help="How much of --image changes, 0 to 1; default: 0.6, and 1 with a mask.", show_default=False)
]
Careful = Annotated[int, typer.Option(help="How often each step is made with --mask: better fit, as many times the time.")]

Loras = Annotated[
    list[str], typer.Option(metavar="FILE[:WEIGHT]", help="LoRA, LoKr or LoHa file of any program. May be given again.")
]
Embeddings = Annotated[
    list[str], typer.Option(metavar="FILE[:WORD]", help="Embedding file; WORD in place of its own. May be given again.")
]
Weights = Annotated[
    list[str],
    typer.Option(
        metavar="WORD=NUMBER",
        help="How much the image attends to a word of the prompt; 1 is as ever. With prompt.weighting=compel (red:1.3) in a "
        "prompt scales what the text encoder says of a word instead: one or the other for a word. May be given again.",
    ),
]
Ignored = Annotated[list[str], typer.Option(metavar="WORDS", help="Words of the prompt that do not count. May be given again.")]
ImagePrompt = Annotated[
    str, typer.Option(metavar="PHOTOS", help="A photo or a folder: what they show is told beside the prompt, without training.")
]
ImageScale = Annotated[
    float | None,
    typer.Option(help="How much --image-prompt counts: 0 not at all, 1 as trained; default: 0.7.", show_default=False),
]
Adapter = Annotated[Path | None, typer.Option(metavar="FILE", help="IP-Adapter for --image-prompt, where the base has none.")]
Unclip = Annotated[
    bool, typer.Option("--unclip", help="From a CLIP image embedding that the base's prior draws of the prompt (DALL·E 2).")
]
Vary = Annotated[
    list[str],
    typer.Option(metavar="PHOTO", help="Variations of a photo, from its CLIP embedding; given twice: what lies between two."),
]
Was = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What --vary shows now: the photo changes from that to the prompt.")
]

Maps = Annotated[bool, typer.Option("--maps", help="A sheet beside each image: where it attends to each word.")]


def with_settings(*keys: str) -> Callable[[Callable], Callable]:
    """Gives a command its `settings`, of --set and an option for each of these keys, and its `screen`, of --quiet and --json.

    An option has the last word of its key for a name: --steps is train.steps. The command returns what --json prints, what
    is printed without it, and an exit status other than 0; or nothing, where there is nothing to print.
    """
    names = {key.rpartition(".")[2]: key for key in keys}

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(*, set_: list[str], quiet: bool, as_json: bool, **values) -> None:
            settings = settings_of(set_, {key: values.pop(name) for name, key in names.items()})
            if result := command(settings=settings, screen=Terminal(quiet=quiet or as_json), **values):
                values, text, *status = result
                print(json.dumps(values, default=str) if as_json else "\n".join(map(printable, str(text).split("\n"))))
                raise typer.Exit(*status)

        screen = [_option("quiet", Quiet, False), _option("as_json", Json, False)]
        options = {"settings": [*map(_setting, keys), _option("set_", Set, [])], "screen": screen}
        parameters = inspect.signature(command).parameters.items()
        every = [option for name, p in parameters for option in options.get(name, [p.replace(kind=p.KEYWORD_ONLY)])]
        run.__signature__ = inspect.Signature(every)  # which typer reads
        return run

    return decorate


def _setting(key: str) -> inspect.Parameter:
    """The option of a setting; its default says that it was not given."""
    kind, default = SETTINGS[key].kind | None, None
    if get_origin(SETTINGS[key].kind) is tuple:
        kind, default = list[str], []
    if SETTINGS[key].kind == Edges:  # typer reads no union
        kind = str | None
    return _option(key.rpartition(".")[2], Annotated[kind, setting_option(key)], default)


def _option(name: str, annotation, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def settings_of(texts: list[str], named: dict) -> list[str]:
    """Texts as of --set, then the options that were given: an option is a shorter name of a setting."""
    given = {key: value for key, value in named.items() if value not in (None, "", [])}
    return [*texts, *(f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in given.items())]


def one_or_all(sources: list[str]) -> str | list[str]:
    """A folder or file alone, several as a list."""
    return sources[0] if len(sources) == 1 else sources
