"""Run and prior folders: the manifest, the lock that lets one process hold a folder, checkpoints."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from personalize.common.errors import Interrupted, UserError
from personalize.common.files import explained, read_json, remove_folder, sweep, write_json
from personalize.common.untrusted import Number, Table, Text

SCHEMA = 2
SAVE_NOW = "save-now"  # a file of any content in the folder of a run that trains: it saves and samples itself
STATUSES = ("running", "interrupted", "finished", "failed")
MANIFEST = Table(
    {"schema": Number(0, 1_000_000), "status": Text(STATUSES), "kind": Text(most=100)},
    ("status",),
    "Restore or delete the folder.",
)
LIBRARIES = (
    "personalize", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tokenizers",
    "huggingface-hub", "numpy", "pillow", "bitsandbytes", "prodigyopt", "schedulefree",
)  # fmt: skip


def write_manifest(folder: Path, manifest: Mapping) -> None:
    """Write a folder's manifest.json with this schema's number. UserError where a newer personalize wrote it."""
    assert manifest["status"] in STATUSES, manifest["status"]
    path = Path(folder) / "manifest.json"
    if path.exists():
        read_manifest(folder)
    write_json(path, {**manifest, "schema": SCHEMA})


def read_manifest(folder: Path) -> dict:
    """A folder's manifest, of this schema or an older one. UserError for a newer one."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} is not a folder that personalize made: it has no manifest.json. Check the path.")
    manifest = read_json(path, MANIFEST)
    if (schema := manifest.get("schema", 0)) > SCHEMA:
        raise UserError(
            f"{path} has schema {schema}; this personalize reads up to {SCHEMA}. Update it: pip install -U personalize"
        )
    return manifest


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """What stops the work inside is in the folder's manifest: "interrupted" or "failed". The first error is the one told."""
    try:
        yield
    except BaseException as error:
        with suppress(UserError, OSError):
            stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
            write_manifest(folder, read_manifest(folder) | {"status": "interrupted" if stopped else "failed"})
        raise


@contextmanager
def lock(folder: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder for this process, and remove what a killed writer left there. UserError names the holder.

    wait: told who holds it, instead of that error; then the folder is waited for.

    The lock is one of the system on the file `lock.flock`, which stays: it is free as soon as its holder's process has ended,
    however it ended. The file `lock` says who holds the folder, for the message alone.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    holder = folder / "lock"
    with explained(holder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(folder / "lock.flock").acquire(blocking=False)
        except Timeout:
            if wait is None:
                raise UserError(f"{folder} is held by {_holder(holder)}. Let it finish first.") from None
            wait(f"waiting for {folder}, which {_holder(holder)} holds")
            held = FileLock(folder / "lock.flock").acquire(poll_interval=0.2)
    with held:
        try:
            with explained(holder):
                holder.write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}), encoding="utf-8")
            sweep(folder)
            yield
        finally:
            with suppress(OSError):  # of a file system that became read-only: another error is on its way
                holder.unlink(missing_ok=True)


def newest_run(root: Path, status: str = "finished") -> Path:
    """The run folder in `root` with this status whose manifest was written last. UserError where there is none."""
    statuses: Counter[str] = Counter()
    runs = []
    for path in Path(root).glob("*/manifest.json"):
        try:
            manifest = read_manifest(path.parent)
            run_status = "student of a base" if manifest.get("kind") == "student" else str(manifest.get("status"))
        except UserError:
            run_status = "unreadable"
        statuses[run_status] += 1
        if run_status == status:
            runs.append((path.stat().st_mtime_ns, path.parent))
    if not runs:
        others = ", ".join(f"{n} {name}" for name, n in sorted(statuses.items())) or "no run at all"
        raise UserError(
            f"no {status} run in {Path(root).absolute()} ({others}). "
            "Make one: personalize train PHOTOS --class WORD, or name the run's folder."
        )
    return max(runs)[1]


def require_free_disk(folder: Path, bytes_needed: int, remedy: str = "") -> None:
    """UserError, with both figures, where the disk of `folder`, which need not exist yet, has less free space."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise UserError(
            f"{folder} needs {bytes_needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there. "
            f"Free some, or choose another folder.{remedy}"
        )


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoint folders, checkpoints/step-000400 and so on, by step."""
    folders = [p for p in (Path(folder) / "checkpoints").glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def prune_checkpoints(
    folder: Path, keep: int, protect: Collection[str] = (), *, spare: Collection[str] = (), spares: int = 0
) -> list[Path]:
    """Delete a run's checkpoints except the newest `keep` and those named in `protect`; return the deleted ones.

    Of those named in `spare` the newest `spares` stay instead. The newest of all always does.
    """
    assert keep >= 1, "a run goes on from its last checkpoint"
    present = checkpoints(folder)
    regular, extra = [p for p in present if p.name not in spare], [p for p in present if p.name in spare]
    kept = {*protect, *(p.name for p in (*present[-1:], *regular[-keep:], *extra[max(0, len(extra) - spares) :]))}
    obsolete = [p for p in present if p.name not in kept]
    for path in obsolete:
        remove_folder(path)
    return obsolete


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed LIBRARIES, which are not imported for it."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _holder(path: Path) -> str:
    """Who holds a folder, by its file `lock`, which is there a moment later than the lock itself."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
