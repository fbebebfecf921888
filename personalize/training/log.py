"""What a run tells while it trains: rows of log.jsonl, accelerate's trackers; and how a signal asks it to stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from personalize.common import run_folder
from personalize.common.errors import UserError, nearest
from personalize.training import preflight
from personalize.training.engine import Engine

FILE = "log.jsonl"


class RunLog:
    """Rows of log.jsonl and of the trackers. Losses are read from a GPU every 10 steps: reading waits.

    `line` is the newest row in a few words, for the progress bar. Of several processes one `writes`.
    """

    def __init__(self, folder: Path, engine: Engine, trackers: list, *, writes: bool = True):
        self.folder, self.engine, self.trackers, self.line, self.writes = folder, engine, trackers, "", writes
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self.every = 10 if engine.model.device.type == "cuda" else 1
        self.began = time.monotonic()

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """A step's values; its learning rate is read now, for it is another one when the row is written."""
        self.pending.append((step, self.engine.lr, values))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. UserError for a loss that is no number, before any checkpoint could keep it."""
        if not self.pending:
            return
        pace = (time.monotonic() - self.began) / len(self.pending)
        for step, lr, tensors in self.pending:
            row = {k: float(v) for k, v in tensors.items()} | {"lr": lr}
            if self.writes:
                run_folder.append_jsonl(self.folder / FILE, {"step": step, **row, "seconds": round(pace, 4)})
            for tracker in self.trackers:
                tracker.log(row, step=step)
            if not row["loss"] < float("inf"):
                raise UserError(not_a_number(self.folder, self.engine, f"the loss became {row['loss']} at step {step}"))
        prior = f", class {row['prior']:.3f}" if row["prior"] else ""
        self.line = f"loss: subject {row['subject']:.3f}{prior}; {preflight.peak_bytes(self.engine.model) / 1e9:.1f} GB"
        self.pending.clear()
        self.began = time.monotonic()


def not_a_number(folder: Path, engine: Engine, what: str) -> str:
    """The message for a run that has diverged: what happened, what is kept, what to do."""
    kept = run_folder.checkpoints(folder)
    good = f"The last good checkpoint is {kept[-1]}." if kept else "There is no checkpoint yet."
    return (
        f"{what} (lr {engine.recipe.train.lr:g}, {engine.model.dtype}). {good} "
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
    made = []
    for name in names:
        kind = _kinds()[name]
        options = {"logging_dir": folder} if kind.requires_logging_directory else {}
        try:
            tracker = kind(folder.name, **options)
            tracker.start()
        except ImportError as error:
            raise UserError(f"tracker {name!r} needs a package that is not installed: {error}") from error
        made.append(tracker)
    return made


def _kinds() -> dict:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM only fill the list, so that a step ends and a checkpoint is written; twice is at once."""
    stopped: list[int] = []

    def note(number: int, frame) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {}
    with suppress(ValueError):  # not in the main thread, where Python lets nobody set handlers
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
