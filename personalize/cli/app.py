"""The terminal: parse, call, print. Nothing is computed here, and nothing heavy is imported before a command runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from personalize.cli import options as opt
from personalize.cli import tools
from personalize.common.errors import Interrupted, UserError
from personalize.common.prompts import read_prompts
from personalize.common.terminal import Terminal

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a text-to-image model one subject from 3-5 photos, and measure that it learned it.",
)


@app.command()
@opt.with_settings("prior.count", "base", "seed", "device", "dtype")
def prior(
    class_word: Annotated[str, typer.Argument(metavar="CLASS", help="What the subject is, such as dog.")],
    *,
    settings: list[str],
    out: Annotated[Path | None, typer.Option(help="Folder for them; default: one named by what decides them.")] = None,
    recipe: opt.RecipeFile = None, priors: opt.Priors = Path("priors"), screen: Terminal, dry_run: opt.DryRun = False,
):  # fmt: skip
    """Class images, drawn by the frozen base."""
    if dry_run:
        return _print_recipe(recipe, settings)
    from personalize.commands.prior import prior

    result = prior(class_word, recipe=recipe, settings=settings, root=priors, folder=out, screen=screen)
    return vars(result), result.folder


class TrainCommand(TyperCommand):
    """`personalize train`, which names `import-command` where it is given a flag of another trainer's script."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # of click, or of the copy of it that newer typers bring along
                from personalize.cli.import_command.scripts import refuse_flag

                refuse_flag(error.option_name)
            raise


@app.command(cls=TrainCommand)
@opt.with_settings("train.steps", "train.lr", "token", "train.init_from", "base", "seed", "device", "dtype")
def train(
    photos: Annotated[list[str] | None, typer.Argument(help="A folder, files, or hf:owner/name/config.")] = None,
    *,
    class_word: Annotated[
        list[str], typer.Option("--class", help="What the subject is, such as dog; once for each folder of several.")
    ] = [],
    method: opt.Methods = [],
    photos_option: Annotated[str, typer.Option("--photos", hidden=True)] = "",
    settings: list[str],
    prior_folder: Annotated[Path | None, typer.Option("--prior", help="Folder of class images.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Where a step's time goes, and a trace, into the run.")] = False,
    recipe: opt.RecipeFile = None, runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"), screen: Terminal,
    dry_run: opt.DryRun = False,
):  # fmt: skip
    """DreamBooth on a few photos. The same command goes on where it stopped."""
    settings = opt.settings_of(settings, {"train.methods": method, "class_word": class_word})
    if dry_run:
        return _print_recipe(recipe, settings)
    source = [*(photos or []), *([photos_option] if photos_option else [])]
    if not source:
        raise UserError("which photos? Give a folder of 3 to 5, as in: personalize train photos/ --class dog")
    if profile:  # torch reads it as it is imported; its profiler would say on stderr that it starts and stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from personalize.commands.train import train

    folders = {"runs": runs, "priors": priors, "prior_folder": prior_folder}
    result = train(opt.one_or_all(source), recipe=recipe, settings=settings, **folders, profile=profile, screen=screen)
    if os.environ.get("RANK", "0") == "0":
        return vars(result) | {"seconds": round(result.seconds, 1)}, result.folder


@app.command()
@opt.with_settings(
    "draw.count", "draw.steps", "draw.guidance", "draw.negative", "draw.sampler", "draw.size", "seed", "device", "dtype"
)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; {token} and {class} are filled in.")] = None,
    *,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, a prompt a line.")] = None,
    settings: list[str],
    lora: Annotated[
        list[str], typer.Option(metavar="FILE[:WEIGHT]", help="LoRA file of diffusers, PEFT or kohya. May be given again.")
    ] = [],
    embedding: Annotated[
        list[str], typer.Option(metavar="FILE[:WORD]", help="Embedding file; WORD in place of its own. May be given again.")
    ] = [],
    run: opt.Run = None, checkpoint: opt.Checkpoint = "", base: opt.Base = "", runs: opt.Runs = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Folder.")] = None, screen: Terminal,
):  # fmt: skip
    """Images of the subject, by the newest finished run; with --base alone, by the bare base."""
    texts = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not texts:
        raise UserError('what to draw? Give a prompt, as in: personalize generate "a sks dog swimming"')
    from personalize.commands.generate import generate

    source = {"run": run, "base": base, "checkpoint": checkpoint, "loras": lora, "embeddings": embedding, "runs": runs}
    result = generate(texts, **source, settings=settings, out=out, screen=screen)
    return vars(result), result.grid


