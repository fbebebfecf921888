"""Width and height of an image in px: how functions take them, and how a setting says them.

A setting says a square by its edge, 512, and another shape as "512x768", width first. 0 leaves the size to the base.
"""

import re

from personalize.common.errors import UserError

Size = tuple[int, int]  # width, height, px
EDGES = re.compile(r"([0-9]{1,7})(?:\s*[xX×]\s*([0-9]{1,7}))?")


def read_size(value) -> Size | None:
    """What may stand in a recipe: an edge, as a number or a text, or "512x768" -> width and height; None for all else."""
    if type(value) is int:
        return value, value
    found = EDGES.fullmatch(value.strip()) if isinstance(value, str) else None
    return found and (int(found[1]), int(found[2] or found[1]))


def as_size(size: int | str | Size) -> Size:
    """An edge, the text of a setting, or width and height -> width and height."""
    return size if isinstance(size, tuple) else read_size(size)


def as_setting(size: int | str | Size) -> int | str:
    """The same as a setting says it: a square by its edge, as it was said before there were other shapes."""
    width, height = as_size(size)
    return width if width == height else f"{width}x{height}"


def in_words(size: int | str | Size) -> str:
    """For a message: "512" or "512×768"."""
    return str(as_setting(size)).replace("x", "×")


def require_multiple(size: int | str | Size, step: int, *, what: str, base: str) -> None:
    """UserError where an edge is no multiple of `step` px; it names the nearest sizes that are."""
    edges = as_size(size)
    if not any(edge % step for edge in edges):
        return
    lower = tuple(max(step, edge // step * step) for edge in edges)
    upper = tuple(-(-edge // step) * step for edge in edges)
    nearest = " or ".join(dict.fromkeys(str(as_setting(each)) for each in (lower, upper)))
    raise UserError(
        f"{what} {in_words(size)} px is not a multiple of {step}, which base {base!r} needs. The nearest: {nearest}."
    )
