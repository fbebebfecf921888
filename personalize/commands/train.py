"""`personalize train`: DreamBooth (Ruiz et al. 2208.12242), whatever the method.

The loop reads top to bottom in `_loop`. A run is its photos, class, token, base and recipe: the same command finds it
again and goes on, bit for bit on the CPU; anything else gets a folder of its own.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from personalize import methods
from personalize.common import distributed, run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe, recipe_to_dict, recipe_to_toml
from personalize.common.terminal import SILENT, Terminal
from personalize.data import class_images, training_set
from personalize.data.photos import preview
from personalize.data.rare_tokens import choose_tokens
from personalize.data.subjects import Subject, load_subjects
from personalize.evaluation import checkpoint_selection, encoders
from personalize.evaluation.protocols import dev_templates
from personalize.generation import sampling
from personalize.models.interface import LatentModel
from personalize.training import engine, preflight, profiler, validation
from personalize.training import run as keeping
from personalize.training.log import RunLog, check_trackers, start_trackers, stop_signals
from personalize.training.run import TrainingRun, disk_bytes, finish, mark, restore, save


@dataclass(frozen=True)
class TrainResult:
    """folder: the run; steps: those done now; seconds: of training, without loading and caching."""

    folder: Path
    steps: int
    seconds: float


def run(
    model: LatentModel, sources: Sequence, recipe: Recipe, *, priors: Mapping[str, Path], runs: Path,
    profile: bool = False, screen: Terminal = SILENT,
) -> TrainResult:  # fmt: skip
    """Train on photos, one source a subject, with the folders `priors` of class pictures by class word.

    Of several processes each calls it, inside `processes.joined`. UserError names what is wrong. `profile` leaves a page
    of where a step goes, see `profiling`, and changes nothing of the run.
    """
    writes = distributed.rank() == 0
    screen = screen if writes else SILENT
    recipe, known, notices = check(model, sources, recipe, profile=profile)
    for line in notices:
        screen.say(line)
    wanted = {word: class_images.class_image_settings(model, recipe, word) for word in priors}
    manifest = _manifest(model, recipe, known, priors=priors, wanted=wanted)
    names = "-".join(f"{s.token}-{s.class_word}" for s in known)
    folder = distributed.broadcast_from_rank0(_find(runs, names, manifest) if writes else None)
    with run_folder.lock(folder) if writes else nullcontext():
        if distributed.broadcast_from_rank0(writes and _finished(folder)):
            screen.say(f"this run is finished: {folder}")
            if profile:
                screen.say("nothing was trained, so nothing was profiled; with another --runs folder it is trained again")
            return TrainResult(folder, 0, 0.0)
        pictures = {}
        for word, place in priors.items():
            class_images.check_folder(place, wanted[word])
            pictures[word] = class_images.class_latents(place, recipe.prior.count)
        if writes:
            _begin(folder, manifest, recipe, known, size=recipe.photos.size or model.size)
        dev = None
        if writes and recipe.choose.every:
            dev = validation.DevSplit.of(model, recipe, known, folder, progress=screen.progress)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            groups = methods.attach(model, recipe)
        text_trains = any(group["name"] != "unet" for group in groups)
        data = training_set.build_training_set(model, recipe, known, priors=pictures, text_trains=text_trains)
        run = TrainingRun(folder, data, engine.Engine(model, recipe, groups, say=screen.say), [], manifest, writes, dev)
        own = class_images.load_class_images(next(iter(priors.values())), min(8, recipe.prior.count)) if priors else None
        shown = preflight.representable(data, own)
        data.release()
        for line in [*preflight.describe_run(data, run.engine), *shown]:
            screen.say(line)
        if every := recipe.choose.every:
            screen.say(f"every {every} steps pictures are drawn to choose a checkpoint by (choose.every=0 keeps the last)")
        run_folder.require_free_disk(folder, disk_bytes(run))
        return _train(run, screen, profile=profile)


def check(
    model: LatentModel, sources: Sequence, recipe: Recipe, *, profile: bool = False
) -> tuple[Recipe, list[Subject], list[str]]:
    """The recipe with its tokens, subjects, notices. UserError for all that can be wrong before any long work begins."""
    train, size = recipe.train, recipe.photos.size or model.size
    methods.check_methods(train.methods, quantize=train.quantize, text_encoder=train.text_encoder, lora=recipe.lora)
    methods.check_split_weights(recipe, model.dtype)
    sampling.sampler_named(recipe.draw.sampler)
    if profile:
        profiler.require_steps(recipe)
    check_trackers(train.trackers)
    if size % (8 * model.downscale):
        raise UserError(f"photos.size = {size} px is not a multiple of {8 * model.downscale}, which base {model.name!r} needs.")
    chosen, remarks = choose_tokens(model, recipe.token, len(recipe.class_word), train.methods, classes=recipe.class_word)
    known, notices = load_subjects(sources, recipe, tokens=chosen, size=size)
    if recipe.choose.every:
        for template, word in itertools.product(dev_templates(recipe.choose.prompts, model.name), recipe.class_word):
            fill(template, "", word)
        encoders.load_encoders(model.name, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)
    return dataclasses.replace(recipe, token=chosen), known, notices + remarks


def _finished(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and run_folder.read_manifest(folder)["status"] == "finished"


def _begin(folder: Path, manifest: dict, recipe: Recipe, known: list[Subject], *, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_manifest(folder, manifest)
    run_folder.write_text(folder / "recipe.toml", recipe_to_toml(recipe, comments=True))
    with run_folder.writing(folder / "photos.png") as temporary:
        shown = [photo for subject in known for photo in subject.photos]
        preview(shown, size, how=recipe.photos.crop).save(temporary)


def _train(run: TrainingRun, screen: Terminal, *, profile: bool) -> TrainResult:
    recipe = run.recipe
    if recipe.train.ema:
        run.average = [p.detach().clone() for p in run.engine.params]
    start = restore(run, screen)
    began = time.monotonic()
    trackers = start_trackers(recipe.train.trackers, run.folder) if run.writes else []
    try:
        with profiler.watching(run, start, screen) if profile else nullcontext():
            reached = _loop(run, start, trackers=trackers, screen=screen)
            finish(run, screen)
    except UserError:
        mark(run, "failed")
        raise
    except Interrupted:
        mark(run, "interrupted")
        raise
    finally:
        for tracker in trackers:
            tracker.finish()
    return TrainResult(run.folder, reached - start, time.monotonic() - began)


def _loop(run: TrainingRun, start: int, *, trackers: list, screen: Terminal) -> int:
    """Returns the step it ended at: the last one, or where more would only harm."""
    train = run.recipe.train
    log = RunLog(run.folder, run.engine, trackers, writes=run.writes)
    if start and run.recipe.choose.every and _ended(run):
        return start
    steps = screen.progress("training", train.steps, done=start, unit="steps")
    with stop_signals() as stopped, steps as advance:
        for step in range(start, train.steps):
            values = run.engine.step(run.data.at(step), scale=engine.lr_factor(run.recipe, step))
            if train.ema:
                decay = min(train.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(run.average, run.engine.params, 1 - decay)
            log.add(step + 1, values)
            advance(note=log.line)
            last = step + 1 == train.steps
            judged = keeping.judged(run.recipe, step + 1)
            due = train.checkpoint_every and (step + 1) % train.checkpoint_every == 0
            # Read once: a signal that comes while a picture is drawn stops the next step. One process's stops all.
            stop = distributed.any_rank(bool(stopped), run.data.model.device)
            if due or judged or last or stop:
                log.flush()
                save(run, step + 1, screen)
            if run.writes and train.sample_every and (step + 1) % train.sample_every == 0:
                _sample(run, step + 1)
            if stop and step + 1 < train.steps:
                raise Interrupted(f"stopped at step {step + 1} of {train.steps}; the same command goes on from there")
            if judged and not last and _ended(run):
                screen.say(f"identity has stalled and the class drifts: ended after step {step + 1} of {train.steps}")
                return step + 1
    return train.steps


def _ended(run: TrainingRun) -> bool:
    return distributed.broadcast_from_rank0(
        run.dev is not None and checkpoint_selection.stalled(run.dev.scored, run.recipe.choose.patience)
    )


def _manifest(
    model: LatentModel, recipe: Recipe, known: list[Subject], *, priors: Mapping[str, Path], wanted: Mapping[str, dict]
) -> dict:
    full = recipe_to_dict(recipe)
    shape = {k: v for k, v in full.items() if k not in ("device", "vae", "draw", "evaluate")}
    # photos in their order, which decides the batches
    shown = [[[p.sha256, p.caption, p.mask_sha256] for p in (*s.photos, *s.held_out)] for s in known]
    identity = {"photos": shown, "base": model.fingerprint, "recipe": shape, "prior": wanted}
    if recipe.choose.every:  # scores of one run are of pictures drawn in one way and seen by one pair of eyes
        how = validation.sampling_config(recipe, recipe.choose.steps).decisive()
        identity["choosing"] = [how, recipe.evaluate.dino, recipe.evaluate.clip]
    entries = [
        {
            "token": s.token, "class": s.class_word, "prompt": s.prompt(recipe.train.prompt),
            "photos": [{"path": p.path if p.path.startswith("hf:") else os.path.abspath(p.path), "sha256": p.sha256,
                        "held_out": k >= len(s.photos)} for k, p in enumerate((*s.photos, *s.held_out))],
            "prior_folder": os.path.abspath(priors[s.class_word]) if s.class_word in priors else "",
        }
        for s in known
    ]  # fmt: skip
    return {
        "kind": "run", "status": "running", "identity": run_folder.key_of(identity),
        "base": model.name, "fingerprint": model.fingerprint, "methods": list(recipe.train.methods), "subjects": entries,
        "prior": wanted, "recipe": full, "seed": recipe.seed, "versions": run_folder.library_versions(),
    }  # fmt: skip


def _find(runs: Path, name: str, manifest: dict) -> Path:
    """The folder of this very run, or a new one: never one that holds another run."""
    name = run_folder.slug(name)
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not (folder / "manifest.json").exists():
            return folder
        if run_folder.read_manifest(folder).get("identity") == manifest["identity"]:
            return folder
    raise UserError(f"{runs} holds 10000 runs called {name}. Give another folder: --runs.")


def _sample(run: TrainingRun, step: int) -> None:
    prompts = [run.manifest["subjects"][0]["prompt"]] * 4 + [run.data.prompts[len(run.data.photos)]] * 4
    with validation.eval_mode(run.data.model):
        validation.draw_samples(run.data.model, run.recipe, prompts, run.folder / "samples" / f"step-{step:06d}.png")
