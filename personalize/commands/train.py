"""`personalize train`: DreamBooth (Ruiz et al. 2208.12242), whatever the method.

A run is its photos, class, token, base and recipe: the same command resumes it, bit for bit on the CPU; another begins one.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from personalize import methods
from personalize.commands.session import PRIORS, RUNS, open_base, resolve_subjects
from personalize.common import distributed, run_folder
from personalize.common.errors import UserError
from personalize.common.files import make_folder, slug, write_text, writing
from personalize.common.image_size import require_multiple
from personalize.common.recipe import Recipe, needs_class_images
from personalize.common.recipe_text import recipe_to_toml
from personalize.common.terminal import SILENT, Terminal
from personalize.data import buckets, class_images
from personalize.data.captions import add_token, check_captions
from personalize.data.photos import preview
from personalize.data.rare_tokens import choose_tokens
from personalize.data.subjects import Subject, load_subjects
from personalize.evaluation import encoders
from personalize.models.interface import LatentModel
from personalize.training import extend, fixed_loss, loop, optimizer, preflight, profiler, sharding, validation
from personalize.training.checkpoint_schedule import SPARES
from personalize.training.find_run import find_named, find_run, is_run
from personalize.training.fixed_loss import FixedLoss
from personalize.training.load_run import require_run
from personalize.training.log import check_trackers, start_trackers
from personalize.training.manifest import Folders, make_manifest, run_class_sets
from personalize.training.prepare import class_latents, prepare
from personalize.training.prompt_notices import prompt_notices
from personalize.training.run import TrainingRun, disk_bytes, finish, or_skipped, restore, step_fits


@dataclass(frozen=True)
class TrainResult:
    """folder: the run; steps: those done now; seconds: of training, without loading and caching."""

    folder: Path
    steps: int
    seconds: float


def train(
    photos: Path | str | Sequence[str],
    *,
    class_word: str | Sequence[str] = (),
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    prior_folder: Path | None = None,
    prior_images: Path | None = None,
    extend: bool = False,
    profile: bool = False,
    name: str = "",
    opener: Callable[[Recipe, Terminal], LatentModel] = open_base,
    screen: Terminal = SILENT,
) -> TrainResult:
    """Train on photos; class images that are missing are drawn first.

    Several class words: as many folders of photos, each a subject with a token of its own. recipe: a TOML file; settings:
    texts such as "train.steps=400". prior_images: a folder of one's own class images, used instead. `extend`: the run in
    `runs` that is this one with fewer steps goes on to as many, see `training.extend`. `profile` writes where a step's time
    goes, see `training.profiler`, and changes nothing of the run. name: of the run's folder; without it its token and class.
    opener: gives the base, to which nothing is attached. Of several processes each calls it. UserError names what is wrong,
    before any long work.
    """
    resolved, sources = resolve_subjects(photos, class_word, recipe, settings)
    if prior_folder and len(resolved.class_word) > 1:
        raise UserError(f"--prior {prior_folder} holds images of one class, and there are {len(resolved.class_word)} subjects.")
    if prior_images:
        _require_used(prior_images, prior_folder, resolved)
    model = opener(resolved, screen)
    with distributed.process_group(model.device), sharding.released(model):
        screen = screen if distributed.rank() == 0 else SILENT
        resolved, subjects = checked(model, sources, resolved, profile=profile, screen=screen)
        options = {"root": Path(priors), "drawn": prior_folder, "own": prior_images, "screen": screen}
        folders, count = class_folders(model, resolved, subjects, **options) if needs_class_images(resolved) else ({}, 0)
        if prior_images:
            resolved = dataclasses.replace(resolved, prior=dataclasses.replace(resolved.prior, count=count))
        options = {"runs": Path(runs), "name": name, "extends": extend, "profile": profile, "screen": screen}
        return _train(model, resolved, subjects, folders, **options)


def class_folders(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], *, root: Path, drawn: Path | None, own: Path | None,
    screen: Terminal,
) -> tuple[dict[str, Path], int]:  # fmt: skip
    """The folders of class images, drawn or encoded where they are not there yet -> (they, images in each of one's own)."""
    folders, wanted, count = {}, run_class_sets(model, recipe, subjects), 0
    if drawn and len(wanted) > 1:
        raise UserError(
            f"--prior {drawn} holds images of one size, and these photos have {len(wanted)}. Leave it out, or give "
            "photos.shape=square."
        )
    for name, one in wanted.items():
        options, encoded = {"root": root, "size": one.size, "screen": screen}, None
        if own:
            if distributed.rank() == 0:
                encoded = class_images.encode_own(model, recipe, one.word, own, **options)
            folders[name], count = distributed.broadcast_from_rank0(encoded)
        else:
            folder, _ = class_images.complete_set(model, recipe, one.word, folder=drawn, count=one.count, **options)
            folders[name] = distributed.broadcast_from_rank0(folder)
    return folders, count


def _require_used(images: Path, drawn: Path | None, recipe: Recipe) -> None:
    """UserError where a run would not use the user's own class images."""
    if drawn:
        raise UserError(f"--prior-images {images} is used in place of drawn images, and --prior {drawn} has those. Give one.")
    if len(recipe.class_word) > 1:
        raise UserError(
            f"--prior-images {images} is of one class, and there are {len(recipe.class_word)} subjects. Leave it out."
        )
    if not needs_class_images(recipe):
        raise UserError(
            f"--prior-images {images}: this run uses no class images (prior.count, train.prior_weight, prior.kind or "
            "train.methods say so). Leave it out, or set prior.count=1: all images in the folder are used."
        )


def checked(
    model: LatentModel, sources: Sequence, recipe: Recipe, *, profile: bool, screen: Terminal
) -> tuple[Recipe, list[Subject]]:
    """The recipe with its tokens, and the subjects. UserError for all that can be wrong before any long work begins."""
    train, size = recipe.train, recipe.photos.size or model.size
    methods.check_methods(train.methods, quantize=train.quantize, text_encoder=train.text_encoder, lora=recipe.lora)
    methods.check_split_weights(recipe, model.dtype)
    sharding.check(recipe, model.device, model.dtype)
    optimizer.optimizer_class(train.optimizer)  # for its UserError
    methods.check_offload(recipe)
    fixed_loss.check(recipe)
    if profile:
        profiler.require_steps(recipe)
    check_trackers(train.trackers)
    px = {"edge": size, "step": 8 * model.downscale}
    require_multiple(size, px["step"], what="photos.size =", base=model.name)
    words = recipe.class_word
    tokens, remarks = choose_tokens(model, recipe.token, len(words), train.methods, classes=words)
    is_square = recipe.photos.shape == "square"
    subjects, notices = load_subjects(sources, recipe, tokens=tokens, size=size if is_square else 1)
    for photos in [] if is_square or recipe.photos.min_size else [[*s.photos, *s.held_out] for s in subjects]:
        buckets.require_pixels(photos, buckets.sizes_of(photos, recipe.photos.shape, **px))
    subjects, said = _with_captions(model, recipe, subjects)
    notices += said
    notices += prompt_notices(model, recipe, subjects)
    for word in words:
        if len(word.split()) > 3 or word.split()[0] in ("a", "an", "the", "photo"):
            notices.append(f"the class is {word!r}: it is put into prompts such as {subjects[0].prompt(train.prompt)!r}")
    if train.init_from:
        methods.init_source(recipe)
    if recipe.choose.every:
        encoders.load_encoders(model.folder, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)
    for line in notices + remarks:
        screen.say(line)
    return dataclasses.replace(recipe, token=tokens), subjects


def _with_captions(model: LatentModel, recipe: Recipe, subjects: list[Subject]) -> tuple[list[Subject], list[str]]:
    """The subjects, whose photos have the captions that they are trained with, and remarks on these."""
    ready, remarks, learns = [], [], bool(set(recipe.train.methods) & set(methods.WITH_A_WORD))
    for subject in subjects:
        names = {"token": subject.token, "word": subject.class_word}
        photos, said = add_token(model, subject.photos, **names) if recipe.captions.add_token else (subject.photos, [])
        ready.append(dataclasses.replace(subject, photos=photos))
        remarks += said + check_captions(model, photos, recipe.train.prompt, **names, learns_word=learns)
    return ready, remarks


def _train(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders, *, runs: Path, name: str, extends: bool,
    profile: bool, screen: Terminal,
) -> TrainResult:  # fmt: skip
    """The run of these subjects, begun, resumed or extended."""
    writes = distributed.rank() == 0
    manifest = make_manifest(model, recipe, subjects, priors)
    usual = slug("-".join(f"{s.token}-{s.class_word}" for s in subjects))
    found = (find_named(runs, name, manifest) if name else find_run(runs, usual, manifest)) if writes else None
    folder, difference = distributed.broadcast_from_rank0(found)
    if extends := extends and distributed.broadcast_from_rank0(not is_run(folder)):

        def identity(steps: int) -> str:
            shorter = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))
            return make_manifest(model, shorter, subjects, priors)["identity"]

        shorter = extend.find_shorter(runs, recipe.train.steps, identity, difference) if writes else None
        folder, difference = distributed.broadcast_from_rank0(shorter), ""
    with run_folder.lock(folder) if writes else nullcontext():
        if extends and writes:
            extend.extend(folder, manifest)
        if writes and is_run(folder) and (notice := extend.schedule_notice(require_run(folder))):
            screen.say(notice)
        finished = writes and is_run(folder) and run_folder.read_manifest(folder)["status"] == "finished"
        if distributed.broadcast_from_rank0(finished):
            screen.say(f"this run is finished: {folder}")
            if profile:
                screen.say("nothing was trained, so nothing was profiled; with another --runs folder it is trained again")
            return TrainResult(folder, 0, 0.0)
        if difference:
            screen.say(difference)
        with run_folder.marked(folder) if writes else nullcontext():
            run = begin(model, recipe, subjects, priors, folder, manifest, screen)
            spared = f" --set train.checkpoint_minutes=0 needs {SPARES} checkpoints less." * bool(
                recipe.train.checkpoint_minutes
            )
            run_folder.require_free_disk(folder, disk_bytes(run), spared)
            return _finish_training(run, screen, profile=profile)


