"""The terminal: parse, call, print. Nothing is computed here, and nothing heavy is imported before a command runs."""

import errno
import importlib.metadata
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperCommand

from personalize.cli import options as opt
from personalize.cli import tools
from personalize.common.errors import Interrupted, UserError
from personalize.common.prompts import read_prompts
from personalize.common.terminal import Terminal, printable

STOPPED = "stopped; every file that was written is whole, and the same command can be run again"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
        return _resolved(recipe, settings)
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
    prior_images: Annotated[
        Path | None, typer.Option("--prior-images", help="Folder of your own class images, in place of drawn ones.")
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="Go on with the run that is this one with fewer --steps.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Where a step's time goes, and a trace, into the run.")] = False,
    recipe: opt.RecipeFile = None, runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"), screen: Terminal,
    dry_run: opt.DryRun = False,
):  # fmt: skip
    """DreamBooth on a few photos. The same command goes on where it stopped."""
    settings = opt.settings_of(settings, {"train.methods": method, "class_word": class_word})
    if dry_run:
        return _resolved(recipe, settings)
    source = [*(photos or []), *([photos_option] if photos_option else [])]
    if not source:
        raise UserError("which photos? Give a folder of 3 to 5, as in: personalize train photos/ --class dog")
    if profile:  # torch reads it as it is imported; its profiler would say on stderr that it starts and stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from personalize.commands.train import train

    folders = {"runs": runs, "priors": priors, "prior_folder": prior_folder, "prior_images": prior_images}
    options = {"extend": extend, "profile": profile, "screen": screen}
    result = train(opt.one_or_all(source), recipe=recipe, settings=settings, **folders, **options)
    if os.environ.get("RANK", "0") == "0":
        return vars(result) | {"seconds": round(result.seconds, 1)}, result.folder


@app.command()
@opt.with_settings(
    "draw.count", "draw.steps", "draw.guidance", "draw.negative", "draw.sampler", "draw.size",
    "draw.like", "draw.guide_clip", "draw.guide_image", "draw.guide_every", "seed", "device", "dtype",
)  # fmt: skip
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; {token} and {class} are filled in.")] = None,
    *,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, a prompt a line.")] = None,
    settings: list[str],
    lora: opt.Loras = [], embedding: opt.Embeddings = [], weight: opt.Weights = [], ignore: opt.Ignored = [],
    image: opt.Image = None, mask: opt.Mask = None, strength: opt.Strength = None, careful: opt.Careful = 1,
    image_prompt: opt.ImagePrompt = "", image_scale: opt.ImageScale = None, adapter: opt.Adapter = None, maps: opt.Maps = False,
    unclip: opt.Unclip = False, vary: opt.Vary = [], was: opt.Was = None,
    layout: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON of boxes that say where what is to be.")] = None,
    upscale: Annotated[bool, typer.Option("--upscale", help="Twice as large, by the base's upscaler.")] = False,
    photos: Annotated[str, typer.Option(metavar="FOLDER", help="Whom --like means, for a bare base.")] = "",
    class_word: Annotated[str, typer.Option("--class", help="What is on these photos.")] = "",
    run: opt.Run = None, checkpoint: opt.Checkpoint = "", base: opt.Base = "", runs: opt.Runs = Path("runs"),
    fast: Annotated[bool, typer.Option("--fast", help="By the base's own student, in few steps.")] = False,
    priors: opt.Priors = Path("priors"),
    out: Annotated[Path | None, typer.Option(help="Folder.")] = None, screen: Terminal,
):  # fmt: skip
    """Images of the subject, by the newest finished run; with --base alone, by the bare base."""
    texts = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    texts = texts or [""] * bool(vary and was is None)
    if not texts:
        raise UserError('what to draw? Give a prompt, as in: personalize generate "a sks dog swimming"')
    from personalize.commands.generate import generate

    source = {"run": run, "base": base, "checkpoint": checkpoint, "loras": lora, "embeddings": embedding, "runs": runs}
    source |= {"photos": photos, "class_word": class_word, "priors": priors, "fast": fast}
    words = {"weights": weight, "ignore": ignore, "maps": maps, "layout": layout, "upscale": upscale}
    begin = {"image": image, "mask": mask, "strength": strength, "careful": careful}
    begin |= {"image_prompt": image_prompt, "image_scale": image_scale, "adapter": adapter}
    begin |= {"unclip": unclip, "vary": vary, "was": was}
    result = generate(texts, **source, **words, **begin, settings=settings, out=out, screen=screen)
    return vars(result), result.grid


