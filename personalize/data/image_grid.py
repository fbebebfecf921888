"""One page of pictures for people: sections of rows of equal cells, tables of numbers, words at the top.

Sizes are in pixels. Sections, rows and cells flow from left to right and wrap at the page's inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from personalize.data.lettering import Colour, block, length, spelled, write

WIDTH, MARGIN, GAP = 1200, 48, 8
INNER = WIDTH - 2 * MARGIN
BETWEEN_ROWS = 32  # around rows that stand beside each other, and between lines of them
BETWEEN_SECTIONS = 40

PAPER: Colour = (255, 255, 255)
INK: Colour = (26, 28, 34)
GREY: Colour = (112, 117, 128)
LINE: Colour = (226, 229, 234)
PANEL: Colour = (244, 246, 249)
ACCENT: Colour = (59, 108, 196)


@dataclass(frozen=True)
class Section:
    """Pictures under a heading.

    note     a small grey line under the title, or ""
    rows     (label, pictures); the label stands above its pictures. Rows narrow enough stand beside each other
    cell     side of each picture's square, a little more where a row fills the page; pictures are scaled into it, whole
    columns  pictures on a line of a row; 0: as many as fit
    """

    title: str
    note: str
    rows: Sequence[tuple[str, Sequence[Image.Image]]]
    cell: int = 128
    columns: int = 0


@dataclass(frozen=True)
class Table:
    """Numbers under a heading: the first column is words, the others are right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def contact_sheet(
    sections: Sequence[Section | Table],
    *,
    title: str,
    subtitle: str = "",
    verdict: Sequence[str] = (),
    footer: str = "",
) -> Image.Image:
    """Sections from top to bottom -> an RGB page 1200 px wide, as high as it takes.

    verdict: plain sentences in a panel under the title. Letters the font lacks are spelled (`lettering.spelled`).
    """
    head = _stack([_words(title, 34, bold=0.5), _words(subtitle, 16, GREY)], 4)
    parts = [head, _panel(verdict)]
    parts += [_table(section) if isinstance(section, Table) else _section(section) for section in sections]
    if footer:
        parts.append(_stack([Image.new("RGB", (INNER, 1), LINE), _words(footer, 13, GREY)], 12))
    page = _stack(parts, BETWEEN_SECTIONS)
    sheet = Image.new("RGB", (WIDTH, page.height + 2 * MARGIN), PAPER)
    sheet.paste(page, (MARGIN, MARGIN))
    return sheet


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures, row by row -> one RGB picture at full size with thin white lines between, in cells of the largest."""
    assert images and columns > 0, (len(images), columns)
    line = 4
    wide, high = max(i.width for i in images), max(i.height for i in images)
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (wide + line) - line, lines * (high + line) - line), PAPER)
    for k, image in enumerate(images):
        left, top = k % columns * (wide + line), k // columns * (high + line)
        page.paste(image.convert("RGB"), (left + (wide - image.width) // 2, top + (high - image.height) // 2))
    return page


def _section(section: Section) -> Image.Image:
    return _stack([_heading(section.title, section.note), _flow(section)], 16)


def _heading(title: str, note: str) -> Image.Image:
    return _stack([_words(title, 21, bold=0.3), _words(note, 14, GREY)], 2)


def _flow(section: Section) -> Image.Image:
    """All rows of a section as blocks of one width, as many beside each other as fit."""
    gap = max(4, min(GAP, section.cell // 12))
    fit = max(1, (INNER + gap) // (section.cell + gap))
    most = max((len(pictures) for _, pictures in section.rows), default=0)
    columns = max(1, min(section.columns or fit, fit, most))
    cell = (INNER + gap) // fit - gap if columns == fit else section.cell
    pitch = (INNER - cell) / (columns - 1) if columns == fit > 1 else cell + gap
    width = round((columns - 1) * pitch) + cell
    beside = (INNER + BETWEEN_ROWS) // (width + BETWEEN_ROWS)
    if len(section.rows) == 1:
        width = INNER
    blocks = [_row(row, cell, columns=columns, pitch=pitch, width=width) for row in section.rows]
    lines = [_beside(blocks[at : at + beside]) for at in range(0, len(blocks), beside)]
    return _stack(lines, BETWEEN_ROWS)


def _row(row: tuple[str, Sequence[Image.Image]], cell: int, *, columns: int, pitch: float, width: int) -> Image.Image:
    """A label above its pictures, `columns` on a line; pitch: from one cell's edge to the next one's."""
    label, pictures = row
    words = block(label, width, 15, colour=INK)
    top = words.height + 6 if words.height else 0
    lines = -(-len(pictures) // columns)
    page = Image.new("RGB", (width, top + (round((lines - 1) * pitch) + cell if lines else 0)), PAPER)
    page.paste(words, (0, 0))
    for k, picture in enumerate(pictures):
        framed = _framed(picture, cell)
        page.paste(framed, (round(k % columns * pitch), top + round(k // columns * pitch)), framed)
    return page


def _framed(picture: Image.Image, cell: int) -> Image.Image:
    """The whole picture in a square cell with rounded corners: RGBA."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    square = Image.new("RGBA", (cell, cell), (*PANEL, 255))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square.paste(fitted, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    square.putalpha(_rounded((cell, cell), cell / 20))
    return square