def begin(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders, folder: Path, manifest: dict, screen: Terminal
) -> TrainingRun:
    """The run's folder, its training set and engine, and what is to be said before the first step."""
    latents = class_latents(model, recipe, subjects, priors, manifest["prior"])
    writes, dev = distributed.rank() == 0, None
    if writes:
        _write_folder(folder, manifest, recipe, subjects, model)
    if writes and recipe.choose.every:
        with or_skipped("no checkpoint is scored, and the last will be the result", screen):
            dev = validation.DevSplit.of(model, recipe, subjects, folder, progress=screen.progress)
    data, engine = prepare(model, recipe, subjects, priors, latents, screen=screen)
    fixed = FixedLoss.of(data, subjects) if recipe.train.held_out_every else None
    run = TrainingRun(folder, data, engine, [], manifest, writes, dev, fixed)
    if dev and recipe.choose.strengths and not distributed.is_sharded():  # else read when the run ends
        run.base = methods.base_state(model, recipe)
    first = next(iter(priors), None)
    shown = class_images.load_class_images(priors[first], min(8, len(latents[first]))) if priors else None
    vae_lines = preflight.representable(data, shown)
    data.release()
    with step_fits(run):
        lines = preflight.describe_run(data, run.engine)
    for line in [*lines, *vae_lines]:
        screen.say(line)
    if every := recipe.choose.every:
        screen.say(f"every {every} steps images are drawn to choose a checkpoint by (choose.every=0 keeps the last)")
    return run


