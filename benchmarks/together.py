"""Seconds a subject of a training step: n LoRAs in one batch against n runs one after the other, on one warm base.

python -m benchmarks.together --subjects 8 --steps 12 [--set train.batch=1 …]

One process, one thread, both ways in turn; the base is loaded and the photos are encoded before.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from personalize.commands import session, train
from personalize.common.terminal import SILENT
from personalize.methods.stacked_lora import Stack
from personalize.training import together
from personalize.training.engine import lr_factor
from personalize.training.manifest import make_manifest

ROOT = Path(__file__).parents[1]
FEW = ["device=cpu", "train.methods=lora", "prior.count=8", "prior.steps=2", "choose.every=0"]


def begun(stack: Stack, n: int, settings: list[str], folder: Path) -> list[tuple]:
    """n subjects of the same photos and other seeds -> their runs and what is attached."""
    pairs = []
    for seed in range(n):
        recipe, sources = session.resolve_subjects(ROOT / "data_examples" / "dog", "dog", None, [*settings, f"seed={seed}"])
        recipe, subjects = train.checked(stack.model, sources, recipe, profile=False, screen=SILENT)
        options = {"root": folder / "priors", "drawn": None, "own": None, "screen": SILENT}
        priors, _ = train.class_folders(stack.model, recipe, subjects, **options)
        manifest = make_manifest(stack.model, recipe, subjects, priors)
        with stack.attaching() as attached:
            run = train.begin(stack.model, recipe, subjects, priors, folder / str(seed), manifest, SILENT)
        pairs.append((run, attached))
    return pairs


def one_by_one(stack: Stack, pairs: list[tuple], steps: range) -> None:
    for run, attached in pairs:
        with stack.alone(attached):
            for step in steps:
                run.engine.step(run.data.at(step), scale=lr_factor(run.recipe, step))


def in_one_batch(stack: Stack, pairs: list[tuple], steps: range) -> None:
    with stack.together([attached for _, attached in pairs]):
        for step in steps:
            together.step([r.engine for r, _ in pairs], [r.data.at(step) for r, _ in pairs], [step] * len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, seconds = options.subjects, {one_by_one: [], in_one_batch: []}
    with ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        settings = [*FEW, *options.set]
        stack = Stack(session.open_base(session.resolve(None, settings), SILENT))
        pairs = begun(stack, n, settings, folder)
        for k in range(options.rounds + 1):
            steps = range(2) if k == 0 else range(options.steps)  # the first round warms up
            for way, times in seconds.items():
                began, cpu = time.perf_counter(), time.process_time()
                way(stack, pairs, steps)
                if k:
                    times.append(((time.perf_counter() - began) / n / len(steps), (time.process_time() - cpu) / n / len(steps)))
    medians = {way.__name__: [statistics.median(column) for column in zip(*times)] for way, times in seconds.items()}
    ratio = [a / b for a, b in zip(*medians.values())]
    print(json.dumps({"subjects": n, "wall, CPU seconds of a step of a subject": medians, "ratio": ratio, "set": options.set}))


if __name__ == "__main__":
    main()