@app.command()
@opt.with_settings("seed", "device", "dtype")
def evaluate(
    run: Annotated[list[str] | None, typer.Argument(help="Run folders; default: the newest finished one.")] = None,
    *,
    protocol: Annotated[str, typer.Option(help="quick, standard, toyland, or dreambench for a folder of subjects.")] = "",
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, a template a line.")] = None,
    token: Annotated[str, typer.Option(help="Which subject, of a run that has several.")] = "",
    image_prompt: opt.ImagePrompt = "", image_scale: opt.ImageScale = None, adapter: opt.Adapter = None,
    class_word: Annotated[str, typer.Option("--class", help="What is on the photos of --image-prompt.")] = "",
    photos: Annotated[bool, typer.Option("--photos/--no-photos", help="Show your photos in the report.")] = True,
    require: Annotated[list[str], typer.Option(metavar="NAME>=BOUND", help="What must be reached, or status 3.")] = [],
    checkpoint: opt.Checkpoint = "", base: opt.Base = "", recipe: opt.RecipeFile = None, settings: list[str],
    runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"), screen: Terminal,
):  # fmt: skip
    """Is it the same subject? Does it still listen? Is a dog still a dog? Several runs are compared."""
    sources = run or []
    settings = opt.settings_of(settings, {"evaluate.prompts": read_prompts(prompts_file) if prompts_file else []})
    if protocol == "dreambench":
        if len(sources) != 1:
            raise UserError("dreambench needs one folder of subjects, or hf:google/dreambooth.")
        if checkpoint or token or require:
            raise UserError("--checkpoint, --token and --require are about one run, and dreambench makes its own.")
        from personalize.commands.workflows import dreambench

        options = {"recipe": recipe, "settings": opt.settings_of(settings, {"base": base}), "photos": photos, "screen": screen}
        result = dreambench(sources[0], **options, runs=runs, priors=priors)
        return _compared(result)
    if recipe:
        raise UserError(
            f"--recipe {recipe} is for dreambench, which trains; a run has its own. Change single settings by --set."
        )
    settings = opt.settings_of(settings, {"evaluate.protocol": protocol})
    options = {"base": base, "checkpoint": checkpoint, "token": token, "photos": photos, "require": require}
    options |= {"settings": settings, "screen": screen}
    told = {"image_prompt": image_prompt, "class_word": class_word, "image_scale": image_scale, "adapter": adapter}
    if len(sources) > 1:
        if image_prompt:
            raise UserError("--image-prompt is evaluated with one run, or without any.")
        from personalize.commands.compare import compare

        return _compared(compare(sources, **options))
    from personalize.commands.evaluate import evaluate

    return _evaluated(evaluate(sources[0] if sources else None, **told, runs=runs, **options))


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
    """Runs a command. What a person can put right is one line, JSON with --json; other errors leave a traceback in a file."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not undo the work
        stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in sys.argv
    try:
        status = app(standalone_mode=not as_json)
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        _end("error", str(error), 2, as_json)
    except Interrupted as stop:
        _end("interrupted", str(stop), 130, as_json)
    except SystemExit as stop:
        if stop.code == 130:  # typer makes a silent one of Ctrl-C
            _end("interrupted", STOPPED, 130, as_json)
        _flush()
        raise
    except KeyboardInterrupt:
        _end("interrupted", STOPPED, 130, as_json)
    except Exception as error:
        if hasattr(error, "format_message"):  # of click: a wrong option, which it shows itself without --json
            _end("error", error.format_message(), 2, as_json)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and error.filename is None:
            _lost(error)
        if isinstance(error, OSError) and error.filename is not None:
            _end("error", f"{error.filename}: {error.strerror}. Check the name and its rights.", 2, as_json)
        _end("fault", f"{type(error).__name__}: {error}. Please report it with {_traceback_file()}", 1, as_json)


def _end(kind: str, message: str, status: int, as_json: bool) -> NoReturn:
    line = printable(message)
    if as_json:
        print(json.dumps({"error": {"kind": kind, "message": line}}, ensure_ascii=False))
    else:
        print(line if kind == "interrupted" else f"error: {line}", file=sys.stderr)
    _flush()
    sys.exit(status)


def _flush() -> None:
    """Now, where a full device or a closed pipe is one line; at the interpreter's end it would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _lost(error)


def _lost(error: OSError) -> NoReturn:
    """Ends where the result cannot be printed; a reader that has gone needs no word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        print(f"error: cannot write the result to stdout: {error.strerror}", file=sys.stderr)
    sys.exit(1)


def _traceback_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="personalize-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        traceback.print_exc(file=file)
    return Path(name)


def _version(asked: bool) -> None:
    if asked:
        print(f"personalize {importlib.metadata.version('personalize')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")] = False,
):
    """Teach a text-to-image model one subject from 3-5 photos, and measure that it learned it."""


def _resolved(recipe: Path | None, settings: list[str]) -> tuple[dict, str]:
    from personalize.commands.session import resolve
    from personalize.common.recipe import recipe_to_dict
    from personalize.common.recipe_text import recipe_to_toml

    resolved = resolve(recipe, settings)
    return recipe_to_dict(resolved), recipe_to_toml(resolved, comments=True).rstrip("\n")


def _evaluated(result) -> tuple[dict, str, int]:
    from personalize.evaluation.report.tables import bleed_lines

    text = "\n".join([*result.metrics["verdict"], *bleed_lines(result.metrics), *result.failed, str(result.report)])
    return vars(result), text, opt.REQUIRED if result.failed else 0


def _compared(result) -> tuple[dict, str]:
    return {"rows": result.rows, "file": result.file}, f"{result.text}\n{result.file}"
