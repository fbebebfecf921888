"""What a run saves: checkpoints, the chosen one, its result; and how it resumes from them.

Of several processes all compute, and the first one writes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from personalize import methods
from personalize.common import checkpoint, distributed, run_folder
from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_jsonl, remove_folder, sync, write_text, writing
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.data.bucketed_set import BucketedSet
from personalize.data.training_set import TrainingSet
from personalize.evaluation import checkpoint_selection
from personalize.models.out_of_memory import is_out_of_memory
from personalize.training import engine, load_run, sharding, validation
from personalize.training.checkpoint_schedule import SPARES, is_scheduled, is_scored
from personalize.training.fixed_loss import FixedLoss
from personalize.training.log import FILE, divergence_message
from personalize.training.memory.switches import memory_switches


@dataclass
class TrainingRun:
    """A run in this process: its folder, what it trains on, the EMA of its weights if one is kept, and the dev split if
    checkpoints are chosen by it.
    """

    folder: Path
    data: TrainingSet | BucketedSet
    engine: engine.Engine
    ema: list[Tensor]
    manifest: dict
    writes: bool
    dev: validation.DevSplit | None = None
    fixed: FixedLoss | None = None  # where it is measured
    base: dict[str, Tensor] = field(default_factory=dict)  # the base's values of what trains, where strengths are scored

    @property
    def recipe(self) -> Recipe:
        return self.data.recipe

    @property
    def average(self) -> list[Tensor]:
        """What is scored and kept in place of the weights that train: their EMA, or a schedule-free average; [] for neither."""
        return self.ema or self.engine.averaged()


@torch.no_grad()
def update_ema(run: TrainingRun, step: int) -> None:
    """Moves the EMA towards the weights after step 0…; the first steps weigh more."""
    decay = min(run.recipe.train.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(distributed.local_shards(run.ema), distributed.local_shards(run.engine.params), 1 - decay)


def save(run: TrainingRun, step: int, screen: Terminal) -> None:
    """Writes a checkpoint, scores it if checkpoints are chosen by score, and deletes the older ones that are not needed."""
    if not (run.writes or distributed.is_sharded()):
        return
    parts = {part: distributed.gather(tensors) for part, tensors in checkpoint_parts(run.engine, run.ema).items()}
    if run.writes:
        _write_checkpoint(run, step, parts)
    _score_checkpoint(run, step, screen)
    if run.writes:
        _prune(run)


def _write_checkpoint(run: TrainingRun, step: int, parts: checkpoint.Checkpoint) -> None:
    if not all(v.isfinite().all() for part in ("trained", "average") for v in parts[part].values()):
        raise UserError(divergence_message(run.folder, run.engine, f"a weight is not finite after step {step}"))
    for log in (run.folder / FILE, run.folder / checkpoint_selection.FILE):
        if log.exists():
            sync(log)  # a checkpoint never outlives the rows before it
    with writing(_checkpoint(run, step)) as temporary:
        temporary.mkdir()
        checkpoint.save_state(temporary / load_run.STATE, parts, step)
        _record(run, temporary)


def checkpoint_parts(train: engine.Engine, ema: list[Tensor]) -> checkpoint.Checkpoint:
    """What a checkpoint holds; the tensors are the live ones, on their device, but for those of split weights."""
    parts = {
        "trained": methods.state(train.model, train.recipe),
        "optimizer": checkpoint.optimizer_tensors(train.optimizer),
        "average": {str(i): mean for i, mean in enumerate(ema or train.averaged())},
    }
    if train.scaler.is_enabled():
        parts["scaler"] = {k: torch.tensor(v) for k, v in train.scaler.state_dict().items()}
    return parts


def _prune(run: TrainingRun) -> None:
    steps = {_choice(run).step} if run.dev and run.dev.scored else set()
    if steps and run.recipe.choose.strengths:
        steps.add(max(run.dev.scored, key=checkpoint_selection.identity).step)
    protect = [_checkpoint(run, step).name for step in steps]
    run_folder.prune_checkpoints(run.folder, run.recipe.train.keep, protect=protect, spare=_spares(run), spares=SPARES)


def _spares(run: TrainingRun) -> list[str]:
    return [p.name for p in run_folder.checkpoints(run.folder) if not is_scheduled(run.recipe, int(p.name[5:]))]


def _record(run: TrainingRun, path: Path) -> None:
    """Put the SHA-256 of a checkpoint or the result into the manifest, by which a reader knows it as it was written.

    It is still under its temporary name: after a kill none lies there that the manifest does not know.
    """
    run.manifest["sha256"] = run.manifest.get("sha256", {}) | {path.name: content_hash(path)}
    run_folder.write_manifest(run.folder, run.manifest)


def _score_checkpoint(run: TrainingRun, step: int, screen: Terminal) -> None:
    due = run.dev and is_scored(run.recipe, step) and not any(s.step == step for s in run.dev.scored)
    if not distributed.rank0_decides(bool(due)):
        return
    model, line = run.data.model, f"step {step} is not scored"
    with or_skipped(line, screen), validation.eval_mode(model, run.engine.params, run.average), sharding.whole(model):
        if due:
            screen.say(run.dev.score(step).words())
    run.data.release()


@contextmanager
def or_skipped(what: str, screen: Terminal) -> Iterator[None]:
    """What does not fit in memory inside is left out, which is said: the training goes on without it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        screen.say(f"{what}: {str(error).splitlines()[0]}")


