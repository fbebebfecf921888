"""The four jobs as functions. The commands of the terminal are thin callers of these.

`recipe` is a TOML file, `settings` are texts such as "train.steps=400"; both are checked as in the terminal.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from personalize import config, rundir
from personalize.config import Recipe
from personalize.errors import UserError
from personalize.terminal import SILENT, Terminal

RUNS, PRIORS = Path("runs"), Path("priors")
TOYLAND_RECIPE = Path(__file__).parent / "toyland" / "recipe.toml"


def resolve(recipe: Path | str | None = None, settings: Sequence[str] = ()) -> Recipe:
    """The whole recipe: the base's defaults, then the file, then the settings."""
    path = Path(recipe) if recipe else None
    if config.load(path, settings).base != "toyland":
        return config.load(path, settings)
    return config.load(path, settings, defaults=config.read_toml(TOYLAND_RECIPE))


def prior(
    class_word: str,
    *,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    root: Path = PRIORS,
    folder: Path | None = None,
    screen: Terminal = SILENT,
):
    """Class pictures by the frozen base -> PriorResult(folder, drawn, count)."""
    from personalize.commands import prior as command

    full = resolve(recipe, [*settings, f"class_word={class_word}"])
    return command.run(_model(full, screen), full, root=Path(root), folder=folder, screen=screen)


def train(
    photos: Path | str | Sequence[str],
    *,
    class_word: str,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    prior_folder: Path | None = None,
    screen: Terminal = SILENT,
):
    """Train on photos, drawing class pictures that are missing -> TrainResult(folder, steps, seconds)."""
    from personalize.commands import prior as prior_command
    from personalize.commands import train as command

    full = resolve(recipe, [*settings, f"class_word={class_word}"] if class_word else settings)
    if not full.class_word:
        raise UserError("what is the subject? Give its class, as in: personalize train PHOTOS --class dog")
    model = _model(full, screen)
    folder = None
    if full.prior.count and full.train.prior_weight:
        command.check(model, photos, full)  # before the class pictures, which take longer
        folder = prior_command.run(model, full, root=Path(priors), folder=prior_folder, screen=screen).folder
    return command.run(model, photos, full, prior=folder, runs=Path(runs), screen=screen)


def generate(
    prompts: Sequence[str],
    *,
    run: Path | str | None = None,
    base: str = "",
    checkpoint: str = "",
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    out: Path | None = None,
    screen: Terminal = SILENT,
):
    """Pictures of prompts by a run (the newest finished one), or by a bare base -> GenerateResult(files, grid).

    {token} and {class} in a prompt are filled in with the run's.
    """
    from personalize.commands import generate as command
    from personalize.prompts import fill

    folder = Path(run) if run else None if base else rundir.newest_run(Path(runs))
    if folder is None:
        full = resolve(None, [*settings, f"base={base}"])
        model, name, token, word = _model(full, screen), "", "", ""
        out = out or Path("images")
    else:
        model, full, manifest = _opened(folder, base, settings, screen, say=not run)
        from personalize import trained

        name = trained.put_into(model, folder, manifest, at=checkpoint)
        token, word = manifest["token"], manifest["class"]
        out = out or folder / "images"
    if folder is None and any("{" in prompt for prompt in prompts):
        raise UserError("{token} and {class} stand for a run's: name one with --run, or write the words out.")
    filled = [fill(prompt, token, word) for prompt in prompts] if folder else list(prompts)
    if folder and not any(token in prompt.split() for prompt in filled):
        screen.say(f"no prompt says {token!r}, the word for the subject: these pictures show any {word}.")
    origin = {"run": str(folder or ""), "checkpoint": name}
    return command.run(model, filled, full.draw, seed=full.seed, out=Path(out), origin=origin, screen=screen)


def evaluate(
    run: Path | str | None = None,
    *,
    base: str = "",
    checkpoint: str = "",
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
):
    """Scores of a run (the newest finished one), and its contact sheet -> EvaluateResult(scores, sheet)."""
    from personalize import prompts
    from personalize.commands import evaluate as command

    folder = Path(run) if run else rundir.newest_run(Path(runs))
    model, full, manifest = _opened(folder, base, settings, screen, say=not run)
    own = prompts.TOYLAND if model.name == "toyland" else prompts.dreambench(manifest["class"])
    return command.run(model, folder, full, at=checkpoint, templates=full.evaluate.prompts or own, screen=screen)


def quickstart(
    photos: Path | str = "data_examples/dog",
    *,
    class_word: str = "dog",
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    screen: Terminal = SILENT,
):
    """prior and train, generate, evaluate in a row -> EvaluateResult. Without example photos, Toyland draws them."""
    from personalize import prompts
    from personalize.toyland import examples

    if str(photos) == "data_examples/dog" and not Path(photos).exists():
        examples.write(Path("data_examples"))
        screen.say("drew the example photos into data_examples")
    common = {"settings": settings, "screen": screen}
    run = train(photos, class_word=class_word, recipe=recipe, runs=runs, priors=priors, **common).folder
    pictures = generate(prompts.TOYLAND, run=run, **common)
    screen.say(f"pictures: {pictures.grid}")
    return evaluate(run, **common)


def _model(recipe: Recipe, screen: Terminal):
    from personalize import models

    return models.load(recipe.base, device=recipe.device, dtype=recipe.dtype, say=screen.say)


def _opened(folder: Path, base: str, settings: Sequence[str], screen: Terminal, *, say: bool):
    """The base of a run, its recipe with `settings` on top, its manifest."""
    from personalize import trained

    manifest = trained.require(folder)
    if say:
        screen.say(f"run: {os.path.relpath(folder)} ({manifest['prompt']!r}, newest finished)")
    full = config.load(None, [*settings, *([f"base={base}"] if base else [])], defaults=manifest["recipe"])
    return _model(full, screen), full, manifest
