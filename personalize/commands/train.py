"""`personalize train`: DreamBooth (Ruiz et al. 2208.12242), whatever the method.

The loop reads top to bottom in `_loop`. A run is its photos, class, token, base and recipe: the same command finds it
again and goes on, bit for bit on the CPU; anything else gets a folder of its own.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize import checkpoint, config, engine, latent, methods, plan, priorset, processes, rundir, runlog, trainset
from personalize import photos as photo_files
from personalize.config import Recipe
from personalize.errors import Interrupted, UserError
from personalize.models.base import LatentModel
from personalize.subjects import Subject
from personalize.subjects import load as load_subjects
from personalize.terminal import SILENT, Terminal
from personalize.tokens import choose as choose_tokens
from personalize.trained import STATE


@dataclass(frozen=True)
class TrainResult:
    """folder: the run; steps: those done now; seconds: of training, without loading and caching."""

    folder: Path
    steps: int
    seconds: float


@dataclass
class Run:
    """A run in this process: its folder, what it trains on, and the average of its weights where one is kept.

    Of several processes all compute, and the first one writes.
    """

    folder: Path
    data: trainset.TrainingSet
    engine: engine.Engine
    average: list[Tensor]
    manifest: dict
    writes: bool

    @property
    def recipe(self) -> Recipe:
        return self.data.recipe


def run(
    model: LatentModel, sources: Sequence, recipe: Recipe, *, priors: Mapping[str, Path], runs: Path, screen: Terminal = SILENT
) -> TrainResult:
    """Train on photos, one source a subject, with the folders `priors` of class pictures by class word.

    Of several processes each calls it, inside `processes.joined`. UserError names what is wrong.
    """
    writes = processes.rank() == 0
    screen = screen if writes else SILENT
    recipe, known, notices = check(model, sources, recipe)
    for line in notices:
        screen.say(line)
    wanted = {word: priorset.settings(model, recipe, word) for word in priors}
    manifest = _manifest(model, recipe, known, priors=priors, wanted=wanted)
    names = "-".join(f"{s.token}-{s.class_word}" for s in known)
    folder = processes.from_first(_find(runs, names, manifest) if writes else None)
    with rundir.lock(folder) if writes else nullcontext():
        if processes.from_first(writes and _finished(folder)):
            screen.say(f"this run is finished: {folder}")
            return TrainResult(folder, 0, 0.0)
        pictures = {}
        for word, place in priors.items():
            priorset.check(place, wanted[word])
            pictures[word] = priorset.latents(place, recipe.prior.count)
        if writes:
            _begin(folder, manifest, recipe, known, size=recipe.photos.size or model.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            groups = methods.attach(model, recipe)
        text_trains = any(group["name"] != "unet" for group in groups)
        data = trainset.build(model, recipe, known, priors=pictures, text_trains=text_trains)
        run = Run(folder, data, engine.Engine(model, recipe, groups), [], manifest, writes)
        own = priorset.pictures(next(iter(priors.values())), min(8, recipe.prior.count)) if priors else None
        shown = plan.representable(data, own)
        model.release(vae=data.seen is not None, texts=data.texts is not None)
        for line in [*plan.words(data, run.engine), *shown]:
            screen.say(line)
        rundir.require_free_disk(folder, _disk_bytes(run))
        return _train(run, screen)


def check(model: LatentModel, sources: Sequence, recipe: Recipe) -> tuple[Recipe, list[Subject], list[str]]:
    """The recipe with its tokens, subjects, notices. UserError for all that can be wrong before any long work begins."""
    train, size = recipe.train, recipe.photos.size or model.size
    methods.check(train.methods, quantize=train.quantize, text_encoder=train.text_encoder, lora=recipe.lora)
    latent.sampler_named(recipe.draw.sampler)
    runlog.check_trackers(train.trackers)
    if size % (8 * model.downscale):
        raise UserError(f"photos.size = {size} px is not a multiple of {8 * model.downscale}, which base {model.name!r} needs.")
    chosen, remarks = choose_tokens(model, recipe.token, len(recipe.class_word), train.methods, classes=recipe.class_word)
    known, notices = load_subjects(sources, recipe, tokens=chosen, size=size)
    return dataclasses.replace(recipe, token=chosen), known, notices + remarks


def _finished(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and rundir.read_manifest(folder)["status"] == "finished"


def _begin(folder: Path, manifest: dict, recipe: Recipe, known: list[Subject], *, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_manifest(folder, manifest)
    rundir.write_text(folder / "recipe.toml", config.to_toml(recipe, comments=True))
    with rundir.writing(folder / "photos.png") as temporary:
        shown = [photo for subject in known for photo in subject.photos]
        photo_files.preview(shown, size, how=recipe.photos.crop).save(temporary)


def _train(run: Run, screen: Terminal) -> TrainResult:
    recipe = run.recipe
    if recipe.train.ema:
        run.average = [p.detach().clone() for p in run.engine.params]
    start = _restore(run, screen)
    began = time.monotonic()
    trackers = runlog.start_trackers(recipe.train.trackers, run.folder) if run.writes else []
    try:
        _loop(run, start, trackers=trackers, screen=screen)
        _finish(run)
    except UserError:
        _mark(run, "failed")
        raise
    except Interrupted:
        _mark(run, "interrupted")
        raise
    finally:
        for tracker in trackers:
            tracker.finish()
    return TrainResult(run.folder, recipe.train.steps - start, time.monotonic() - began)


def _loop(run: Run, start: int, *, trackers: list, screen: Terminal) -> None:
    train, log = run.recipe.train, runlog.Log(run.folder, run.engine, trackers, writes=run.writes)
    steps = screen.progress("training", train.steps, done=start, unit="steps")
    with runlog.stop_signals() as stopped, steps as advance:
        for step in range(start, train.steps):
            values = run.engine.step(run.data.at(step), scale=engine.rate(run.recipe, step))
            if train.ema:
                decay = min(train.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(run.average, run.engine.params, 1 - decay)
            log.add(step + 1, values)
            advance(note=log.line)
            due = train.checkpoint_every and (step + 1) % train.checkpoint_every == 0
            # Read once: a signal that comes while a picture is drawn stops the next step. One process's stops all.
            stop = processes.any_of_us(bool(stopped), run.data.model.device)
            if due or step + 1 == train.steps or stop:
                log.flush()
                _save(run, step + 1)
            if run.writes and train.sample_every and (step + 1) % train.sample_every == 0:
                _sample(run, step + 1)
            if stop and step + 1 < train.steps:
                raise Interrupted(f"stopped at step {step + 1} of {train.steps}; the same command goes on from there")


def _manifest(
    model: LatentModel, recipe: Recipe, known: list[Subject], *, priors: Mapping[str, Path], wanted: Mapping[str, dict]
) -> dict:
    full = config.to_dict(recipe)
    shape = {k: v for k, v in full.items() if k not in ("device", "vae", "draw", "evaluate")}
    # photos in their order, which decides the batches
    shown = [[[p.sha256, p.caption, p.mask_sha256] for p in s.photos] for s in known]
    identity = {"photos": shown, "base": model.fingerprint, "recipe": shape, "prior": wanted}
    entries = [
        {
            "token": s.token, "class": s.class_word, "prompt": s.prompt(recipe.train.prompt),
            "photos": [{"path": p.path if p.path.startswith("hf:") else os.path.abspath(p.path), "sha256": p.sha256}
                       for p in s.photos],
            "prior_folder": os.path.abspath(priors[s.class_word]) if s.class_word in priors else "",
        }
        for s in known
    ]  # fmt: skip
    return {
        "kind": "run", "status": "running", "identity": rundir.key_of(identity),
        "base": model.name, "fingerprint": model.fingerprint, "methods": list(recipe.train.methods), "subjects": entries,
        "prior": wanted, "recipe": full, "seed": recipe.seed, "versions": rundir.library_versions(),
    }  # fmt: skip


def _find(runs: Path, name: str, manifest: dict) -> Path:
    """The folder of this very run, or a new one: never one that holds another run."""
    name = rundir.slug(name)
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not (folder / "manifest.json").exists():
            return folder
        if rundir.read_manifest(folder).get("identity") == manifest["identity"]:
            return folder
    raise UserError(f"{runs} holds 10000 runs called {name}. Give another folder: --runs.")


def _save(run: Run, step: int) -> None:
    if not run.writes:
        return
    folder = run.folder / "checkpoints" / f"step-{step:06d}"
    trained = methods.state(run.data.model, run.recipe)
    parts = {"trained": trained, "optimizer": checkpoint.optimizer_tensors(run.engine.optimizer)}
    parts["average"] = {str(i): mean for i, mean in enumerate(run.average)}
    if run.engine.scaler.is_enabled():
        parts["scaler"] = {k: torch.tensor(v) for k, v in run.engine.scaler.state_dict().items()}
    if not all(v.isfinite().all() for part in ("trained", "average") for v in parts[part].values()):
        raise UserError(runlog.not_a_number(run.folder, run.engine, f"a weight is no number after step {step}"))
    with rundir.writing(folder) as temporary:
        temporary.mkdir()
        checkpoint.save(temporary / STATE, parts, step)
    rundir.prune_checkpoints(run.folder, run.recipe.train.keep)


def _restore(run: Run, screen: Terminal) -> int:
    """The newest checkpoint's step, its state put in place; 0 where there is none."""
    found = [folder / STATE for folder in rundir.checkpoints(run.folder) if (folder / STATE).exists()]
    newest = processes.from_first(found[-1] if found else None)
    log = run.folder / runlog.FILE
    if newest is None:
        if run.recipe.train.init_from:
            methods.start_from(run.data.model, run.recipe)
        if run.writes:
            rundir.write_text(log, "")
        return 0
    parts, step = checkpoint.load(newest)
    methods.restore(run.data.model, run.recipe, parts["trained"])
    checkpoint.restore_optimizer(run.engine.optimizer, parts["optimizer"])
    for i, mean in enumerate(run.average):
        mean.copy_(parts["average"][str(i)])
    if "scaler" in parts:
        run.engine.scaler.load_state_dict({k: v.item() for k, v in parts["scaler"].items()})
    if run.writes:
        rows = [row for row in rundir.read_jsonl(log) if row["step"] <= step]
        rundir.write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
    screen.say(f"going on with {run.folder} after step {step}")
    return step


