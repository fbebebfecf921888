"""Words on pictures: Pillow's own font, spelled with the letters it has, in lines that fit a width in pixels."""

import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Letters are drawn at four times their size and averaged: at their own they stand on whole pixels, unevenly.
FINE = 4
SPACE = 0.25  # of the size, between words

# The font is Aileron's ASCII and a little more; what people write otherwise is spelled with that.
SPELLED = {
    "×": "x", "–": "-", "—": "-", "−": "-", "•": "·", "→": "->", "←": "<-", "≥": ">=", "≤": "<=", "µ": "u", "μ": "u",
    "ß": "ss", "æ": "ae", "Æ": "Ae", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "œ": "oe", "Œ": "Oe",
}  # fmt: skip


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """The font at a size in pixels."""
    return ImageFont.load_default(size)


def spelled(text: str) -> str:
    """The text with letters the font has: accents dropped, signs written out, "?" for what cannot be written."""
    return "".join(_letter(letter) for letter in text)


def length(text: str, size: float) -> float:
    """The width in px of a spelled text on one line."""
    words = text.split(" ")
    return sum(font(FINE * size).getlength(word) for word in words) / FINE + SPACE * size * (len(words) - 1)


def write(page: Image.Image, at: tuple[float, float], text: str, size: float, *, colour: Colour, bold: float = 0.0) -> None:
    """Draw a spelled text on one line from its left end, at its middle height.

    bold: px by which the strokes are widened, as the font has one weight only.
    """
    left, top = int(at[0]), round(at[1] - size)
    large = Image.new("L", (FINE * (round(length(text, size)) + 4), FINE * round(2 * size)))
    pen, x = ImageDraw.Draw(large), FINE * (at[0] - left)
    for word in text.split(" "):
        pen.text((x, large.height / 2), word, fill=255, font=font(FINE * size), anchor="lm", stroke_width=FINE * bold)
        x += font(FINE * size).getlength(word) + FINE * SPACE * size
    page.paste(colour, (left, top), large.reduce(FINE))


def wrapped(text: str, width: float, size: float) -> list[str]:
    """The text, spelled, in lines of at most `width` px, broken at spaces; a longer word is broken anywhere."""
    lines = [""]
    for word in spelled(text).split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined, size) <= width:
            lines[-1] = joined
        else:
            lines += _pieces(word, width, size)
    return [line for line in lines if line]


def block(
    text: str, width: int, size: float, *, colour: Colour, ground: Colour = (255, 255, 255), bold: float = 0.0
) -> Image.Image:
    """The text in lines -> an RGB picture `width` px wide, as high as its lines; 0 px for no text."""
    lines, step = wrapped(text, width - 4, size), round(1.4 * size)
    page = Image.new("RGB", (width, step * len(lines)), ground)
    for k, line in enumerate(lines):
        write(page, (0, (k + 0.5) * step), line, size, colour=colour, bold=bold)
    return page


def _pieces(word: str, width: float, size: float) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and length(pieces[-1] + letter, size) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


@cache
def _letter(letter: str) -> str:
    if letter.isspace():
        return " "
    if _drawn(letter):
        return letter
    if letter in SPELLED:
        return SPELLED[letter]
    plain = [part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)]
    return "".join(part if _drawn(part) else "?" for part in plain)


def _drawn(letter: str) -> bool:
    """Whether the font has the letter: its picture is not that of a code point no font has."""
    return letter == " " or bytes(font(20).getmask(letter)) != bytes(font(20).getmask("\uffff"))
