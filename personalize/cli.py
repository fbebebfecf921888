"""The terminal: parse, call, print. Nothing is computed here, and nothing heavy is imported before a command runs."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from personalize.errors import Interrupted, UserError
from personalize.terminal import Terminal

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a text-to-image model one subject from 3-5 photos, and measure that it learned it.",
)


class Method(StrEnum):
    """Rows of the methods table."""

    full = "full"
    lora = "lora"


Base = Annotated[str, typer.Option(help="toyland, a hub id, or a diffusers folder.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file of settings.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.steps=400.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Run = Annotated[Path | None, typer.Option(help="Run folder; default: the newest finished one.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Priors = Annotated[Path, typer.Option(help="Folder of all sets of class pictures.")]
Checkpoint = Annotated[str, typer.Option(help="A checkpoint of the run, such as 200, instead of its result.")]


@app.command()
def prior(
    class_word: Annotated[str, typer.Argument(metavar="CLASS", help="What the subject is, such as dog.")],
    count: Annotated[int | None, typer.Option(help="How many pictures.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for them; default: one named by what decides them.")] = None,
    base: Base = "", recipe: RecipeFile = None, set_: Set = [], seed: Seed = None, device: Device = "", dtype: Dtype = "",
    priors: Priors = Path("priors"), quiet: Quiet = False, as_json: Json = False, dry_run: DryRun = False,
):  # fmt: skip
    """Class pictures, drawn by the frozen base."""
    settings = _settings(set_, {"prior.count": count, "base": base, "seed": seed, "device": device, "dtype": dtype})
    if dry_run:
        return _print_recipe(recipe, [*settings, f"class_word={class_word}"])
    from personalize import api

    screen = Terminal(quiet=quiet or as_json)
    result = api.prior(class_word, recipe=recipe, settings=settings, root=priors, folder=out, screen=screen)
    _result({"folder": result.folder, "drawn": result.drawn, "count": result.count}, "folder", as_json)


@app.command()
def train(
    photos: Annotated[list[str] | None, typer.Argument(help="A folder, files, or hf:owner/name/config.")] = None,
    class_word: Annotated[str, typer.Option("--class", help="What the subject is, such as dog.")] = "",
    method: Annotated[Method | None, typer.Option(help="Which parameters train.")] = None,
    photos_option: Annotated[str, typer.Option("--photos", hidden=True)] = "",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    token: Annotated[str, typer.Option(help="Rare word for the subject.")] = "",
    prior_folder: Annotated[Path | None, typer.Option("--prior", help="Folder of class pictures.")] = None,
    base: Base = "", recipe: RecipeFile = None, set_: Set = [], seed: Seed = None, device: Device = "", dtype: Dtype = "",
    runs: Runs = Path("runs"), priors: Priors = Path("priors"),
    quiet: Quiet = False, as_json: Json = False, dry_run: DryRun = False,
):  # fmt: skip
    """DreamBooth on a few photos. The same command goes on where it stopped."""
    named = {"train.steps": steps, "train.lr": lr, "token": token, "base": base, "seed": seed, "device": device}
    settings = _settings(set_, named | {"dtype": dtype, "train.methods": method.value if method else ""})
    if dry_run:
        return _print_recipe(recipe, settings + ([f"class_word={class_word}"] if class_word else []))
    source = [*(photos or []), *([photos_option] if photos_option else [])]
    if not source:
        raise UserError("which photos? Give a folder of 3 to 5, as in: personalize train photos/ --class dog")
    from personalize import api

    result = api.train(
        source[0] if len(source) == 1 else source, class_word=class_word, recipe=recipe, settings=settings, runs=runs,
        priors=priors, prior_folder=prior_folder, screen=Terminal(quiet=quiet or as_json),
    )  # fmt: skip
    _result({"folder": result.folder, "steps": result.steps, "seconds": round(result.seconds, 1)}, "folder", as_json)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; {token} and {class} are filled in.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, a prompt a line.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures of each prompt.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is plain.")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    sampler: Annotated[str, typer.Option(help="dpm++2m, ddim, ddpm, euler, euler-a, heun, unipc, pndm, lcm.")] = "",
    size: Annotated[int | None, typer.Option(help="Edge, px.")] = None,
    run: Run = None, checkpoint: Checkpoint = "", base: Base = "", set_: Set = [], seed: Seed = None, device: Device = "",
    dtype: Dtype = "", runs: Runs = Path("runs"), out: Annotated[Path | None, typer.Option(help="Folder.")] = None,
    quiet: Quiet = False, as_json: Json = False,
):  # fmt: skip
    """Pictures of the subject, by the newest finished run; with --base alone, by the bare base."""
    from personalize import api
    from personalize.prompts import read_prompts

    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise UserError('what to draw? Give a prompt, as in: personalize generate "a sks dog swimming"')
    named = {"draw.count": count, "draw.steps": steps, "draw.guidance": guidance, "draw.negative": negative}
    named |= {"draw.sampler": sampler, "draw.size": size, "seed": seed, "device": device, "dtype": dtype}
    result = api.generate(
        wanted, run=run, base=base, checkpoint=checkpoint, settings=_settings(set_, named), runs=runs, out=out,
        screen=Terminal(quiet=quiet or as_json),
    )  # fmt: skip
    _result({"grid": result.grid, "files": result.files}, "grid", as_json)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest finished one.")] = None,
    checkpoint: Checkpoint = "", base: Base = "", set_: Set = [], seed: Seed = None, device: Device = "", dtype: Dtype = "",
    runs: Runs = Path("runs"), quiet: Quiet = False, as_json: Json = False,
):  # fmt: skip
    """Is it the same subject? Does it still listen? Is a dog still a dog?"""
    from personalize import api

    settings = _settings(set_, {"seed": seed, "device": device, "dtype": dtype})
    screen = Terminal(quiet=quiet or as_json)
    result = api.evaluate(run, base=base, checkpoint=checkpoint, settings=settings, runs=runs, screen=screen)
    _evaluated(result, as_json)


@app.command()
def quickstart(
    photos: Annotated[str, typer.Argument(help="Folder of photos.")] = "data_examples/dog",
    class_word: Annotated[str, typer.Option("--class", help="What the subject is.")] = "dog",
    base: Base = "", recipe: RecipeFile = None, set_: Set = [], seed: Seed = None, device: Device = "", dtype: Dtype = "",
    runs: Runs = Path("runs"), priors: Priors = Path("priors"), quiet: Quiet = False, as_json: Json = False,
):  # fmt: skip
    """prior, train, generate and evaluate in a row, on example photos."""
    from personalize import api

    settings = _settings(set_, {"base": base, "seed": seed, "device": device, "dtype": dtype})
    result = api.quickstart(
        photos, class_word=class_word, recipe=recipe, settings=settings, runs=runs, priors=priors,
        screen=Terminal(quiet=quiet or as_json),
    )  # fmt: skip
    _evaluated(result, as_json)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Folder for the base.")],
    work: Annotated[Path, typer.Option(help="Folder for stages; a stopped one goes on.")] = Path("pretraining"),
    set_: Set = [],
    quiet: Quiet = False,
):
    """Make Toyland's weights from nothing (hours on 2 cores)."""
    from personalize.commands import pretrain as command

    command.run(work, out, command.settings_from(set_), say=Terminal(quiet=quiet).say)
    print(out)


def main() -> None:
    """Runs a command; errors that a person can put right have no traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # typer makes a silent 130 of Ctrl-C
            raise
        print("stopped; every file that was written is whole, and the same command can be run again", file=sys.stderr)
        sys.exit(130)


def _settings(texts: list[str], named: dict) -> list[str]:
    """--set texts, then the options that were given: an option is a shorter name of a setting."""
    return [*texts, *(f"{key}={value}" for key, value in named.items() if value not in (None, ""))]


def _print_recipe(recipe: Path | None, settings: list[str]) -> None:
    from personalize import api, config

    print(config.to_toml(api.resolve(recipe, settings), comments=True), end="")


def _evaluated(result, as_json: bool) -> None:
    from personalize.commands.evaluate import verdict

    if not as_json:
        for line in verdict(result.scores, result.scores["class_word"]):
            print(line)
    _result({"scores": result.scores, "sheet": result.sheet}, "sheet", as_json)


def _result(values: dict, main_key: str, as_json: bool) -> None:
    print(json.dumps(values, default=str) if as_json else values[main_key])


if __name__ == "__main__":
    main()
