"""What a run logs while it trains: rows of log.jsonl and accelerate's trackers; and how a signal stops it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from personalize.common import run_folder
from personalize.common.errors import UserError, nearest
from personalize.common.files import append_jsonl
from personalize.training import preflight
from personalize.training.engine import Engine

FILE = "log.jsonl"


class RunLog:
    """Rows of log.jsonl and of the trackers. Losses are read from a GPU every 10 steps, because reading waits for it.

    `line` is the latest row in a few words, for the progress bar. Of several processes one `writes`.
    """

    def __init__(self, folder: Path, engine: Engine, trackers: list, *, writes: bool = True):
        self.folder, self.engine, self.trackers, self.line, self.writes = folder, engine, trackers, "", writes
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self.every = 10 if engine.model.device.type == "cuda" else 1
        self.began = time.monotonic()

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Adds a step's values. Its learning rate is read now, because it has changed when the row is written."""
        self.pending.append((step, self.engine.lr, values))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rows. UserError for a loss that is not finite, before a checkpoint is written."""
        if not self.pending:
            return
        seconds = (time.monotonic() - self.began) / len(self.pending)
        for step, lr, tensors in self.pending:
            row = {k: float(v) for k, v in tensors.items()} | {"lr": lr}
            if self.writes:
                append_jsonl(self.folder / FILE, {"step": step, **row, "seconds": round(seconds, 4)})
            for tracker in self.trackers:
                tracker.log(row, step=step)
            if not row["loss"] < float("inf"):
                raise UserError(divergence_message(self.folder, self.engine, f"the loss became {row['loss']} at step {step}"))
        prior = f", class {row['prior']:.3f}" if row["prior"] else ""
        self.line = f"loss: subject {row['subject']:.3f}{prior}; {preflight.peak_bytes(self.engine.model) / 1e9:.1f} GB"
        self.pending.clear()
        self.began = time.monotonic()


def divergence_message(folder: Path, engine: Engine, event: str) -> str:
    """The message for a run that has diverged: what happened, what is saved, what to do."""
    saved = run_folder.checkpoints(folder)
    good = f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
    return (
        f"{event} (lr {engine.recipe.train.lr:g}, {engine.model.dtype}). {good} "
        "Lower it, as in --set train.lr=1e-6, or compute in --dtype float32."
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
