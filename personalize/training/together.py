"""Several subjects' runs trained in one batch on one base: each step takes the rows that every run would take alone.

A run keeps its own batches, loss, clipping, optimizer, schedule, log and checkpoints; only the passes through the networks
are shared. Its gradients are those of a run alone to rounding, for a sum of losses has as its gradient for an adapter that
of the one loss that the adapter is in.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from personalize.common.errors import Interrupted, UserError
from personalize.common.recipe import Recipe, flat_settings
from personalize.common.terminal import Terminal
from personalize.core.guidance import Cond
from personalize.core.losses import dreambooth_loss
from personalize.data.batch import Batch
from personalize.methods.stacked_lora import Attached, Stack
from personalize.training import loop
from personalize.training.checkpoint_schedule import Clock
from personalize.training.engine import Engine, lr_factor
from personalize.training.log import RunLog, start_trackers, stop_signals
from personalize.training.loss import loss_of_output
from personalize.training.run import TrainingRun, finish, restore, step_fits, update_ema

# Settings by which one batch is computed: equal for all its subjects. Any other may differ from subject to subject.
SHARED = (
    "base", "device", "dtype", "vae", "prediction", "zero_snr", "base_vae", "prompt.chunks", "prompt.weighting", "photos.size",

    "train.methods", "train.text_encoder", "train.batch", "train.prior_batch", "train.accumulate",
    "train.gradient_checkpointing", "train.engine", "train.quantize", "train.offload",
    "lora.rank", "lora.alpha", "lora.targets", "lora.conv", "lora.dora", "lora.rslora",
)  # fmt: skip


def shared_settings(recipe: Recipe) -> dict:
    """The settings that all subjects of a batch have alike; rows of a table may be grouped by them."""
    flat = flat_settings(recipe)
    preserves = bool(recipe.prior.count and recipe.train.prior_weight) and recipe.train.methods != ("textual-inversion",)
    return {key: flat[key] for key in SHARED} | {"class images or predictions": preserves}


def check_alike(recipes: Sequence[Recipe]) -> None:
    """UserError for subjects that one batch cannot hold."""
    first = shared_settings(recipes[0])
    for number, recipe in enumerate(recipes[1:], 2):
        for key, value in shared_settings(recipe).items():
            if value != first[key]:
                raise UserError(
                    f"subjects 1 and {number} cannot train in one batch: {key} is {first[key]!r} and {value!r}. Give both the "
                    "same, or train them one by one."
                )


@dataclass
class Member:
    """One subject's run among those of a batch. steps: those done; began: those done before."""

    run: TrainingRun
    attached: Attached
    scope: ExitStack  # what is held while the run trains: its lock, and the mark of what stops it
    steps: int = 0
    began: int = 0
    log: RunLog | None = None
    clock: Clock | None = None
    error: BaseException | None = None
    ended: bool = False


def train_members(stack: Stack, members: list[Member], screen: Terminal) -> None:
    """Trains all to their ends. One that fails has its `error` and the others go on; Interrupted where a signal stops all."""
    for member in members:
        with _own_error(member), stack.alone(member.attached):
            _start(member, screen)
    total = sum(m.run.recipe.train.steps - m.steps for m in members if not m.ended)
    with stop_signals() as stopped, screen.progress("training", total, unit="steps of all subjects") as advance:
        while live := [m for m in members if not m.ended]:
            with stack.together([m.attached for m in live]):
                stop = _step_until_due(live, stopped, advance)
            for member in [m for m in live if not m.ended]:
                if stop or loop.is_due(member.run, member.clock, member.steps):
                    with _own_error(member), stack.alone(member.attached):
                        _after(member, stop, screen)
    if any(isinstance(m.error, Interrupted) for m in members):
        raise Interrupted(f"stopped with {len(members)} subjects in a batch; the same command goes on from there")


@contextmanager
def ended_by_errors(members: Collection[Member]) -> Iterator[None]:
    """What stops the work inside stops every run that has not ended."""
    try:
        yield
    except BaseException as error:
        for member in members:
            if not member.ended:
                _close(member, error)
        raise


def _step_until_due(live: list[Member], stopped: list, advance: Callable) -> bool:
    """Steps of all until something is to be done for one alone -> whether a signal says stop."""
    while True:
        with step_fits(live[0].run):
            rows = step([m.run.engine for m in live], [m.run.data.at(m.steps) for m in live], [m.steps for m in live])
        for member, values in zip(live, rows, strict=True):
            with _own_error(member):
                if member.run.recipe.train.ema:
                    update_ema(member.run, member.steps)
                member.steps += 1
                member.log.add(member.steps, values)
        advance(len(live), note=live[0].log.line)
        stop = bool(stopped)
        if stop or any(m.ended or loop.is_due(m.run, m.clock, m.steps) for m in live):
            return stop


