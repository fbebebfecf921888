"""`personalize train`: DreamBooth (Ruiz et al. 2208.12242), whatever the method.

The loop reads top to bottom in `_loop`. A run is its photos, class, token, base and recipe: the same command finds it
again and goes on, bit for bit on the CPU; anything else gets a folder of its own.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize import checkpoint, config, engine, latent, methods, plan, priorset, rundir, runlog, tokens, trainset
from personalize import photos as photo_files
from personalize.config import Recipe
from personalize.crops import Photo
from personalize.errors import Interrupted, UserError
from personalize.models.base import LatentModel
from personalize.prompts import fill
from personalize.terminal import SILENT, Terminal
from personalize.trained import STATE


@dataclass(frozen=True)
class TrainResult:
    """folder: the run; steps: those done now; seconds: of training, without loading and caching."""

    folder: Path
    steps: int
    seconds: float


@dataclass
class Run:
    """A run in this process: its folder, what it trains on, and the average of its weights where one is kept."""

    folder: Path
    data: trainset.TrainingSet
    engine: engine.Engine
    average: list[Tensor]
    manifest: dict

    @property
    def recipe(self) -> Recipe:
        return self.data.recipe


def run(
    model: LatentModel, source, recipe: Recipe, *, prior: Path | None, runs: Path, screen: Terminal = SILENT
) -> TrainResult:
    """Train on the photos of `source`, with the class pictures in the folder `prior`. UserError names what is wrong."""
    photos, token, notices = check(model, source, recipe)
    for line in notices:
        screen.say(line)
    size = recipe.photos.size or model.size
    wanted = priorset.settings(model, recipe) if prior else {}
    manifest = _manifest(model, recipe, photos, token=token, prior_settings=wanted)
    manifest["prior_folder"] = os.path.abspath(prior) if prior else ""
    folder = _find(runs, f"{token}-{recipe.class_word}", manifest)
    with rundir.lock(folder):
        if (folder / "manifest.json").exists() and rundir.read_manifest(folder)["status"] == "finished":
            screen.say(f"this run is finished: {folder}")
            return TrainResult(folder, 0, 0.0)
        classes = None
        if prior:
            priorset.check(prior, wanted)
            classes = priorset.latents(prior, recipe.prior.count)
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_manifest(folder, manifest)
        rundir.write_text(folder / "recipe.toml", config.to_toml(recipe, comments=True))
        _save_preview(folder, photos, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            groups = methods.the_one(recipe.train.methods).attach(model, recipe)
        data = trainset.build(model, recipe, photos, token=token, prior=classes)
        run = Run(folder, data, engine.Engine(model, recipe, groups), [], manifest)
        own = priorset.pictures(prior, min(8, recipe.prior.count)) if prior else None
        for line in plan.words(data, run.engine, prior_pictures=own):
            screen.say(line)
        rundir.require_free_disk(folder, _disk_bytes(run))
        return _train(run, screen)


def check(model: LatentModel, source, recipe: Recipe) -> tuple[list[Photo], str, list[str]]:
    """Photos, token, notices. UserError for all that can be wrong before any long work begins."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train runs in one process so far; start it without `accelerate launch --num_processes`.")
    if not recipe.class_word:
        raise UserError("what is the subject? Give its class, as in: personalize train PHOTOS --class dog")
    methods.the_one(recipe.train.methods)
    latent.sampler_named(recipe.draw.sampler)
    runlog.check_trackers(recipe.train.trackers)
    token, remark = tokens.choose(model, recipe.token)
    photos, notices = photo_files.load(source, min_size=recipe.photos.min_size or recipe.photos.size or model.size)
    return photos, token, notices + [remark] * bool(remark)


def _train(run: Run, screen: Terminal) -> TrainResult:
    recipe = run.recipe
    if recipe.train.ema:
        run.average = [p.detach().clone() for p in run.engine.params]
    start = _restore(run, screen)
    began = time.monotonic()
    trackers = runlog.start_trackers(recipe.train.trackers, run.folder)
    try:
        _loop(run, start, trackers=trackers, screen=screen)
        _finish(run)
    except UserError:
        rundir.write_manifest(run.folder, run.manifest | {"status": "failed"})
        raise
    except Interrupted:
        rundir.write_manifest(run.folder, run.manifest | {"status": "interrupted"})
        raise
    finally:
        for tracker in trackers:
            tracker.finish()
    return TrainResult(run.folder, recipe.train.steps - start, time.monotonic() - began)