@contextmanager
def step_fits(run: TrainingRun) -> Iterator[None]:
    """UserError where the training step inside does not fit in memory: what to turn, and from where the run goes on."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        switches, kept = memory_switches(run.recipe), run_folder.checkpoints(run.folder)
        remedy = (
            f"Give --set {switches[0][0]}, the first that `personalize plan` would turn" if switches else "Train less at once"
        )
        raise UserError(
            f"a training step does not fit in the memory of {run.data.model.device} ({str(error).splitlines()[0]}). {remedy}, "
            f"or free memory there. {f'The last checkpoint is {kept[-1]}.' if kept else 'There is no checkpoint yet.'}"
        ) from None


def restore(run: TrainingRun, screen: Terminal) -> int:
    """Loads the newest checkpoint -> its step, or 0 where there is none."""
    states = [f / load_run.STATE for f in run_folder.checkpoints(run.folder) if (f / load_run.STATE).exists()]
    newest = distributed.broadcast_from_rank0(states[-1] if states else None)
    if newest is None:
        if run.recipe.train.init_from:
            methods.start_from(run.data.model, run.recipe)
        _drop_rows_after(run, 0)
        return 0
    step = load_checkpoint(run, newest.parent)
    _drop_rows_after(run, step)
    screen.say(f"resuming {run.folder} after step {step}")
    _score_checkpoint(run, step, screen)  # a stop may have come between saving, scoring and deleting
    if run.writes:
        _prune(run)
    return step


def load_checkpoint(run: TrainingRun, folder: Path) -> int:
    """Loads all that a checkpoint holds into what trains -> its step. UserError for one that has changed."""
    load_run.require_unchanged(folder, run.manifest)
    parts, step = checkpoint.load_state(folder / load_run.STATE)
    methods.restore(run.data.model, run.recipe, parts["trained"])
    checkpoint.restore_optimizer(run.engine.optimizer, parts["optimizer"])
    for i, mean in enumerate(run.ema):
        mean.copy_(distributed.shard_like(parts["average"][str(i)], mean))
    if "scaler" in parts:
        run.engine.scaler.load_state_dict({k: v.item() for k, v in parts["scaler"].items()})
    return step


def _drop_rows_after(run: TrainingRun, step: int) -> None:
    """Removes from the run's logs and dev images what came after the checkpoint from which it resumes."""
    if not run.writes:
        return
    logs = {run.folder / FILE: lambda row: True}
    if run.dev:  # of a run that was finished and is extended: its last step and other strengths, which count at the end only
        scored = lambda row: is_scored(run.recipe, row["step"]) and row.get("strength", 1.0) == 1  # noqa: E731
        logs[run.folder / checkpoint_selection.FILE] = scored
    for log, counts in logs.items():
        rows = [row for row in read_jsonl(log) if row["step"] <= step and counts(row)]
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
    for folder in (run.folder / "choosing").glob("step-*"):
        number = folder.name.split("-")[1]
        if number.isdecimal() and int(number) > step:
            remove_folder(folder)
    if run.dev:
        run.dev.scored = checkpoint_selection.read_scored(run.folder / checkpoint_selection.FILE)