def step(engines: list[Engine], batches: list[Batch], steps: list[int]) -> list[dict[str, Tensor]]:
    """One update of every subject, at the step where it is -> what `Engine.step` gives, of each."""
    totals = backward(engines, batches)
    return [
        engine.step_by_gradients(each, scale=lr_factor(engine.recipe, at))
        for engine, each, at in zip(engines, totals, steps, strict=True)
    ]


def backward(engines: list[Engine], batches: list[Batch]) -> list[Tensor]:
    """Adds every subject's gradients -> (3,) of each: loss, subject, prior. n batches of m rows, as `Stack.together` wants."""
    model, m = engines[0].model, len(batches[0].z0)
    assert all(len(batch.z0) == m for batch in batches), [len(batch.z0) for batch in batches]
    totals = [torch.zeros(3, device=model.device) for _ in engines]
    size = -(-m // engines[0].recipe.train.accumulate)
    for start in range(0, m, size):
        rows, scaled = slice(start, min(start + size, m)), []
        with (
            record_function("forward and loss"),
            torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32),
        ):
            out = model.predict(*_inputs(model, batches, rows), conditioning(model, batches, rows))
            for i, own in enumerate(out.chunk(len(batches))):
                parts = _losses(engines[i], batches[i], rows, own)
                scaled.append(engines[i].scaler.scale(parts[0]))
                totals[i] += torch.stack(parts).detach()
        with record_function("backward"):
            torch.stack(scaled).sum().backward()
    return totals


def _inputs(model, batches: list[Batch], rows: slice) -> tuple[Tensor, Tensor]:
    """z_t (n m,C,h,w) and t (n m,) of some rows of each batch."""
    parts = [(b.z0[rows], (b.eps if b.noise is None else b.noise)[rows], b.t[rows]) for b in batches]
    z0, noise, t = (torch.cat(part) for part in zip(*parts))
    return model.schedule.add_noise(z0, noise, t), t


def conditioning(model, batches: list[Batch], rows: slice) -> Cond:
    """The conditioning of some rows of each batch, one batch after the other."""
    if batches[0].prompts is None:
        conds = [batch.cond(rows) for batch in batches]
        return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
    prompts = [batch.prompts(rows) for batch in batches]
    distinct = [list(dict.fromkeys(texts)) for texts in prompts]
    most = max(map(len, distinct))  # as many of each subject, which some fill up
    texts = model.encode_prompts([own[min(i, len(own) - 1)] for own in distinct for i in range(most)])
    places = [k * most + distinct[k].index(text) for k, own in enumerate(prompts) for text in own]
    index = torch.tensor(places, device=model.device)
    besides = {key: torch.cat([batch.beside[key][rows] for batch in batches]) for key in batches[0].beside}
    return {key: value[index] for key, value in texts.items()} | besides


def _losses(engine: Engine, batch: Batch, rows: slice, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, subject, prior of some rows of one subject's batch, as parts of those of all its rows."""
    train = engine.recipe.train
    inputs = batch.loss_inputs(rows)
    per_image = loss_of_output(engine.model.schedule, out, batch.z0[rows], **inputs, snr_gamma=train.snr_gamma)
    is_prior = batch.is_prior[rows].to(per_image.device)
    return dreambooth_loss(per_image, is_prior, train.prior_weight, counts=batch.counts)


def _start(member: Member, screen: Terminal) -> None:
    run = member.run
    if run.recipe.train.ema:
        run.ema = [p.detach().clone() for p in run.engine.params]
    member.began = member.steps = restore(run, screen)
    trackers = start_trackers(run.recipe.train.trackers, run.folder)
    for tracker in trackers:
        member.scope.callback(tracker.finish)
    member.log = loop.begin_log(run, member.steps, trackers=trackers, screen=screen)
    member.clock, last = Clock(run.recipe.train.checkpoint_minutes), member.steps == run.recipe.train.steps
    if last or (member.steps and loop.end_early(run, member.steps, screen)):
        _finish(member, screen)


def _after(member: Member, stop: bool, screen: Terminal) -> None:
    """What is due after the latest step."""
    run, at = member.run, member.steps
    if loop.after_step(run, member.log, member.clock, at, stop=stop, screen=screen) or at == run.recipe.train.steps:
        _finish(member, screen)


def _finish(member: Member, screen: Terminal) -> None:
    finish(member.run, screen)
    member.ended = True
    member.scope.close()


@contextmanager
def _own_error(member: Member) -> Iterator[None]:
    """What goes wrong inside with one subject is its own error, and ends its run alone."""
    try:
        yield
    except (UserError, OSError, Interrupted) as error:
        member.error = error
        _close(member, error)


def _close(member: Member, error: BaseException) -> None:
    member.ended = True
    member.scope.__exit__(type(error), error, error.__traceback__)
