"""Files that strangers made: regular files of a sane size only, and JSON whose structure is checked before it is used.

A FIFO would hang whoever opens it, /dev/zero never ends, and a number with 6,000 digits or lists nested a thousand deep
break a parser. Whatever personalize reads goes through `read_bytes`, or, where a library opens it, `require_regular` first.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from personalize.common.errors import UserError

MB = 1_000_000
MOST_BYTES = {
    "photo": 300 * MB, "mask": 300 * MB, "image": 300 * MB, "caption": MB // 10, "prompts file": MB,
    "list of captions": MB, "recipe": MB, "YAML file": MB, "vocabulary": 16 * MB, "JSON file": 64 * MB, "table": 64 * MB,
    "log": 1000 * MB, "mask model": 400 * MB,
}  # fmt: skip
DEEPEST = 32  # levels of lists and objects
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


@contextmanager
def open_regular(path: Path | str, kind: str) -> Iterator[BinaryIO]:
    """A regular file, for reading. `kind` says what it was given as: a key of MOST_BYTES, or another for any size.

    UserError for what is absent, unreadable, larger than its kind may be, or a pipe, device or folder.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except IsADirectoryError:
        raise UserError(f"the {kind} {path} is a folder, not a file. Check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {kind} {path}: {reason}. Check the path and its rights.") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            what = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise UserError(f"the {kind} {path} is {what}, not a file. Check the path.")
        most = MOST_BYTES.get(kind)
        if most is not None and status.st_size > most:
            raise UserError(
                f"the {kind} {path} has {_size(status.st_size)}, more than the {_size(most)} that one may have. Check the file."
            )
        yield file


def require_regular(path: Path | str, kind: str) -> None:
    """UserError as `open_regular` gives it: for a file that a library will open."""
    with open_regular(path, kind):
        pass


def read_bytes(path: Path | str, kind: str) -> bytes:
    """The content of a regular file. UserError as `open_regular` gives it."""
    with open_regular(path, kind) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"cannot read the {kind} {path}: {error.strerror}. Check the disk.") from None


def parse_json(data: bytes, where: str) -> Any:
    """JSON of at most DEEPEST levels. UserError names `where`, the line, and the remedy."""
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}: not JSON ({error.msg}). Restore or delete the file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}). Restore or delete the file.") from None
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {DEEPEST} levels. Restore or delete the file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where} holds a number that is too long ({error}). Restore or delete the file.") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [item for part in level for item in _items(part)]
        if not level:
            return value
    raise UserError(f"{where} is nested deeper than {DEEPEST} levels. Restore or delete the file.")


def _items(value: Any) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _size(count: int) -> str:
    return f"{count / MB:,.1f} MB" if count >= MB else f"{count:,} bytes"


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most` inclusive; a whole one unless `real`."""

    least: float
    most: float
    real: bool = False

    def __str__(self) -> str:
        return f"a{'' if self.real else ' whole'} number from {self.least:g} to {self.most:g}"

    def allows(self, value: Any) -> bool:
        return type(value) in ((int, float) if self.real else (int,)) and self.least <= value <= self.most


@dataclass(frozen=True)
class Text:
    """A text of at most `most` characters; one of `choices` where there are some."""

    choices: tuple[str, ...] = ()
    most: int = 10_000

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else f"a text of at most {self.most} characters"

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.most and (not self.choices or value in self.choices)


@dataclass(frozen=True)
class Only:
    """These values: what others ask for, personalize does not do."""

    values: tuple

    def __str__(self) -> str:
        return " or ".join(json.dumps(value) for value in self.values)

    def allows(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)


SWITCH = Only((True, False))


@dataclass(frozen=True)
class Either:
    """Any of these kinds."""

    kinds: tuple

    def __str__(self) -> str:
        return " or ".join(map(str, self.kinds))

    def allows(self, value: Any) -> bool:
        return any(next(faults(kind, value), None) is None for kind in self.kinds)


@dataclass(frozen=True)
class Many:
    """A list of `least` to `most` items of one kind."""

    of: Any
    least: int = 0
    most: int = 100_000

    def __str__(self) -> str:
        return f"a list of {self.least} to {self.most} items"

    def allows(self, value: Any) -> bool:
        return isinstance(value, list) and self.least <= len(value) <= self.most


@dataclass(frozen=True)
class Table:
    """An object. Fields in `needs` must be there; those that are not in `fields` are let through."""

    fields: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    remedy: str = "Restore or delete the file."

    def __str__(self) -> str:
        return "an object" + (f" with {', '.join(self.needs)}" if self.needs else "")

    def allows(self, value: Any) -> bool:
        return isinstance(value, dict) and all(name in value for name in self.needs)


OBJECT = Table({})


def faults(kind: Any, value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, kind that was expected) of each part of a value that is of another kind."""
    if not kind.allows(value):
        yield path, value, kind
    elif isinstance(kind, Table):
        for name in [name for name in value if name in kind.fields]:
            yield from faults(kind.fields[name], value[name], f"{path}.{name}" if path else name)
    elif isinstance(kind, Many):
        for k, item in enumerate(value):
            yield from faults(kind.of, item, f"{path}[{k}]")


def require(value: Any, kind: Table, where: str, remedy: str = "") -> Any:
    """`value`, which is of this kind. UserError names `where`, the field, its value, what is expected, and the remedy."""
    for path, part, expected in faults(kind, value):
        shown = json.dumps(part, ensure_ascii=False)
        if isinstance(part, dict | list):
            missing = [name for name in getattr(expected, "needs", ()) if name not in part]
            shown = "a list" if isinstance(part, list) else f"without {', '.join(missing)}"
        shown = shown if len(shown) <= 60 else shown[:60] + "…"
        raise UserError(f"{where}: {path or 'the content'} is {shown}; expected {expected}. {remedy or kind.remedy}")
    return value