@app.command()
@opt.with_settings("seed", "device", "dtype")
def evaluate(
    run: Annotated[list[str] | None, typer.Argument(help="Run folders; default: the newest finished one.")] = None,
    *,
    protocol: Annotated[str, typer.Option(help="quick, standard, toyland, or dreambench for a folder of subjects.")] = "",
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, a template a line.")] = None,
    token: Annotated[str, typer.Option(help="Which subject, of a run that has several.")] = "",
    photos: Annotated[bool, typer.Option("--photos/--no-photos", help="Show your photos in the report.")] = True,
    checkpoint: opt.Checkpoint = "", base: opt.Base = "", recipe: opt.RecipeFile = None, settings: list[str],
    runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"), screen: Terminal,
):  # fmt: skip
    """Is it the same subject? Does it still listen? Is a dog still a dog? Several runs are compared."""
    sources = run or []
    settings = opt.settings_of(settings, {"evaluate.prompts": read_prompts(prompts_file) if prompts_file else []})
    if protocol == "dreambench":
        if len(sources) != 1:
            raise UserError("dreambench needs one folder of subjects, or hf:google/dreambooth.")
        if checkpoint or token:
            raise UserError("--checkpoint and --token are about one run, and dreambench makes its own.")
        from personalize.commands.workflows import dreambench

        options = {"recipe": recipe, "settings": opt.settings_of(settings, {"base": base}), "photos": photos, "screen": screen}
        result = dreambench(sources[0], **options, runs=runs, priors=priors)
        return _compared(result)
    if recipe:
        raise UserError(
            f"--recipe {recipe} is for dreambench, which trains; a run has its own. Change single settings by --set."
        )
    settings = opt.settings_of(settings, {"evaluate.protocol": protocol})
    options = {"base": base, "checkpoint": checkpoint, "token": token, "photos": photos, "settings": settings, "screen": screen}
    if len(sources) > 1:
        from personalize.commands.compare import compare

        return _compared(compare(sources, **options))
    from personalize.commands.evaluate import evaluate

    return _evaluated(evaluate(sources[0] if sources else None, runs=runs, **options))


@app.command()
@opt.with_settings("base", "seed", "device", "dtype")
def quickstart(
    photos: Annotated[str, typer.Argument(help="Folder of photos.")] = "data_examples/dog",
    *,
    class_word: Annotated[str, typer.Option("--class", help="What the subject is.")] = "dog",
    recipe: opt.RecipeFile = None, settings: list[str], runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"),
    screen: Terminal,
):  # fmt: skip
    """prior, train, generate and evaluate in a row, on example photos."""
    from personalize.commands.workflows import quickstart

    options = {"recipe": recipe, "settings": settings, "runs": runs, "priors": priors, "screen": screen}
    return _evaluated(quickstart(photos, class_word=class_word, **options))


app.add_typer(tools.app)


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


def _print_recipe(recipe: Path | None, settings: list[str]) -> None:
    from personalize.commands.session import resolve
    from personalize.common.recipe import recipe_to_toml

    print(recipe_to_toml(resolve(recipe, settings), comments=True), end="")


def _evaluated(result) -> tuple[dict, str]:
    return vars(result), "\n".join([*result.metrics["verdict"], str(result.report)])


def _compared(result) -> tuple[dict, str]:
    return {"rows": result.rows, "file": result.file}, f"{result.text}\n{result.file}"
