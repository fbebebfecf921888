"""The jobs as functions. The commands of the terminal are thin callers of these.

`recipe` is a TOML file, `settings` are texts such as "train.steps=400"; both are checked as in the terminal.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from personalize.common import recipe as config
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.recipe import ADAPTERS, Recipe, load_recipe, needs_class_images
from personalize.common.terminal import SILENT, Terminal

RUNS, PRIORS = Path("runs"), Path("priors")
DEFAULTS = Path(__file__).parent / "common" / "defaults.toml"


def resolve(recipe: Path | str | None = None, settings: Sequence[str] = ()) -> Recipe:
    """The whole recipe: defaults of the base and the method, an adapter before others; then the file, then the settings."""
    path = Path(recipe) if recipe else None
    asked = load_recipe(path, settings)
    kinds = config.read_toml(DEFAULTS)["toyland" if asked.base == "toyland" else "sd"]
    adapts = set(asked.train.methods) & set(ADAPTERS)
    method = "lora" if adapts else next(iter(asked.train.methods), "full")
    return load_recipe(path, settings, defaults=kinds[method])


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

    full = resolve(recipe, settings)
    return command.run(_model(full, screen), full, class_word, root=Path(root), folder=folder, screen=screen)


def train(
    photos: Path | str | Sequence[str],
    *,
    class_word: str | Sequence[str] = (),
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    prior_folder: Path | None = None,
    profile: bool = False,
    screen: Terminal = SILENT,
):
    """Train on photos, drawing class pictures that are missing -> TrainResult(folder, steps, seconds).

    Several class words: as many folders of photos, each a subject with a token of its own. `profile`: see `profiling`.
    """
    from personalize.commands import prior as prior_command
    from personalize.commands import train as command
    from personalize.common import distributed

    full, sources = _asked(photos, class_word, recipe, settings)
    if prior_folder and len(full.class_word) > 1:
        raise UserError(f"--prior {prior_folder} holds pictures of one class, and there are {len(full.class_word)} subjects.")
    model = _model(full, screen)
    with distributed.process_group(model.device):
        folders = {}
        if needs_class_images(full):
            command.check(model, sources, full, profile=profile)  # before the class pictures, which take longer
            for word in dict.fromkeys(full.class_word):
                drawn = prior_command.run(model, full, word, root=Path(priors), folder=prior_folder, screen=screen)
                folders[word] = distributed.broadcast_from_rank0(drawn.folder)
        return command.run(model, sources, full, priors=folders, runs=Path(runs), profile=profile, screen=screen)


def _asked(photos, class_word: str | Sequence[str], recipe: Path | str | None, settings: Sequence[str]) -> tuple[Recipe, list]:
    """The recipe, and a source of photos for each subject."""
    words = [class_word] if isinstance(class_word, str) else list(class_word)
    full = resolve(recipe, [*settings, f"class_word={json.dumps(words)}"] if any(words) else settings)
    if not full.class_word:
        raise UserError("what is the subject? Give its class, as in: personalize train PHOTOS --class dog")
    if len(full.class_word) == 1:
        return full, [photos]
    if isinstance(photos, str | Path):
        raise UserError(f"{len(full.class_word)} subjects, {', '.join(full.class_word)}, need as many folders of photos.")
    return full, list(photos)


def generate(
    prompts: Sequence[str],
    *,
    run: Path | str | None = None,
    base: str = "",
    checkpoint: str = "",
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    out: Path | None = None,
    screen: Terminal = SILENT,
):
    """Pictures of prompts by a run (the newest finished one), or by a bare base -> GenerateResult(files, grid).

    {token} and {class} in a prompt are filled in with the run's. `loras` ("FILE" or "FILE:weight") and `embeddings` are
    files of any program, put on top.
    """
    from personalize.commands import generate as command
    from personalize.common.prompts import fill

    folder = Path(run) if run else None if base else run_folder.newest_run(Path(runs))
    prompts, name, known = list(prompts), "", []
    if folder is None:
        if any("{" in prompt for prompt in prompts):
            raise UserError("{token} and {class} stand for a run's: name one with --run, or write the words out.")
        full = resolve(None, [*settings, f"base={base}"])
        model = _model(full, screen)
    else:
        from personalize.training import load_run

        model, full, manifest = _opened(folder, base, settings, screen, say=not run)
        name, known = load_run.load_run(model, folder, manifest, at=checkpoint), manifest["subjects"]
        prompts = [fill(prompt, known[0]["token"], known[0]["class"]) for prompt in prompts]
    if known and not any(subject["token"] in prompt.split() for prompt in prompts for subject in known):
        token, word = known[0]["token"], known[0]["class"]
        screen.say(f"no prompt says {token!r}, the word for the subject: these pictures show any {word}.")
    origin = {"run": str(folder or ""), "checkpoint": name} | command.put_files(model, loras=loras, embeddings=embeddings)
    place = Path(out or (folder / "images" if folder else "images"))
    return command.run(model, prompts, full.draw, seed=full.seed, out=place, origin=origin, screen=screen)


def evaluate(
    run: Path | str | None = None,
    *,
    base: str = "",
    checkpoint: str = "",
    token: str = "",
    photos: bool = True,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
):
    """Scores of a run (the newest finished one) and a page to read -> EvaluateResult(metrics, report).

    `token` names the subject of a run that has several; the first without it. `photos=False` leaves them off the page.
    """
    from personalize.commands import evaluate as command
    from personalize.evaluation.protocols import protocol
    from personalize.training import load_run

    folder = Path(os.path.abspath(run or run_folder.newest_run(Path(runs))))
    model, full, manifest = _opened(folder, base, settings, screen, say=not run)
    subject = load_run.run_subject(manifest, token)
    asked = protocol(full.evaluate, model.name, subject["class"])
    return command.run(model, command.Job(folder, subject, checkpoint, asked, photos), full, screen=screen)


def compare(runs: Sequence[Path | str], *, settings: Sequence[str] = (), screen: Terminal = SILENT, **options):
    """Evaluates several runs as the first one asks, and each further one against it -> CompareResult(rows, text, file).

    Pictures are paired: same prompt, same noise. `options` are those of `evaluate`.
    """
    from personalize.commands import compare as command

    if len(runs) < 2:
        raise UserError("one run cannot be compared: name two or more.")
    same, done = command.asked(Path(runs[0])), []
    for run in runs:
        screen.say(f"evaluating {run}")
        done.append(evaluate(run, settings=[*same, *settings], screen=screen, **options).report.parent)
    return command.run([Path(run) for run in runs], done)


def dreambench(
    source: str,
    *,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    photos: bool = True,
    screen: Terminal = SILENT,
):
    """Trains and evaluates every subject of a folder of folders, or of hf:google/dreambooth -> CompareResult, a row each.

    A folder's class word is in its subject.toml. What is there already is not made again."""
    from personalize.commands import compare as command
    from personalize.data.subjects import list_subjects

    found, done = list_subjects(source), []
    for name, (source, word) in found.items():
        screen.say(f"{name}: {word}")
        where = {"runs": runs, "priors": priors, "screen": screen}
        folder = train(source, class_word=word, recipe=recipe, settings=settings, **where).folder
        done.append(evaluate(folder, photos=photos, settings=settings, screen=screen).report.parent)
    return command.table(list(found), done, out=Path(runs))


