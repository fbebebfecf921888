"""A sheet holds every picture it was given, whole, in order and inside the page, and words the font can write."""

import numpy as np
import pytest
from PIL import Image

from personalize.data import image_grid, lettering
from personalize.data.image_grid import Section, Table, contact_sheet, grid


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def colours(n):
    """n saturated colours that neither paper, words nor each other have."""
    return [(255, 7 * k % 256, 11 * k % 199 + 1) for k in range(n)]


def places(page, wanted):
    """Where each colour's centre of mass is: [(x, y) or None]."""
    data = np.array(page)
    spots = [np.argwhere((data == colour).all(-1)) for colour in wanted]
    return [tuple(spot.mean(0)[::-1].tolist()) if len(spot) else None for spot in spots]


def test_the_page_is_1200_px_wide_with_white_margins():
    section = Section("Many", "a note", [("", [plain(c) for c in colours(30)])])
    page = contact_sheet([section], title="A title", subtitle="under it", verdict=["It works."], footer="the end")
    data = np.array(page)
    assert page.mode == "RGB" and page.width == image_grid.WIDTH
    for border in (
        data[: image_grid.MARGIN],
        data[-image_grid.MARGIN :],
        data[:, : image_grid.MARGIN],
        data[:, -image_grid.MARGIN :],
    ):
        assert (border == 255).all()


@pytest.mark.parametrize("cell,count,columns", [(128, 5, 0), (50, 100, 0), (160, 7, 3), (5000, 2, 0), (16, 1, 0)])
def test_all_pictures_are_placed_in_reading_order(cell, count, columns):
    wanted = colours(count)
    page = contact_sheet([Section("", "", [("", [plain(c) for c in wanted])], cell=cell, columns=columns)], title="")
    found = places(page, wanted)
    assert None not in found
    assert [(round(y), round(x)) for x, y in found] == sorted((round(y), round(x)) for x, y in found)
    if columns:
        assert len({round(y) for _, y in found}) == -(-count // columns)


def test_a_hundred_class_pictures_stand_twenty_on_a_line_that_fills_the_page():
    wanted = colours(100)
    page = contact_sheet([Section("", "", [("", [plain(c) for c in wanted])], cell=50)], title="")
    found = places(page, wanted)
    assert [len({round(y) for _, y in found[at : at + 20]}) for at in range(0, 100, 20)] == [1] * 5
    data = np.array(page)
    inside = np.argwhere((data != 255).any(-1))[:, 1]
    assert inside.min() == image_grid.MARGIN and inside.max() == image_grid.WIDTH - image_grid.MARGIN - 1


def test_narrow_rows_stand_beside_each_other_and_no_picture_covers_another():
    wanted = colours(16)
    rows = [(f"prompt {k}", [plain(c) for c in wanted[4 * k : 4 * k + 4]]) for k in range(4)]
    page = contact_sheet([Section("Rows", "", rows)], title="")
    found = places(page, wanted)
    assert len({round(y) for _, y in found}) == 2 and len({round(x) for x, _ in found}) == 8
    data = np.array(page)
    areas = [int((data == colour).all(-1).sum()) for colour in wanted]
    assert max(areas) - min(areas) <= 4 and min(areas) > 0.97 * 128 * 128


def test_pictures_keep_their_proportions():
    page = contact_sheet([Section("", "", [("", [plain((255, 0, 0), (40, 20)), plain((0, 255, 0), (512, 512))])])], title="")
    data = np.array(page)
    spots = [np.argwhere((data == colour).all(-1)) for colour in ((255, 0, 0), (0, 255, 0))]
    assert [tuple((s.max(0) - s.min(0) + 1).tolist()) for s in spots] == [(64, 128), (128, 128)]


def test_empty_sections_rows_and_pages_are_drawn():
    sections = [Section("Nothing", "", []), Section("", "", [("no pictures", [])]), Table("None", ["a"], [])]
    assert contact_sheet(sections, title="t").width == image_grid.WIDTH
    assert contact_sheet([], title="").height == 2 * image_grid.MARGIN


def test_long_words_stay_on_the_page():
    long = "a sks dog " + "very " * 80 + "x" * 400
    section = Section(long, long, [(long, [plain((255, 0, 0))] * 4)] * 3)
    page = contact_sheet([section], title=long, subtitle=long, verdict=[long], footer=long)
    assert (np.array(page)[:, -image_grid.MARGIN :] == 255).all()


def test_numbers_of_a_table_end_at_the_right_of_their_column():
    def right_edge(text):
        data = np.array(contact_sheet([Table("", ["", "score"], [["row", text]])], title=""))
        return np.argwhere((data < 100).all(-1))[:, 1].max()

    assert abs(right_edge("0.5") - right_edge("1.125")) <= 1
    with pytest.raises(AssertionError, match="other lengths"):
        contact_sheet([Table("T", ["a", "b"], [["1"]])], title="")


# --- words ---


@pytest.mark.parametrize(
    "text,want",
    [
        ("64×64", "64x64"),
        ("café – ñandú", "cafe - nandu"),
        ("5 µs", "5 us"),
        ("a → b", "a -> b"),
        ("犬", "?"),
        ("wait…", "wait..."),
    ],
)
def test_what_the_font_lacks_is_spelled(text, want):
    assert lettering.spelled(text).replace("…", "...") == want


def test_no_letter_is_drawn_as_a_box():
    missing = bytes(lettering.font(20).getmask("\uffff"))
    for letter in lettering.spelled("".join(map(chr, range(32, 0x2200)))):
        assert letter == " " or bytes(lettering.font(20).getmask(letter)) != missing


def test_lines_fit_their_width_and_keep_every_word():
    text = "a sks dog on top of a purple rug in a forest " * 6
    lines = lettering.wrapped(text, 200, 15)
    assert " ".join(lines).split() == text.split()
    assert all(lettering.length(line, 15) <= 200 for line in lines) and len(lines) > 5
    assert lettering.wrapped("", 200, 15) == []
    assert "".join(lettering.wrapped("x" * 100, 90, 15)) == "x" * 100


# --- grid ---


def test_grid_places_every_picture_at_full_size():
    wanted = colours(7)
    page = grid([plain(c) for c in wanted], 3)
    assert page.size == (3 * 64 + 2 * 4, 3 * 64 + 2 * 4)
    found = places(page, wanted)
    assert found == [(k % 3 * 68 + 31.5, k // 3 * 68 + 31.5) for k in range(7)]
    assert grid([plain((1, 2, 3))], 4).size == (64, 64)