def _panel(sentences: Sequence[str]) -> Image.Image:
    """Sentences on a tinted panel with a coloured edge; nothing for none."""
    lines = [block(sentence, INNER - 48, 17, colour=INK, ground=PANEL) for sentence in sentences]
    if not lines:
        return Image.new("RGB", (INNER, 0))
    inside = _stack(lines, 6, ground=PANEL)
    page = Image.new("RGB", (INNER, inside.height + 32), PAPER)
    page.paste(PANEL, (0, 0), _rounded(page.size, 6))
    page.paste(ACCENT, (0, 0, 4, page.height))
    page.paste(inside, (24, 16))
    return page


def _table(table: Table) -> Image.Image:
    """Heading, header and rows, a thin line under each; columns as wide as their words, at least 96 px."""
    assert all(len(row) == len(table.header) for row in table.rows), f"table {table.title!r} has rows of other lengths"
    size, step, pad = 16, 34, 40
    cells = [[spelled(text) for text in row] for row in (table.header, *table.rows)]
    widths = [max(96, round(max(length(text, size) for text in column)) + pad) for column in zip(*cells, strict=True)]
    page = Image.new("RGB", (INNER, step * len(cells)), PAPER)
    pen = ImageDraw.Draw(page)
    for k, row in enumerate(cells):
        right, of_row = 0, size if k else 14
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            right += width
            left = right - length(text, of_row) if column else 0
            write(page, (left, (k + 0.5) * step), text, of_row, colour=INK if k else GREY)
        pen.line((0, (k + 1) * step - 1, min(right, INNER), (k + 1) * step - 1), fill=LINE)
    return _stack([_heading(table.title, table.note), page], 10)


def _words(text: str, size: float, colour: Colour = INK, *, bold: float = 0.0) -> Image.Image:
    return block(text, INNER, size, colour=colour, bold=bold)


def _rounded(size: tuple[int, int], radius: float) -> Image.Image:
    """A mask with round corners, drawn at four times its size for smooth edges."""
    large = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), 4 * radius, fill=255)
    return large.resize(size, Image.Resampling.BOX)


def _stack(parts: Sequence[Image.Image], gap: int, *, ground: Colour = PAPER) -> Image.Image:
    """Pictures below each other, `gap` apart; those of height 0 take no gap."""
    parts = [part for part in parts if part.height]
    height = max(0, sum(part.height + gap for part in parts) - gap)
    page = Image.new("RGB", (INNER, height), ground)
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height + gap
    return page


def _beside(blocks: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width beside each other; their pictures are aligned at the bottom."""
    height = max(one.height for one in blocks)
    page = Image.new("RGB", (INNER, height), PAPER)
    for k, one in enumerate(blocks):
        page.paste(one, (k * (one.width + BETWEEN_ROWS), height - one.height))
    return page
