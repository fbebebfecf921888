"""Atomic file writes, JSON, hashes and names.

Every file is written under a temporary name in its own folder, flushed and renamed, so that a reader, or the next
run after a kill, sees the old file or the new one and never a part of it. Temporary names begin with `.tmp-`.
"""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from personalize.common.errors import UserError
from personalize.common.untrusted import OBJECT, Table, open_regular, parse_json, read_bytes, require

UMASK = os.umask(0o22)
os.umask(UMASK)
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)  # of a file system that flushes no folders
_SWEPT: set[Path] = set()  # folders in which this process has looked for what killed ones left


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix, to write a file or a folder to; it is renamed to `path` on success.

    An existing folder is moved aside first: a kill between the two renames leaves no folder of that name.
    """
    path = Path(path)
    with scratch_folder(path) as place:  # libraries write temporary files of their own beside the one they are given
        temporary = place / path.name
        yield temporary
        for written in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _open_to_others(written)
            sync(written)
        if temporary.is_dir() and path.is_dir():
            remove_folder(path)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, gone afterwards; what killed processes left there is removed first.

    UserError names `path` where the disk is full, broken or forbidden.
    """
    place = _temporary(path)
    try:
        with explained(path):
            make_folder(path.parent)
            if path.parent not in _SWEPT:
                _SWEPT.add(path.parent)
                sweep(path.parent, below=False)
            place.mkdir()
            yield place
    finally:
        _discard(place)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a full, broken or forbidden disk does to the writing of `path` into a UserError."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the system's error, and shutil gathers those of a whole folder
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        other = str(getattr(error, "filename", None) or path)
        where = "" if ".tmp-" in other or other == str(path) else f" ({other})"
        raise UserError(f"cannot write {path}: {reason}{where}. Free or change the disk, or the folder.") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; their names are on the disk afterwards."""
    missing = [folder, *folder.parents][: [*(f.is_dir() for f in (folder, *folder.parents)), True].index(True)]
    folder.mkdir(parents=True, exist_ok=True)
    for new in missing:
        sync(new.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically. What is no character, as of a file's name, is escaped, as JSON reads it."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: Table = OBJECT) -> Any:
    """The object that a JSON file holds, of this kind. UserError names the path, and the line or field that is wrong."""
    return require(parse_json(read_bytes(path, "JSON file"), str(path)), kind, str(path))


def append_jsonl(path: Path, row: Mapping) -> None:
    """Append one row to a JSON-lines file; a last line that a kill left incomplete is cut off first."""
    path = Path(path)
    with explained(path), _opened_to_append(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        separator = b""
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            tail = file.read().rpartition(b"\n")[2]
            if _row(tail) is None:
                file.truncate(end - len(tail))
            else:
                separator = b"\n"
        file.write(separator + json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_jsonl(path: Path, kind: Table = OBJECT) -> list[dict]:
    """The rows of a JSON-lines file, each of this kind, without an incomplete last line; none of a file that is not there.

    UserError names the path and any other bad line.
    """
    lines = read_bytes(path, "log").split(b"\n") if os.path.lexists(path) else []
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(require(row, kind, f"{path}, line {number}", "Delete the line, or the file."))
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object. Delete the line, or the file.")
    return rows


def sha256(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hex."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open_regular(source, "file") as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror}.") from None


def content_hash(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of the names and hashes of its files, but for what systems hide there."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sha256("".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files).encode())


def key_of(mapping: Mapping) -> str:
    """12 hex digits that identify a mapping of JSON values, whatever the order of its keys."""
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode())[:12]


def slug(text: str) -> str:
    """A name for a folder: lower-case ASCII letters, digits and hyphens, at most 60; a hash where none is left."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:60].rstrip("-")
    return name or sha256(text.encode("utf-8", "surrogateescape"))[:8]


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove temporary files of processes of this host that have ended, in a folder and, if not forbidden, all below it."""
    mark = f".tmp-{slug(platform.node())[:24]}-"
    for path in list(folder.rglob(f"{mark}*") if below else folder.glob(f"{mark}*")):
        pid = path.name.removeprefix(mark).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            _discard(path)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then delete it: a kill half-way leaves no folder that looks whole."""
    aside = _temporary(folder)
    with explained(folder):
        os.rename(folder, aside)
    _discard(aside)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A hard link to a file, or a copy where the file system has none; of a symbolic link, to what it points to."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy(source, target)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        pass
    return True


def _opened_to_append(path: Path) -> BinaryIO:
    make_folder(path.parent)
    return open(path, "ab+")


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _temporary(path: Path) -> Path:
    owner = f".tmp-{slug(platform.node())[:24]}-{os.getpid()}-{secrets.token_hex(3)}"
    return path.with_name(f"{owner}-{path.stem[:60]}")


def _discard(path: Path) -> None:
    """Never raises: it runs where another error is on its way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _open_to_others(path: Path) -> None:
    """Give a file that a library wrote for its owner alone the rights that the umask leaves. A link's belong to the base."""
    status = path.lstat()
    if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 1:
        path.chmod(0o666 & ~UMASK)


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk."""
    is_folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if not is_folder or error.errno not in NO_FLUSH:
            raise
