"""Commands as processes of their own, one after the other: whoever started them may end and find them again.

A job is 0001.json (command and process), .log (stderr), .out (stdout) and .lock, which its process holds by an
inherited file: it is free as soon as that process has ended, however it ended, and no other process can be taken for it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import explained, make_folder, read_json, write_json
from personalize.common.untrusted import Many, Number, Table, Text

JOB = Table(
    {"words": Many(Text()), "title": Text(), "pid": Number(0, 2**31), "run": Text(), "stopped": Number(0, 1)},
    ("words", "title", "pid"), "Delete it.",
)  # fmt: skip
TAIL = 40_000  # bytes of a log that are read
STOP_LINE = "stopped at step"  # of `train`, on stderr
QUEUED, RUNNING, FINISHED, STOPPED, FAILED = "queued", "running", "finished", "stopped", "failed"


@dataclass(frozen=True)
class Job:
    """A command of the queue. run: the name of the run folder that it trains, once that is known."""

    path: Path
    words: list[str]
    title: str
    state: str
    pid: int
    run: str

    @property
    def log(self) -> str:
        """What it said, without what moves a cursor."""
        return tail(self.path.with_suffix(".log"))

    @property
    def error(self) -> str:
        if self.state != FAILED:
            return ""
        said = [line.partition("error: ")[2] for line in self.log.splitlines() if line.startswith("error: ")]
        return (said or ["it was ended from outside, or the memory ran out; resume it from its last checkpoint"])[-1]


class Jobs:
    """The queue in `folder`: one command at a time, run in `root`, started by whoever calls `tick`. runs: where they train."""

    def __init__(self, folder: Path, *, root: Path, runs: Path):
        self.folder, self.root, self.runs, self.children, self.lock = folder, root, runs, [], threading.RLock()
        make_folder(folder)

    def add(self, words: list[str], title: str) -> Job:
        """Queues `personalize WORDS`. UserError where the same command waits or runs already."""
        with self.lock:
            self._require_idle(words)
            path = self.folder / f"{len(list(self.folder.glob('*.json'))) + 1:04d}.json"
            write_json(path, {"words": words, "title": title, "pid": 0, "run": "", "stopped": 0})
            self.tick()
            return self.read(path)

    def _require_idle(self, words: list[str]) -> None:
        for job in self.all():
            if job.state in (QUEUED, RUNNING) and job.words == words:
                raise UserError(f"{job.title} is {job.state} already; one run is trained by one process.")

    def tick(self) -> None:
        """Starts the next job where none runs."""
        with self.lock, _only(self.folder / "queue.lock") as alone:
            self.children = [child for child in self.children if child.poll() is None]  # reaps those that ended
            jobs = self.all() if alone else []
            if not any(job.state == RUNNING for job in jobs):
                for job in [job for job in jobs if job.state == QUEUED][:1]:
                    self._start(job)

    def _start(self, job: Job) -> None:
        import fcntl

        with explained(job.path), open(job.path.with_suffix(".lock"), "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # waits for those who look at it
            with open(job.path.with_suffix(".log"), "wb") as log, open(job.path.with_suffix(".out"), "wb") as out:
                child = subprocess.Popen(
                    command(job.words), cwd=self.root, stdin=subprocess.DEVNULL, stdout=out, stderr=log,
                    pass_fds=[held.fileno()], start_new_session=True,
                )  # fmt: skip
        self.children.append(child)
        self._write(job.path, pid=child.pid)

    def all(self) -> list[Job]:
        return [self.read(path) for path in sorted(self.folder.glob("*.json"))]

    def read(self, path: Path) -> Job:
        row = read_json(path, JOB)
        state, run = self._state(path, row), row.get("run", "")
        if row["pid"] and not run and (run := self._run_of(path, row, state)):
            self._write(path, run=run)
        return Job(path, row["words"], row["title"], state, row["pid"], run)

    def _state(self, path: Path, row: dict) -> str:
        if _is_held(path.with_suffix(".lock")):  # also where its starter was killed before it wrote the number down
            return RUNNING
        if tail(path.with_suffix(".out")).strip():
            return FINISHED
        if row.get("stopped") or STOP_LINE in tail(path.with_suffix(".log")):
            return STOPPED
        return FAILED if row["pid"] else QUEUED

    def _run_of(self, path: Path, row: dict, state: str) -> str:
        """By the file in a run's folder that names its process while it is held, or by what the command printed."""
        if state == FINISHED:
            return Path(tail(path.with_suffix(".out")).strip().splitlines()[-1]).name
        for holder in self.runs.glob("*/lock"):
            with suppress(UserError):
                if read_json(holder).get("pid") == row["pid"] and state == RUNNING:
                    return holder.parent.name
        return ""

    def _write(self, path: Path, **values) -> None:
        with self.lock:
            write_json(path, read_json(path, JOB) | values)

    def stop(self, name: str) -> None:
        """Takes a job out of the queue, or asks its process to write a checkpoint and end."""
        with self.lock:
            job = self.read(self.path(name))
            if job.state == RUNNING:
                self._write(job.path, stopped=1)
                with suppress(ProcessLookupError):
                    os.kill(job.pid, signal.SIGTERM)
            elif job.state == QUEUED:
                self._write(job.path, stopped=1)

    def resume(self, name: str) -> None:
        """The same command again, which goes on where it stopped."""
        with self.lock:
            job = self.read(self.path(name))
            self._require_idle(job.words)
            for suffix in (".log", ".out"):
                job.path.with_suffix(suffix).unlink(missing_ok=True)
            self._write(job.path, pid=0, stopped=0)
            self.tick()

    def path(self, name: str) -> Path:
        path = self.folder / f"{name}.json"
        if not str(name).isdecimal() or not path.exists():
            raise UserError("choose a training from the queue first.")
        return path

    def keep_going(self) -> None:
        """A thread that starts one job after the other, whether a page is open or not."""

        def work() -> None:
            while True:
                with suppress(UserError, OSError):
                    self.tick()
                time.sleep(1)

        threading.Thread(target=work, daemon=True, name="queue").start()


def command(words: Sequence[str]) -> list[str]:
    """The command line of `personalize WORDS` by this Python."""
    return [sys.executable, "-P", "-m", "personalize", *words]  # -P: not a personalize that lies in the workspace


def call(root: Path, *words: str) -> dict:
    """Runs a command in `root` with --json to its end -> what it printed. UserError with its own message where it failed."""
    done = _run(root, [words[0], "--json", *words[1:]])
    try:
        values = json.loads(done.stdout)
    except ValueError:
        raise UserError(f"`personalize {words[0]}` ended without a result: {done.stderr.strip()[-300:]}") from None
    if "error" in values:
        raise UserError(values["error"]["message"])
    return values


def said(root: Path, *words: str) -> str:
    """Runs a command in `root` to its end -> all that a terminal would show."""
    done = _run(root, words)
    return f"{done.stderr}{done.stdout}".strip()


def _run(root: Path, words: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(words), cwd=root, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
    )


def tail(path: Path) -> str:
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read().decode("utf-8", "replace")
    return ""


@contextmanager
def _only(path: Path) -> Iterator[bool]:
    """Whether, inside, this process alone has the lock file."""
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _is_held(path: Path) -> bool:
    """Whether a process that was started holds the lock file; those who ask at the same time do not hinder each other."""
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