def _loop(run: Run, start: int, *, trackers: list, screen: Terminal) -> None:
    train, log = run.recipe.train, runlog.Log(run.folder, run.engine, trackers)
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
            stop = bool(stopped)  # read once: a signal that comes while a picture is drawn stops the next step
            if due or step + 1 == train.steps or stop:
                log.flush()
                _save(run, step + 1)
            if train.sample_every and (step + 1) % train.sample_every == 0:
                _sample(run, step + 1)
            if stop and step + 1 < train.steps:
                raise Interrupted(f"stopped at step {step + 1} of {train.steps}; the same command goes on from there")


def _manifest(model: LatentModel, recipe: Recipe, photos: list[Photo], *, token: str, prior_settings: dict) -> dict:
    full = config.to_dict(recipe)
    shape = {k: v for k, v in full.items() if k not in ("device", "draw", "evaluate")}
    shown = [[photo.sha256, photo.caption] for photo in photos]  # in their order, which decides the batches
    identity = {"photos": shown, "base": model.fingerprint, "token": token, "recipe": shape, "prior": prior_settings}
    return {
        "kind": "run", "status": "running", "identity": rundir.key_of(identity),
        "base": model.name, "fingerprint": model.fingerprint, "token": token, "class": recipe.class_word,
        "prompt": fill(recipe.train.prompt, token, recipe.class_word), "methods": list(recipe.train.methods),
        "photos": [{"path": os.path.abspath(p.path) if not p.path.startswith("hf:") else p.path, "sha256": p.sha256}
                   for p in photos],
        "prior": prior_settings, "recipe": full, "seed": recipe.seed, "versions": rundir.library_versions(),
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
    folder = run.folder / "checkpoints" / f"step-{step:06d}"
    method = methods.the_one(run.recipe.train.methods)
    parts = {"trained": method.state(run.data.model), "optimizer": checkpoint.optimizer_tensors(run.engine.optimizer)}
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
    if not found:
        rundir.write_text(run.folder / "log.jsonl", "")
        return 0
    parts, step = checkpoint.load(found[-1])
    methods.the_one(run.recipe.train.methods).restore(run.data.model, parts["trained"])
    checkpoint.restore_optimizer(run.engine.optimizer, parts["optimizer"])
    for i, mean in enumerate(run.average):
        mean.copy_(parts["average"][str(i)])
    if "scaler" in parts:
        run.engine.scaler.load_state_dict({k: v.item() for k, v in parts["scaler"].items()})
    rows = [row for row in rundir.read_jsonl(run.folder / "log.jsonl") if row["step"] <= step]
    rundir.write_text(run.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    screen.say(f"going on with {run.folder} after step {step}")
    return step


def _finish(run: Run) -> None:
    """The result in model/: the average where one is kept."""
    for p, mean in zip(run.engine.params, run.average):
        p.data.copy_(mean)
    run.data.model.unet.eval()
    run.data.model.text_encoder.eval()
    with rundir.writing(run.folder / "model") as temporary:
        methods.the_one(run.recipe.train.methods).save(run.data.model, temporary, run.recipe)
    rundir.write_manifest(run.folder, run.manifest | {"status": "finished"})


def _sample(run: Run, step: int) -> None:
    """Pictures of the subject's and the class's prompt, drawn with the weights as they are."""
    from personalize.sheet import grid

    model, draw = run.data.model, run.recipe.draw
    modules = [model.unet, model.text_encoder]
    training = [m.training for m in modules]
    for m in modules:
        m.eval()
    prompts = [run.manifest["prompt"]] * 4 + [run.data.prompts[-1]] * 4
    how = latent.Drawing(draw.sampler, draw.steps, draw.guidance, negative=draw.negative)
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        z0 = latent.draw(model, prompts, latent.image_generators(run.recipe.seed, range(8), "sample"), how)
    for m, was in zip(modules, training):
        m.train(was)
    (run.folder / "samples").mkdir(exist_ok=True)
    with rundir.writing(run.folder / "samples" / f"step-{step:06d}.png") as temporary:
        grid(latent.to_pil(model.decode_latents(z0)), 4).save(temporary)


def _save_preview(folder: Path, photos: list[Photo], size: int) -> None:
    with rundir.writing(folder / "photos.png") as temporary:
        photo_files.preview(photos, size).save(temporary)


def _disk_bytes(run: Run) -> int:
    """Weights, two moments and an average for each checkpoint that will lie there at once, plus the result."""
    trained = sum(p.numel() for p in run.engine.params)
    whole = sum(p.numel() for m in (run.data.model.unet, run.data.model.text_encoder) for p in m.parameters())
    copies = min(run.recipe.train.keep + 1, 1 + run.recipe.train.steps // (run.recipe.train.checkpoint_every or 10**9))
    return 4 * trained * (3 + bool(run.recipe.train.ema)) * copies + (4 * whole if "full" in run.recipe.train.methods else 0)
