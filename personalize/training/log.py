"""What a run logs while it trains: rows of log.jsonl and accelerate's trackers; and how a signal stops it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from personalize.common import run_folder
from personalize.common.errors import UserError, nearest
from personalize.common.files import append_jsonl
from personalize.common.optimizers import OPTIMIZERS
from personalize.training import preflight
from personalize.training.engine import Engine

FILE = "log.jsonl"
DEAD_STEPS = 10  # the first steps of a run or its rest


class RunLog:
    """Rows of log.jsonl and of the trackers. Losses are read from a GPU every 10 steps, because reading waits for it.

    `line` is the latest row in a few words, for the progress bar. Of several processes one `writes`.
    """

    def __init__(self, folder: Path, engine: Engine, trackers: list, *, writes: bool = True):
        self.folder, self.engine, self.trackers, self.line, self.writes = folder, engine, trackers, "", writes
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self.every = 10 if engine.model.device.type == "cuda" else 1
        self.began, self.without_gradient = time.monotonic(), 0

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Adds a step's values. Its learning rate is read now, because it has changed when the row is written."""
        self.pending.append((step, self.engine.lr, values))
        if len(self.pending) >= self.every:
            self.flush()

    def add_images(self, path: Path, step: int) -> None:
        """Gives a grid of sample images to the trackers that show images."""
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):
                grid = np.asarray(Image.open(path).convert("RGB"))
                grid = grid.transpose(2, 0, 1) if tracker.name == "tensorboard" else grid  # (3,H,W), others take (H,W,3)
                tracker.log_images({"samples": grid[None]}, step=step)

    def add_scores(self, values: dict[str, float], step: int) -> None:
        """Gives a checkpoint's scores to the trackers."""
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def flush(self) -> None:
        """Writes the pending rows. UserError, before a checkpoint is written, for a loss that is not finite and for ten first
        steps without a gradient.
        """
        if not self.pending:
            return
        seconds = (time.monotonic() - self.began) / len(self.pending)
        for step, lr, tensors in self.pending:
            row = {k: float(v) for k, v in tensors.items()} | {"lr": lr}
            if self.writes:
                append_jsonl(self.folder / FILE, {"step": step, **row, "seconds": round(seconds, 4)})
            for tracker in self.trackers:
                tracker.log(row, step=step)
            self.without_gradient += 1 if row["norm"] == 0 else -math.inf
            if self.without_gradient == DEAD_STEPS:
                raise UserError(
                    f"nothing trains: the gradient was zero at each of {DEAD_STEPS} steps. Check that the prompts say the "
                    "token ({token} in train.prompt and captions), and that train.prior_weight is not all there is."
                )
            if not row["loss"] < float("inf"):
                raise UserError(divergence_message(self.folder, self.engine, f"the loss became {row['loss']} at step {step}"))
        prior = f", class {row['prior']:.3f}" if row["prior"] else ""
        self.line = f"loss: subject {row['subject']:.3f}{prior}; {preflight.peak_bytes(self.engine.model.device) / 1e9:.1f} GB"
        self.pending.clear()
        self.began = time.monotonic()


def divergence_message(folder: Path, engine: Engine, event: str) -> str:
    """The message for a run that has diverged: what happened, what is saved, what to do."""
    saved = run_folder.checkpoints(folder)
    good = f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
    train = engine.recipe.train
    lower = "0.2" if "train.lr" in OPTIMIZERS[train.optimizer].starts else "1e-6"  # Prodigy's is near 1
    return (
        f"{event} (lr {train.lr:g}, {engine.model.dtype}). {good} "
        f"Lower it, as in --set train.lr={lower}, or compute in --dtype float32."
    )


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError for a name that accelerate does not know."""
    if names and (unknown := [name for name in names if name not in _kinds()]):
        known = ", ".join(sorted(_kinds()))
        hint = nearest(unknown[0], _kinds()) or "."
        raise UserError(f"unknown tracker {unknown[0]!r} in train.trackers{hint} Known: {known}.")


def start_trackers(names: tuple[str, ...], folder: Path) -> list:
    """accelerate's trackers, by the names in the recipe. UserError where a package is missing."""
    trackers = []
    for name in names:
        kind = _kinds()[name]
        options = {"logging_dir": folder} if kind.requires_logging_directory else {}
        try:
            tracker = kind(folder.name, **options)
            tracker.start()
        except ImportError as error:
            raise UserError(f"tracker {name!r} needs a package that is not installed: {error}") from error
        trackers.append(tracker)
    return trackers


def _kinds() -> dict:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM only fills the list, so that a checkpoint is written; the second stops at once."""
    stopped: list[int] = []

    def handle(number: int, _) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {}
    with suppress(ValueError):  # outside the main thread Python sets no handlers
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
