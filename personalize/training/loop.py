"""The training loop: the steps of a run, and what is saved, scored and drawn between them."""

from pathlib import Path

from personalize.common import distributed, run_folder
from personalize.common.errors import Interrupted
from personalize.common.terminal import Terminal
from personalize.evaluation import checkpoint_selection
from personalize.training import engine, sharding, validation
from personalize.training.log import RunLog, stop_signals
from personalize.training.run import TrainingRun, is_scored, or_skipped, save, step_fits, update_ema


def run_steps(run: TrainingRun, start: int, *, trackers: list, screen: Terminal) -> int:
    """Steps `start` to the last one -> the step it ended at: the last, or where more would only harm."""
    train = run.recipe.train
    log = RunLog(run.folder, run.engine, trackers, writes=run.writes)
    if start and run.dev and run.dev.scored:  # perhaps scored only while resuming
        log.add_scores(run.dev.scored[-1].values(), run.dev.scored[-1].step)
    draws = run.writes or distributed.is_sharded()
    if start and train.sample_every and start % train.sample_every == 0 and draws:  # perhaps stopped before it was drawn
        _sample(run, start, screen)
    if start and run.recipe.choose.every and _ended(run):
        return start
    steps = screen.progress("training", train.steps, done=start, unit="steps")
    with stop_signals() as stopped, steps as advance:
        for step in range(start, train.steps):
            with step_fits(run):
                values = run.engine.step(run.data.at(step), scale=engine.lr_factor(run.recipe, step))
            if train.ema:
                update_ema(run, step)
            log.add(step + 1, values)
            advance(note=log.line)
            last = step + 1 == train.steps
            scored = is_scored(run.recipe, step + 1)
            due = train.checkpoint_every and (step + 1) % train.checkpoint_every == 0
            # Read once: a signal that comes while an image is drawn stops the next step. One process's stops all.
            stop = distributed.any_rank(bool(stopped))
            sampled = train.sample_every and (step + 1) % train.sample_every == 0
            first = sampled and distributed.rank0_decides(not run_folder.checkpoints(run.folder))  # lest the image does not fit
            if due or scored or last or stop or first:
                log.flush()
                save(run, step + 1, screen)
                if scored and run.dev and run.dev.scored and run.dev.scored[-1].step == step + 1:
                    log.add_scores(run.dev.scored[-1].values(), step + 1)
            if sampled and draws and (path := _sample(run, step + 1, screen)):
                log.add_images(path, step + 1)
            if stop and not last:
                raise Interrupted(f"stopped at step {step + 1} of {train.steps}; the same command goes on from there")
            if scored and not last and _ended(run):
                screen.say(f"identity has stalled and the class drifts: ended after step {step + 1} of {train.steps}")
                return step + 1
    return train.steps


def _ended(run: TrainingRun) -> bool:
    stalled = run.dev is not None and checkpoint_selection.stalled(run.dev.scored, run.recipe.choose.patience)
    return distributed.broadcast_from_rank0(stalled)


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
