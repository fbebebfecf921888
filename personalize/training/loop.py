"""The training loop: the steps of a run, and what is saved, scored and drawn between them."""

from pathlib import Path

from torch import Tensor

from personalize.common import distributed
from personalize.common.errors import Interrupted
from personalize.common.recipe import Recipe
from personalize.common.run_folder import SAVE_NOW
from personalize.common.terminal import Terminal
from personalize.evaluation import checkpoint_selection
from personalize.training import engine, sharding, validation
from personalize.training.checkpoint_schedule import Clock, is_scheduled, is_scored
from personalize.training.fixed_loss import saved_seconds
from personalize.training.log import RunLog, stop_signals
from personalize.training.preflight import duration
from personalize.training.run import TrainingRun, or_skipped, save, step_fits, update_ema

DVAR = "the photos' loss on fixed noise hardly varies any more (DVAR)"


def run_steps(run: TrainingRun, start: int, *, trackers: list, screen: Terminal) -> int:
    """Steps `start` to the last one -> the step it ended at: the last, or where more would only harm."""
    train = run.recipe.train
    log, clock = begin_log(run, start, trackers=trackers, screen=screen), Clock(train.checkpoint_minutes)
    if start and start < train.steps and end_early(run, start, screen):
        return start
    with stop_signals() as stopped, screen.progress("training", train.steps, done=start, unit="steps") as advance:
        for step in range(start + 1, train.steps + 1):
            values = take_step(run, step - 1, run.recipe)
            log.add(step, values | run.fixed.measure(step, run.engine) if run.fixed else values)
            advance(note=log.line)
            # Read once: a signal that comes while an image is drawn stops the next step. One process's stops all.
            if after_step(run, log, clock, step, stop=distributed.any_rank(bool(stopped)), screen=screen):
                return step
    return train.steps


def begin_log(run: TrainingRun, start: int, *, trackers: list, screen: Terminal) -> RunLog:
    """The log of a run that goes on from a step, and what was perhaps not drawn or told when it stopped there."""
    log, every = RunLog(run.folder, run.engine, trackers, writes=run.writes), run.recipe.train.sample_every
    if start and run.dev and run.dev.scored:  # perhaps scored only while resuming
        log.add_scores(run.dev.scored[-1].values(), run.dev.scored[-1].step)
    if start and every and start % every == 0 and _draws(run):  # perhaps stopped before it was drawn
        _sample(run, start, screen)
    if start and run.fixed:
        run.fixed.read_log(run.folder)
    return log


def is_due(run: TrainingRun, clock: Clock, step: int) -> bool:
    """Whether `after_step` has anything to do for a run that no signal stops."""
    every = run.recipe.train.sample_every
    return (
        is_scheduled(run.recipe, step)
        or _is_wanted(run)
        or _has_enough(run, step)
        or clock.is_due()
        or bool(every and step % every == 0)
    )


def after_step(run: TrainingRun, log: RunLog, clock: Clock, step: int, *, stop: bool, screen: Terminal) -> bool:
    """What is saved, scored and drawn after a step -> whether the run ends with it, before its last.

    Interrupted where it is to `stop`, which is saved.
    """
    train, wanted = run.recipe.train, _is_wanted(run)
    if is_scheduled(run.recipe, step) or stop or _has_enough(run, step) or wanted or clock.is_due():
        log.flush()
        save(run, step, screen)
        clock.reset()
        if is_scored(run.recipe, step) and run.dev and run.dev.scored and run.dev.scored[-1].step == step:
            log.add_scores(run.dev.scored[-1].values(), step)
    sampled = wanted or train.sample_every and step % train.sample_every == 0
    if sampled and _draws(run) and (path := _sample(run, step, screen)):
        log.add_images(path, step)
    if wanted and run.writes:
        (run.folder / SAVE_NOW).unlink(missing_ok=True)
    if stop and step < train.steps:
        raise Interrupted(f"stopped at step {step} of {train.steps}; the same command goes on from there")
    return step < train.steps and end_early(run, step, screen)


def _is_wanted(run: TrainingRun) -> bool:
    """Whether a file in the run's folder asks for a checkpoint and sample images now."""
    return distributed.rank0_decides(run.writes and (run.folder / SAVE_NOW).exists())


def _has_enough(run: TrainingRun, step: int) -> bool:
    return run.fixed is not None and step < run.recipe.train.steps and run.fixed.stops(step)


def _draws(run: TrainingRun) -> bool:
    return run.writes or distributed.is_sharded()


def take_step(run: TrainingRun, step: int, rates: Recipe) -> dict[str, Tensor]:
    """One update at step 0… -> its losses. rates: the recipe whose lr schedule it follows."""
    with step_fits(run):
        values = run.engine.step(run.data.at(step), scale=engine.lr_factor(rates, step))
    if run.recipe.train.ema:
        update_ema(run, step)
    return values


def _why_ended(run: TrainingRun, step: int) -> str:
    """Why a run ends at a step before its last one, or ""."""
    if is_scored(run.recipe, step):
        stalled = run.dev is not None and checkpoint_selection.stalled(run.dev.scored, run.recipe.choose.patience)
        if distributed.broadcast_from_rank0(stalled):
            return "identity has stalled and the class drifts"
    return DVAR if run.fixed and run.fixed.stops(step) else ""


def end_early(run: TrainingRun, step: int, screen: Terminal) -> bool:
    """Whether a run ends at a step before its last one; says why, and what it saves; DVAR's stop is in the manifest too."""
    if not (why := _why_ended(run, step)):
        return False
    steps, line = run.recipe.train.steps, f"{why}: ended after step {step} of {run.recipe.train.steps}"
    if why == DVAR and run.writes:
        seconds = saved_seconds(run.folder, steps - step)
        run.manifest["stopped"] = {
            "rule": "dvar",
            "step": step,
            "steps_saved": steps - step,
            "seconds_saved": round(seconds, 1),
        }
        line += f", which saves about {duration(seconds)}"
    screen.say(line)
    return True


def _sample(run: TrainingRun, step: int, screen: Terminal) -> Path | None:
    """Draws the sample images of a step, unless they are there; None where they do not fit in memory."""
    path = run.folder / "samples" / f"step-{step:06d}.png"
    prompts = [run.manifest["subjects"][0]["prompt"]] * 4 + [run.data.prompts[len(run.data.photos)]] * 4
    model, averaged = run.data.model, run.engine.averaged
    if distributed.rank0_decides(not path.exists()):
        line, params = f"no sample images of step {step}", run.engine.params
        with or_skipped(line, screen), validation.eval_mode(model, params, averaged()), sharding.whole(model):
            if run.writes:
                validation.draw_samples(model, run.recipe, prompts, path)
        run.data.release()
    return path if path.exists() else None
