"""Steps of a run again, in memory: do they give what was logged and the next checkpoint that was saved?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from personalize import methods
from personalize.common import checkpoint, run_folder
from personalize.common.recipe import Recipe
from personalize.training import load_run, loop
from personalize.training.manifest import machine
from personalize.training.run import TrainingRun, checkpoint_parts, load_checkpoint

LOSSES = ("loss", "subject", "prior", "norm")
LOSS_SHARE = 0.02  # by which a loss may differ where bits may
WAY_SHARE = 0.05  # of the way that the weights went, by which they may miss where bits may differ


@dataclass(frozen=True)
class Segment:
    """Steps `first` + 1 to `last`; saved: the checkpoint that they begin from, none for the beginning; next: of `last`."""

    first: int
    last: int
    saved: Path | None
    next: Path | None


def choose_segment(present: list[Path], logged: Mapping[int, dict], steps: int) -> Segment | None:
    """The latest way of at most `steps` steps from one of these checkpoints, or the beginning, to the next; else the latest
    so many logged steps after one; None where nothing is logged.
    """
    starts = [(0, None), *((int(path.name[5:]), path) for path in present)]
    ways = [Segment(a, b, path, following) for (a, path), (b, following) in zip(starts, starts[1:]) if b - a <= steps]
    if ways:
        return ways[-1]
    lasts = [(first, path, min(first + steps, max(logged, default=0))) for first, path in starts]
    return next((Segment(first, last, path, None) for first, path, last in reversed(lasts) if last > first), None)


def why_inexact(run: TrainingRun) -> str:
    """Why the same steps may give other bits here, or "". A manifest from before machines were recorded says nothing of it."""
    here, there = machine(run.data.model), run.manifest.get("machine", {})
    if here["device"] != "cpu" or run.recipe.train.engine == "compiled":
        return f"the device is {here['device']}, which may add in another order each time"
    if many := run.manifest.get("together"):
        return f"it was trained in one batch with {many - 1} other subjects, which adds in another order"
    differing = [f"{key} {there[key]}, here {value}" for key, value in here.items() if there.get(key, value) != value]
    versions = run_folder.library_versions()
    differing += [
        f"{name} {was}, here {versions.get(name)}"
        for name, was in run.manifest.get("versions", {}).items()
        if name in ("torch", "diffusers", "peft", "bitsandbytes") and versions.get(name) != was
    ]
    return f"it was trained with {', '.join(differing)}" if differing else ""


@torch.no_grad()
def copied(parts: checkpoint.Checkpoint) -> dict[str, Tensor]:
    return {f"{part}/{k}": v.detach().to("cpu", copy=True) for part, values in parts.items() for k, v in values.items()}


def replay(run: TrainingRun, segment: Segment, logged: Mapping[int, dict], *, exact: bool) -> list[str]:
    """Trains a segment's steps again -> what differs. Nothing is written; `run` has a fresh base and trains on from it."""
    if segment.saved:
        load_checkpoint(run, segment.saved)
    elif run.recipe.train.init_from:
        methods.start_from(run.data.model, run.recipe)
    before, differs = copied(checkpoint_parts(run.engine, run.ema)), []
    for step in range(segment.first, segment.last):
        values = loop.take_step(run, step, recipe_at(run, step))
        differs += _other_losses(values, logged.get(step + 1, {}), step + 1, exact=exact)
    if segment.next:
        parts, _ = checkpoint.load_state(segment.next / load_run.STATE)
        differs += _other_weights(before, copied(checkpoint_parts(run.engine, run.ema)), copied(parts), exact=exact)
    return differs


def recipe_at(run: TrainingRun, step: int) -> Recipe:
    """The recipe as it was at a step of a run that was extended since."""
    steps = next((e["steps"] for e in run.manifest.get("extended", []) if step < e["step"]), run.recipe.train.steps)
    return replace(run.recipe, train=replace(run.recipe.train, steps=steps))


def _other_losses(values: Mapping[str, Tensor], row: Mapping, step: int, *, exact: bool) -> list[str]:
    names = [name for name in (LOSSES if exact else LOSSES[:1]) if name in row]
    pairs = [(name, float(values[name]), row[name]) for name in names]
    wrong = [pair for pair in pairs if abs(pair[1] - pair[2]) > (0 if exact else LOSS_SHARE * abs(pair[2]))]
    return [f"{name} of step {step} is {now!r}, log.jsonl says {then!r}" for name, now, then in wrong[:1]]


def _other_weights(before: Mapping, now: Mapping, then: Mapping, *, exact: bool) -> list[str]:
    if now.keys() != then.keys():
        return [f"the checkpoint holds other tensors, such as {min(now.keys() ^ then.keys())}"]
    if exact:
        other = [name for name in then if not now[name].equal(then[name])]
        return [f"{len(other)} of {len(then)} tensors differ, such as {other[0]}"] if other else []
    trained = [name for name in then if name.startswith("trained/")]
    missed, way = (
        sum(float((then[name].double() - other[name].double()).square().sum()) for name in trained) ** 0.5
        for other in (now, before)
    )
    return [f"the weights miss the checkpoint by {missed / way:.1%} of the way to it"] if missed > WAY_SHARE * way else []
