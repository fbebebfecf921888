"""Settings: dataclass fields with their meaning and unit, validated, parsed from text and written as TOML."""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from personalize.common.errors import UserError, nearest
from personalize.common.image_size import as_setting, read_size
from personalize.common.untrusted import read_bytes

Value = str | int | float | bool | tuple
Edges = int | str  # kind of a setting that is an image's size: see common.image_size

MOST = 1_000_000
_EXPECTED = {
    Edges: 'an edge in px, or width x height such as "512x768"',
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    tuple[str, ...]: "a list of texts", tuple[float, ...]: "a list of numbers",
}  # fmt: skip


def setting(default: Value, doc: str, *, choices: tuple = (), least: float | None = None, most: float | None = None):
    """A dataclass field with its meaning and unit and the values it may have, from `least` to `most` inclusive.

    A whole number without a `most` is a million at most: what is larger is a slip, and would fill the memory.
    """
    most = MOST if most is None and type(default) is int else most
    return field(default=default, metadata={"doc": doc, "choices": choices, "least": least, "most": most})


class Setting(NamedTuple):
    """One field of the recipe: dotted key, type, default, meaning with unit, and the values it may have."""

    key: str
    kind: Any
    default: Value
    doc: str
    choices: tuple
    least: float | None
    most: float | None


def settings_of(section: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass and of its sections, in the order of their definition."""
    for f in fields(section):
        if is_dataclass(f.type):
            yield from settings_of(f.type, f"{prefix}{f.name}.")
        else:
            yield Setting(prefix + f.name, f.type, f.default, **f.metadata)


def validated(s: Setting, value: Any, origin: str) -> Value:
    """`value` in the setting's type. UserError says what is expected and what the setting means."""
    if s.kind == Edges:
        return _size_validated(s, value, origin)
    item_kind = get_args(s.kind)[0] if get_args(s.kind) else s.kind
    items = list(value) if s.kind is not item_kind and isinstance(value, (list, tuple)) else [value]
    if item_kind is float:
        items = [float(i) if type(i) is int else i for i in items]
    is_valid = all(type(i) is item_kind and (item_kind is not float or math.isfinite(i)) for i in items)
    expected = _EXPECTED[s.kind]
    if is_valid and s.choices and not set(items) <= set(s.choices):
        is_valid, expected = False, "one of " + ", ".join(map(str, s.choices))
    if is_valid and s.least is not None and min(items, default=s.least) < s.least:
        is_valid, expected = False, f"at least {s.least:g}"
    if is_valid and s.most is not None and max(items, default=s.most) > s.most:
        is_valid, expected = False, f"at most {s.most:g}"
    if not is_valid:
        hint = nearest(str(value), map(str, s.choices)) or "."
        raise UserError(f"{s.key} = {value!r} in {origin} is not allowed; expected {expected} ({s.doc}){hint}")
    return items[0] if s.kind is item_kind else tuple(items)


def _size_validated(s: Setting, value: Any, origin: str) -> int | str:
    """An edge, or width and height as text; a square is always its edge."""
    size = read_size(value)
    if size is None:
        raise UserError(f"{s.key} = {value!r} in {origin} is not allowed; expected {_EXPECTED[Edges]} ({s.doc}).")
    wrong = [edge for edge in size if not s.least <= edge <= s.most] or (0 in size and size != (0, 0))
    if wrong:
        raise UserError(f"{s.key} = {value!r} in {origin} is not allowed; expected edges of 1 to {s.most:g} px.")
    return as_setting(size)


def meaning(s: Setting) -> str:
    """The setting's meaning with its unit, and the values it may have."""
    return s.doc + (f" ({', '.join(s.choices)})" if s.choices else "")


def to_toml_value(value: Value) -> str:
    """A setting's value as TOML that reads back as the same value."""
    if isinstance(value, tuple):
        return "[" + ", ".join(to_toml_value(item) for item in value) + "]"
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped; repr keeps every bit of a float.
    return repr(value) if type(value) is float else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path, kind: str = "recipe") -> dict:
    """The content of a TOML file, a `kind` of MOST_BYTES. UserError names the path, and the line that is not TOML."""
    data = read_bytes(path, kind)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {kind} {path}: {error}. Give a UTF-8 TOML file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {kind} {path} is not TOML: {error}. Texts need quotes, lists brackets.") from None


def parse_value(text: str, kind: Any) -> Any:
    """An override's value as TOML reads it, or the text itself for a setting that is a text and for what is not TOML.

    A list may be written a,b or [a,b]; a quoted text is one item, even with commas in it.
    """
    if kind == Edges:  # to TOML 0x64 is a number
        return text.strip("\"'")
    item_kinds = get_args(kind)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        if not item_kinds:
            return text
        parts = text.removeprefix("[").removesuffix("]").split(",")  # shells eat the quotes of ["a","b"]
        return [parse_value(part.strip(), item_kinds[0]) for part in parts if part.strip()]
    if item_kinds:
        return value if isinstance(value, list) else [text if item_kinds[0] is str and not isinstance(value, str) else value]
    return text if kind is str and not isinstance(value, str) else value