def _mark(run: Run, status: str) -> None:
    if run.writes:
        rundir.write_manifest(run.folder, run.manifest | {"status": status})


def _finish(run: Run) -> None:
    """The result in model/: the average where one is kept."""
    if not run.writes:
        return
    for p, mean in zip(run.engine.params, run.average):
        p.data.copy_(mean)
    for module in run.data.model.networks.values():
        module.eval()
    with rundir.writing(run.folder / "model") as temporary:
        methods.save(run.data.model, temporary, run.recipe)
    _mark(run, "finished")


def _sample(run: Run, step: int) -> None:
    """Pictures of the subject's and the class's prompt, drawn with the weights as they are."""
    from personalize.sheet import grid

    model, draw = run.data.model, run.recipe.draw
    training = {module: module.training for module in model.networks.values()}
    for module in training:
        module.eval()
    prompts = [run.manifest["subjects"][0]["prompt"]] * 4 + [run.data.prompts[len(run.data.photos)]] * 4
    how = latent.Drawing(draw.sampler, draw.steps, draw.guidance, negative=draw.negative)
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        z0 = latent.draw(model, prompts, latent.image_generators(run.recipe.seed, range(8), "sample"), how)
    for module, was in training.items():
        module.train(was)
    (run.folder / "samples").mkdir(exist_ok=True)
    with rundir.writing(run.folder / "samples" / f"step-{step:06d}.png") as temporary:
        grid(latent.to_pil(model.decode_latents(z0)), 4).save(temporary)


def _disk_bytes(run: Run) -> int:
    """Weights, two moments and an average for each checkpoint that will lie there at once, plus the result."""
    trained = sum(p.numel() for p in run.engine.params)
    whole = sum(p.numel() for p in run.data.model.unet.parameters())
    copies = min(run.recipe.train.keep + 1, 1 + run.recipe.train.steps // (run.recipe.train.checkpoint_every or 10**9))
    return 4 * trained * (3 + bool(run.recipe.train.ema)) * copies + (4 * whole if "full" in run.recipe.train.methods else 0)
