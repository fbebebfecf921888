"""The doctor's report as a page: each photo whole with its crop framed, what training sees, and the findings beneath."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from personalize.data.crops import square
from personalize.data.image_grid import ACCENT, GREY, INK, INNER, LINE, MARGIN, PANEL, PAPER, WIDTH, contact_sheet
from personalize.data.lettering import Colour, block
from personalize.data.photo_checks import NOTE, OK, WARNING, Finding, Report
from personalize.data.photo_stats import PhotoStats

COLUMNS, BETWEEN = 2, 40  # cards beside each other, and px between them
CARD = (INNER - (COLUMNS - 1) * BETWEEN) // COLUMNS
GAP = 8
CELL = (CARD - GAP) // 2  # px: side of each of the two pictures of a photo
SHOWN = 60  # photos: a page of more is too large for viewers

FRAME: Colour = (255, 45, 85)
OUTLINE: Colour = (40, 215, 120)
BARS: dict[str, Colour] = {NOTE: ACCENT, WARNING: (214, 110, 20)}


def page(report: Report) -> Image.Image:
    """A report  ->  an RGB page 1200 px wide, for `files.writing` to keep. What training sees has its true resolution."""
    cards = [_card(exam, found) for exam, found in list(zip(report.exams, report.each, strict=True))[:SHOWN]]
    head = contact_sheet([], title=_title(report), subtitle=_legend(report), verdict=_verdict(report))
    lines = [cards[at : at + COLUMNS] for at in range(0, len(cards), COLUMNS)]
    height = sum(max(card.height for card in line) + BETWEEN for line in lines)
    sheet = Image.new("RGB", (WIDTH, head.height + height), PAPER)
    sheet.paste(head, (0, 0))
    top = head.height
    for line in lines:
        for k, card in enumerate(line):
            sheet.paste(card, (MARGIN + k * (CARD + BETWEEN), top))
        top += max(card.height for card in line) + BETWEEN
    return sheet


def _title(report: Report) -> str:
    count = len(report.exams)
    return f"{count} photo{'s' * (count != 1)}, trained at {report.size}×{report.size} px"


def _legend(report: Report) -> str:
    how = {"center": "the middle", "subject": "around the subject", "random": "the middle; training cuts at random places"}[
        report.how
    ]
    marks = ", the subject outlined" if any(exam.photo.mask is not None for exam in report.exams) else ""
    more = f". The first {SHOWN} are shown" if len(report.exams) > SHOWN else ""
    return f"Left: the photo with its crop framed ({how}){marks}. Right: what training sees{more}."


def _verdict(report: Report) -> list[str]:
    """What is to be done, or that there is nothing; then what is to be said about all photos together."""
    ill = sum(any(finding.severity == WARNING for finding in found) for found in report.each)
    of_all = [finding for severity in (WARNING, NOTE) for finding in report.together if finding.severity == severity]
    if ill:
        first = f"{ill} of {len(report.exams)} photos should be replaced or put right: see the orange lines."
    elif any(finding.severity == WARNING for finding in of_all):
        first = "Each photo can be used as it is, but:"
    else:
        first = "Nothing to put right."
    return [first, *(_sentence(finding) for finding in of_all)]


def _card(exam: PhotoStats, findings: Sequence[Finding]) -> Image.Image:
    """The pictures of a photo and its findings: CARD px wide, as high as they take."""
    words = [block(exam.photo.name, CARD, 17, colour=INK, bold=0.3), *(_words(finding, exam) for finding in findings)]
    card = Image.new("RGB", (CARD, CELL + sum(part.height + 5 for part in words) + 8), PAPER)
    for left, picture in ((0, _framed(exam)), (CELL + GAP, _seen(exam))):
        card.paste(PANEL, (left, 0, left + CELL, CELL))
        card.paste(picture, (left + (CELL - picture.width) // 2, (CELL - picture.height) // 2))
    top = CELL + 8
    for part in words:
        card.paste(part, (0, top))
        top += part.height + 5
    return card


def _words(finding: Finding, exam: PhotoStats) -> Image.Image:
    """A finding's sentence; a bar in the colour of its severity stands before what is not in order."""
    if finding.severity == OK:
        return block(finding.text.removeprefix(f"{exam.photo.name}: "), CARD, 14, colour=GREY)
    text = block(_sentence(finding), CARD - 14, 15, colour=INK)
    page = Image.new("RGB", (CARD, text.height), PAPER)
    page.paste(BARS[finding.severity], (0, 2, 4, text.height - 2))
    page.paste(text, (14, 0))
    return page


def _sentence(finding: Finding) -> str:
    """The text with a capital, unless it begins with a file's name."""
    first = finding.text.partition(" ")[0]
    return finding.text if "." in first or "_" in first else finding.text[:1].upper() + finding.text[1:]


def _framed(exam: PhotoStats) -> Image.Image:
    """The whole photo within CELL × CELL: outside its crop faded, outside the subject darker, the crop framed."""
    whole = exam.photo.image
    scale = CELL / max(whole.size)
    size = tuple(max(1, round(side * scale)) for side in whole.size)
    small = whole.resize(size, Image.Resampling.LANCZOS)
    if exam.photo.mask is not None:
        small = _marked(small, exam.photo.mask.resize(size, Image.Resampling.BILINEAR))
    box = tuple(min(round(at * scale), size[k % 2]) for k, at in enumerate(exam.box))
    framed = Image.blend(small, Image.new("RGB", size, PAPER), 0.6)
    framed.paste(small.crop(box), box[:2])
    ImageDraw.Draw(framed).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=FRAME, width=2)
    return framed


def _marked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with what is not the subject darker, and the subject's edge drawn."""
    dim = Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, INK), 0.55), mask)
    subject = mask.point([255 * (value >= 128) for value in range(256)])
    edge = ImageChops.subtract(subject.filter(ImageFilter.MaxFilter(5)), subject)
    dim.paste(OUTLINE, (0, 0), edge)
    return dim


def _seen(exam: PhotoStats) -> Image.Image:
    """What training sees, at CELL × CELL; enlarged without smoothing, as coarse as it is."""
    seen = square(exam.photo, exam.size, exam.box)
    seen = seen.resize((CELL, CELL), Image.Resampling.NEAREST if exam.size < CELL else Image.Resampling.LANCZOS)
    ImageDraw.Draw(seen).rectangle((0, 0, CELL - 1, CELL - 1), outline=LINE)  # a white background would have no edge
    return seen
