"""HTML and SVG from nested calls, every string from outside escaped; numbers as words."""

import re
from collections.abc import Iterable
from html import escape

from PIL import Image

from personalize.common.html import data_uri

VOID = {"meta", "img", "br"}
_EXPONENT = re.compile(r"e([+-])0*(\d)")


class Markup(str):
    """Text that is markup already; every other string is escaped."""


def el(tag: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """One element. None children and attributes are left out; `class_` is class and `stroke_width` stroke-width."""
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    said = "".join(f' {name}="{escape(str(value))}"' for name, value in given)
    if tag in VOID:
        return Markup(f"<{tag}{said}>")
    return Markup(f"<{tag}{said}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c))


class Album:
    """Pictures of one page, each in the file once: one shown `again` is a style of its own, the others are plain <img>."""

    def __init__(self, again: Iterable[Image.Image]):
        self.styles = {id(picture): (f"p{k}", picture) for k, picture in enumerate(again)}

    def show(self, picture: Image.Image, alt: str) -> Markup:
        if id(picture) in self.styles:
            return el("span", class_=f"pic {self.styles[id(picture)][0]}", role="img", aria_label=alt)
        return el("img", class_="pic", src=data_uri(picture), alt=alt)

    def css(self) -> str:
        return "\n".join(f'.{name}{{background-image:url("{data_uri(one)}")}}' for name, one in self.styles.values())


def number(value: float | None, form: str = ".3f") -> str:
    """0.790, with a true minus sign; a dash for None."""
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def share(value: float | None) -> str:
    """81%; a dash for None."""
    return "–" if value is None else f"{number(100 * value, '.0f')}%"


def interval(low: float | None, high: float | None, say=number) -> str:
    """0.760–0.820; nothing where either end is missing."""
    return "" if low is None or high is None else f"{say(low)}–{say(high)}".replace("%–", "–")


def plain(value) -> str:
    """A setting as people write it: lists with commas, 1e-4, a dash for None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "–"
    if isinstance(value, float):
        return _EXPONENT.sub(lambda m: f"e{m[1].strip('+')}{m[2]}", f"{value:g}")
    return "–" if value is None or value == "" else str(value)