def plan(
    photos: Path | str | Sequence[str],
    *,
    class_word: str | Sequence[str] = (),
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    screen: Terminal = SILENT,
):
    """Memory and time of `train`, before a weight is read -> PlanResult(peak, free, seconds, switch)."""
    from personalize.commands import plan as command

    full, sources = _asked(photos, class_word, recipe, settings)
    return command.run(sources, full, screen=screen)


def tokens(base: str = "toyland", *, limit: int = 20, settings: Sequence[str] = (), screen: Terminal = SILENT):
    """Rare words of a base, one token in each of its text encoders, the weakest prior first -> list of tokens.Found."""
    from personalize.commands import rare_tokens as command

    return command.run(_model(resolve(None, [*settings, f"base={base}"]), screen), limit=limit)


def export(
    run: Path | str | None = None,
    *,
    to: str,
    fuse: bool = False,
    half: bool = False,
    out: Path | str | None = None,
    checkpoint: str = "",
    base: str = "",
    check: bool = True,
    push: str = "",
    public: bool = False,
    with_photos: bool = False,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
):
    """A run (the newest finished one) as other programs read it -> ExportResult(files, check, url).

    to: diffusers, single-file, kohya or a1111-embedding; `fuse` bakes an adapter into its base. What was written is kept
    only if a fresh process draws the run's picture with it; `check=False` leaves that out. `push`: owner/name on the hub.
    """
    from personalize.commands import export as command
    from personalize.commands.export.hub import Push
    from personalize.commands.export.targets import Form

    if not push and (public or with_photos):
        raise UserError("--public and --with-photos are about a repository on the hub: name it, --push owner/name.")
    folder = Path(run) if run else run_folder.newest_run(Path(runs))
    goal = Push(push, public, with_photos) if push else None
    job = command.Job(folder, Form(to, fuse, half), at=checkpoint, out=Path(out) if out else None, check=check, push=goal)
    command.require_possible(job)
    # float32 whatever the device: an adapter baked into half precision would lose much of itself.
    model, full, _ = _opened(folder, base, [*settings, "dtype=float32"], screen, say=not run)
    return command.run(model, job, full.draw, seed=full.seed, screen=screen)


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
    from personalize.common import prompts
    from personalize.toyland.world import examples

    if str(photos) == "data_examples/dog" and not Path(photos).exists():
        examples.write_examples(Path("data_examples"))
        screen.say("drew the example photos into data_examples")
    common = {"settings": settings, "screen": screen}
    run = train(photos, class_word=class_word, recipe=recipe, runs=runs, priors=priors, **common).folder
    pictures = generate(prompts.TOYLAND, run=run, **common)
    screen.say(f"pictures: {pictures.grid}")
    return evaluate(run, **common)


def _model(recipe: Recipe, screen: Terminal):
    from personalize import models
    from personalize.common import malloc

    return malloc.keep_freed_memory_for(
        models.load_model(recipe.base, device=recipe.device, dtype=recipe.dtype, vae=recipe.vae, say=screen.say)
    )


def _opened(folder: Path, base: str, settings: Sequence[str], screen: Terminal, *, say: bool):
    """The base of a run, its recipe with `settings` on top, its manifest."""
    from personalize.training import load_run

    manifest = load_run.require_run(folder)
    if say:
        screen.say(f"run: {os.path.relpath(folder)} ({manifest['subjects'][0]['prompt']!r}, newest finished)")
    full = load_recipe(None, [*settings, *([f"base={base}"] if base else [])], defaults=manifest["recipe"])
    return _model(full, screen), full, manifest
