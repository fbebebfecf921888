"""A command in a forked child, stopped or refused by the disk at its N-th write.

A point is every opening for writing, rename, removal, new folder, link and flush below a folder, and each weights file twice:
before it is there and when half of it is. A child starts with what its parent has imported and loaded, so that a kill costs
tenths of a second. Its clock stands still: all that a command writes can be compared by its bytes.
"""

import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError

from personalize.common.errors import UserError

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CLEANING = {"os.remove", "os.rmdir"}


class Outcome(NamedTuple):
    """kind: "done", "killed", "UserError" or another error's name; text: its message; points: (event, path) of each write."""

    kind: str
    text: str
    points: list[tuple[str, str]]


def run(command: Callable[[], None], root: Path, act: Callable[["Points"], None] = lambda points: None) -> Outcome:
    """A command in a child; `act` is called at every write below `root`, before it happens, and may kill or raise."""
    reader, writer = os.pipe()
    gc.freeze()  # or the child's collector touches, and so copies, all of its parent's memory
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            told = file.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not told:
            return Outcome("killed", "", [])
        kind, text, points = json.loads(told)
        return Outcome(kind, text, [tuple(point) for point in points])
    kind, text, points = "done", "", Points(root, act)
    try:
        os.close(reader)
        points.watch()
        _stop_clock()
        command()
    except UserError as error:
        kind, text = "UserError", str(error)
    except BaseException as error:
        kind, text = type(error).__name__, traceback.format_exc()
    finally:
        points.act = lambda points: None
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps([kind, text, points.seen]).encode())
        os._exit(0)


class Points:
    """Counts writes below a folder, in this process for the rest of its life. seen: (event, path) of each."""

    def __init__(self, root: Path, act: Callable[["Points"], None]):
        self.root, self.act, self.seen = str(root), act, []

    def watch(self) -> None:
        serialize = safetensors.torch.serialize_file

        def fsync(fd: int) -> None:
            self.at("os.fsync", os.readlink(f"/proc/self/fd/{fd}"))  # and no more: a kill takes nothing from the page cache

        def serialize_file(tensors, path, *rest, **more) -> None:
            self.at("save_file", path)
            serialize(tensors, path, *rest, **more)
            data = Path(path).read_bytes()
            os.truncate(path, len(data) // 2)  # a point of its own
            with open(path, "wb", opener=_unseen) as file:
                file.write(data)

        os.fsync, safetensors.torch.serialize_file = fsync, serialize_file
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if event == "open":
            if args[2] & WRITES and not args[2] & _UNSEEN:
                self.at(event, args[0])
        elif event in NAMES:
            self.at(event, args[1] if event in ("os.link", "os.symlink") else args[0], named=args[-1])

    def at(self, event: str, path, named: object = -1) -> None:
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        in_a_folder = event in CLEANING and isinstance(named, int) and named >= 0  # of shutil.rmtree: a name in an open folder
        if in_a_folder or path.startswith(self.root):
            self.seen.append((event, path))
            self.act(self)


def kill_at(n: int) -> Callable[[Points], None]:
    def act(points: Points) -> None:
        if len(points.seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def refuse_at(n: int, number: int, *, forever: bool = False) -> Callable[[Points], None]:
    """The disk refuses the N-th write with this errno, or all from it on."""

    def act(points: Points) -> None:
        if len(points.seen) == n or (forever and len(points.seen) > n):
            event, path = points.seen[-1]
            if event in ("save_file", "os.truncate"):
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
            if number != errno.ENOSPC or event not in CLEANING:  # a full disk lets go of files
                raise OSError(number, os.strerror(number), path)

    return act


def state(root: Path) -> dict[str, str]:
    """Every file and folder below `root` -> its hash. Of logs in which a repeated row says nothing new, the set of rows."""
    found = {}
    for path in sorted(root.rglob("*")):
        data = b"" if path.is_dir() else path.read_bytes()
        if path.name in ("images.jsonl", "exports.jsonl"):
            data = b"\n".join(sorted(set(data.splitlines())))
        found[path.relative_to(root).as_posix()] = hashlib.sha256(data).hexdigest()[:16]
    return found


def differences(now: dict[str, str], whole: dict[str, str]) -> dict[str, str]:
    """What a repeated command left otherwise than an undisturbed one, in a word each."""
    words = {name: "left over" for name in now.keys() - whole.keys()} | {name: "missing" for name in whole.keys() - now.keys()}
    return words | {name: "other bits" for name in now.keys() & whole.keys() if now[name] != whole[name]}


def fresh(root: Path, start: Path | None) -> None:
    """`root` as it is before the command: a copy of `start`, or empty."""
    shutil.rmtree(root, ignore_errors=True)
    if start:
        shutil.copytree(start, root)
    else:
        root.mkdir(parents=True)


_UNSEEN = os.O_NOCTTY  # a flag without a meaning for files, by which an opening of our own is known


def _unseen(path: str, flags: int) -> int:
    return os.open(path, flags | _UNSEEN)


def _stop_clock() -> None:
    moment = time.gmtime(1_600_000_000)
    time.time, time.monotonic, time.perf_counter = (lambda: 1_600_000_000.0,) * 3
    time.gmtime = time.localtime = lambda *seconds: moment
