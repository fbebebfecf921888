"""Files of boxes that say where in an image something is to be."""

from collections.abc import Sequence
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.untrusted import Number, Table, Text, parse_json, read_bytes, require
from personalize.models.layout import Box

EDGES = ("x0", "y0", "x1", "y1")
MOST = 16  # boxes
EXAMPLE = '[{"class": "dog", "x0": 0.1, "y0": 0.4, "x1": 0.5, "y1": 0.9}]'
_BOX = Table(
    {"class": Text(most=60)} | {edge: Number(0, 1, real=True) for edge in EDGES},
    needs=("class", *EDGES),
    remedy=f"Edges are shares of the image's width and height, from its top left corner, as in {EXAMPLE}.",
)


def read_layout(path: Path | str, classes: Sequence[str]) -> list[Box]:
    """A JSON file of boxes. UserError names the box with an unknown class, or with edges outside of 0 to 1 or exchanged."""
    rows = parse_json(read_bytes(path, "JSON file"), str(path))
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST:
        raise UserError(f"{path} is no list of 1 to {MOST} boxes. Write one, as in: {EXAMPLE}")
    return [_box(row, f"{path}, box {k + 1}", classes) for k, row in enumerate(rows)]


def _box(row, where: str, classes: Sequence[str]) -> Box:
    row = require(row, _BOX, where)
    if (name := row["class"]) not in classes:
        raise UserError(f"{where}: unknown class {name!r}{nearest(name, classes) or '.'} Known: {', '.join(classes)}.")
    box = Box(name, *(float(row[edge]) for edge in EDGES))
    if not (box.x0 < box.x1 and box.y0 < box.y1):
        edges = ", ".join(f"{edge} {row[edge]:g}" for edge in EDGES)
        raise UserError(f"{where} is empty ({edges}): x0 is to be left of x1, and y0 above y1. {_BOX.remedy}")
    return box
