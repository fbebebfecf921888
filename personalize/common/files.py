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
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from personalize.common.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix, to write a file or a folder to; it is renamed to `path` on success.

    An existing folder is moved aside first: a kill between the two renames leaves no folder of that name.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for written in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
                _sync(written)
            if temporary.is_dir() and path.is_dir():
                remove_folder(path)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        _discard(temporary)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the error of a full disk or a missing permission while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}. Free or change the disk, or the folder.") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. UserError names the path, and the line that is not JSON."""
    try:
        return json.loads(_read_bytes(Path(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}). Restore or delete the file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}). Restore or delete the file.") from None


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
        file.write(separator + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file without an incomplete last line. UserError names the path and any other bad line."""
    lines = _read_bytes(Path(path)).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object. Delete the line, or the file.")
    return rows


def sha256(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hex."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}.") from None


def content_hash(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of the names and hashes of its files."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
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


def sweep(folder: Path) -> None:
    """Remove temporary files of processes of this host that have ended."""
    mark = f".tmp-{slug(platform.node())[:24]}-"
    for path in list(folder.rglob(f"{mark}*")):
        pid = path.name.removeprefix(mark).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            _discard(path)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then delete it: a kill half-way leaves no folder that looks whole."""
    aside = _temporary(folder)
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def _opened_to_append(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab+")


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _temporary(path: Path) -> Path:
    owner = f".tmp-{slug(platform.node())[:24]}-{os.getpid()}-{secrets.token_hex(3)}"
    return path.with_name(f"{owner}-{path.stem[:120]}{path.suffix}")


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    is_folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:  # not every file system flushes folders
        if not is_folder:
            raise