def finish(run: TrainingRun, screen: Terminal) -> None:
    """Saves the result in model/: the chosen checkpoint, or the last weights, or their EMA if one is kept."""
    if not run.writes:
        return
    model = run.data.model
    if distributed.is_sharded():
        _load_whole(run)
    for p, mean in zip(run.engine.params, run.average):
        p.data.copy_(mean)
    if run.dev and not run.dev.scored:
        screen.say("keeping the last weights: no checkpoint could be scored")
    elif run.dev:
        with or_skipped("other strengths are not scored", screen):
            _score_strengths(run, screen)
        choice = _choice(run)
        screen.say(f"keeping {choice.why}")
        load_run.require_unchanged(_checkpoint(run, choice.step), run.manifest)
        load_run.load_checkpoint(model, run.recipe, run.engine.params, _checkpoint(run, choice.step))
        methods.set_strength(model, run.recipe, choice.strength, run.base)
        run.manifest |= {"chosen": choice.step, "strength": choice.strength, "why": choice.why}
    for module in model.networks.values():
        module.eval()
    with writing(run.folder / "model") as temporary:
        methods.save(model, temporary, run.recipe)
        _record(run, temporary)
    run_folder.prune_checkpoints(run.folder, run.recipe.train.steps, spare=_spares(run))  # all others stay
    run_folder.write_manifest(run.folder, run.manifest | {"status": "finished"})


def _load_whole(run: TrainingRun) -> None:
    """Puts the last checkpoint into networks read again, for of sharded ones a library saves what one process has."""
    model, run.ema = run.data.model, []  # a checkpoint's weights are the EMA where there is one
    run.engine.optimizer.state.clear()
    model.read_again()
    run.engine.params = [p for group in methods.attach(model, run.recipe) for p in group["params"]]
    if run.dev and run.recipe.choose.strengths:
        run.base = methods.base_state(model, run.recipe)
    load_run.load_checkpoint(model, run.recipe, run.engine.params, run_folder.checkpoints(run.folder)[-1])


def _score_strengths(run: TrainingRun, screen: Terminal) -> None:
    """Scores the best checkpoint at other strengths, as far as `checkpoint_selection.next_strength` asks for it."""
    model, choose = run.data.model, run.recipe.choose
    if not methods.has_strength(run.recipe.train.methods):
        return
    while state := checkpoint_selection.next_strength(_with_files(run), choose.strengths, choose):
        step, strength = state
        load_run.load_checkpoint(model, run.recipe, run.engine.params, _checkpoint(run, step))
        methods.set_strength(model, run.recipe, strength, run.base)
        with validation.eval_mode(model):
            screen.say(run.dev.score(step, strength).words())


def _with_files(run: TrainingRun) -> list[checkpoint_selection.ScoredCheckpoint]:
    return [s for s in run.dev.scored if _checkpoint(run, s.step).exists()]


def _choice(run: TrainingRun) -> checkpoint_selection.Choice:
    """The choice among all scored checkpoints, or among those still there if later scores favour one that was pruned."""
    choice = checkpoint_selection.choose_checkpoint(run.dev.scored, run.recipe.choose)
    if _checkpoint(run, choice.step).exists():
        return choice
    return checkpoint_selection.choose_checkpoint(_with_files(run), run.recipe.choose)


def _checkpoint(run: TrainingRun, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:06d}"


def disk_bytes(run: TrainingRun) -> int:
    """Weights, the optimizer's state and an average for each checkpoint there at once, spares too, plus the result."""
    weights = sum(p.numel() for p in run.engine.params)
    unet = sum(p.numel() for p in run.data.model.unet.parameters())
    train, every = run.recipe.train, run.recipe.choose.every
    interval = min(train.checkpoint_every or 10**9, every or 10**9)
    copies = min(train.keep + 1 + bool(every) + bool(run.recipe.choose.strengths), 1 + train.steps // interval)
    copies += min(SPARES, train.steps - 1) if train.checkpoint_minutes else 0
    row = OPTIMIZERS[train.optimizer]
    each = 4 + row.state_bytes + 4 * (bool(train.ema) or row.averages)
    return weights * each * copies + (4 * unet if "full" in train.methods else 0)
