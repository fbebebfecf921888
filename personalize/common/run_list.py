"""Run folders as a list shows them: the manifest, or why it cannot be read, what they were scored, and their size."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_json, remove_folder
from personalize.common.run_folder import checkpoints, lock, read_manifest


@dataclass(frozen=True)
class Run:
    """A run folder as a list shows it. problem: why its manifest cannot be read, or ""."""

    folder: Path
    manifest: dict
    problem: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        return "unreadable" if self.problem else self.manifest["status"]


def list_runs(root: Path) -> list[Run]:
    """All run folders in `root`, the latest first; those whose manifest cannot be read too."""
    runs = [read_run(path.parent) for path in sorted(root.glob("*/manifest.json"), key=_time, reverse=True)]
    return [run for run in runs if run.problem or run.manifest.get("kind", "run") == "run"]


def read_run(folder: Path) -> Run:
    """The run in a folder, whatever its manifest is."""
    try:
        return Run(folder, read_manifest(folder))
    except UserError as error:
        return Run(folder, {}, str(error))


def _time(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def disk(folder: Path) -> tuple[int, int]:
    """Files and bytes of a folder."""
    sizes = [path.lstat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def delete_run(run: Run) -> None:
    """UserError where a process holds it."""
    with lock(run.folder):
        remove_folder(run.folder)


def evaluation(run: Run) -> dict | None:
    """The metrics of a run's newest evaluation, or None where it was not evaluated."""
    path = run.folder / "evaluation" / "metrics.json"
    with suppress(UserError):
        return read_json(path) if path.exists() else None
    return None


def states(run: Run) -> Iterator[str]:
    """What a run can be drawn by, the newest first: "result", and its checkpoints' steps."""
    if (run.folder / "model").is_dir():
        yield "result"
    yield from (str(int(path.name[5:])) for path in reversed(checkpoints(run.folder)))