def _write_folder(folder: Path, manifest: dict, recipe: Recipe, subjects: list[Subject], model: LatentModel) -> None:
    make_folder(folder)
    if is_run(folder):
        earlier = run_folder.read_manifest(folder)
        manifest |= {"sha256": {}} | {key: earlier[key] for key in ("sha256", "extended", "together") if key in earlier}
    run_folder.write_manifest(folder, manifest)
    write_text(folder / "recipe.toml", recipe_to_toml(recipe, comments=True))
    with writing(folder / "photos.png") as temporary:
        photos = [photo for subject in subjects for photo in subject.photos]
        px = {"edge": recipe.photos.size or model.size, "step": 8 * model.downscale}
        sizes = buckets.sizes_of(photos, recipe.photos.shape, **px)
        preview(photos, sizes, crop=recipe.photos.crop).save(temporary)


def _finish_training(run: TrainingRun, screen: Terminal, *, profile: bool) -> TrainResult:
    """The steps that are left, and the result."""
    recipe = run.recipe
    if recipe.train.ema:
        run.ema = [p.detach().clone() for p in run.engine.params]
    start = restore(run, screen)
    began = time.monotonic()
    trackers = start_trackers(recipe.train.trackers, run.folder) if run.writes else []
    try:
        with profiler.profiled_steps(run, start, screen) if profile else nullcontext():
            reached = loop.run_steps(run, start, trackers=trackers, screen=screen)
            finish(run, screen)
    finally:
        for tracker in trackers:
            tracker.finish()
    return TrainResult(run.folder, reached - start, time.monotonic() - began)
