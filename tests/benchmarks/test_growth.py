"""The growth benchmark says what grows, and fails where it must not."""

import dataclasses
import sys

import pytest

from benchmarks import growth
from benchmarks.growth import Measurement, RunConfig

FLAT = [Measurement(5.0, 0.06, 5e8, 6e8)] * 4
STEPS = (50, 100, 200, 400)


def last(**changed):
    return [*FLAT[:-1], dataclasses.replace(FLAT[-1], **changed)]


@pytest.mark.parametrize(
    ("name", "measurements", "good"),
    [
        ("steps", FLAT, True),
        ("steps", last(peak=6.2e8), True),
        ("steps", last(peak=6.4e8), False),
        ("steps", last(end_memory=5.4e8), False),  # a leak under a peak of another phase
        ("steps", last(step=0.07), False),
        ("photos", last(step=0.07), False),
        ("class images", last(step=0.07), False),
        ("photos", last(peak=6.4e8), True),  # said, not demanded
        ("photos a step", last(step=0.6), True),
    ],
)
def test_what_must_not_grow_fails_where_it_grows(name, measurements, good):
    passed, lines = growth.section(name, STEPS, measurements)
    assert passed is good
    assert any("**no**" in line for line in lines) == (measurements not in (FLAT,) and measurements != last(peak=6.2e8))


def test_slopes_are_for_one_of_what_grows():
    measurements = [Measurement(5 + 0.02 * x, 0.06 + 0.001 * x, 5e8, 6e8 + 1e6 * x) for x in STEPS]
    lines = growth.section("photos", STEPS, measurements)[1]
    assert "For each photo: start +20.00 ms, step +1.000 ms, peak +1.000 MB." in lines


def test_a_line_does_not_bend_and_a_square_does():
    x = (3, 5, 20, 80)
    assert growth.bends(x, [5 + 0.1 * v for v in x], 0.5) == pytest.approx(1)
    assert growth.bends(x, [5 + 0.01 * v * v for v in x], 0.5) > 1.5
    assert growth.bends(x, [5, 5.3, 4.9, 5.2], 0.5) < 1, "noise is not a bend"


def test_the_section_is_replaced_between_its_marks_and_nothing_else_is(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Speed\n\n<!-- compare -->\nx\n<!-- /compare -->\n")
    growth.write(page, ["one", "two"])
    first = page.read_text()
    marked = "## Cost grows as it should\n\n<!-- growth -->\none\ntwo\n<!-- /growth -->\n"
    assert first == f"# Speed\n\n<!-- compare -->\nx\n<!-- /compare -->\n\n{marked}"
    page.write_text(first + "\nafter\n")
    growth.write(page, ["three"])
    assert page.read_text() == first.replace("one\ntwo", "three") + "\nafter\n"
    growth.write(tmp_path / "new.md", ["one"])
    assert (tmp_path / "new.md").read_text() == "## Cost grows as it should\n\n<!-- growth -->\none\n<!-- /growth -->\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak of a process")
def test_every_series_is_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    small = RunConfig(5, 3, 2)
    series = {
        "steps": ("steps", (5, 6, 7), small),
        "photos": ("photos", (3, 4, 5), small),
        "edge, px": ("size", (64, 96), dataclasses.replace(small, class_images=0)),
    }
    monkeypatch.setattr(growth, "SERIES", series | {"class images": ("class_images", (0, 1, 2), small)})
    monkeypatch.setattr(growth, "DRAWN", {"images": [(1, 2), (2, 2)]})
    _, lines = growth.measure(tmp_path)
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 3 + 3 + 2 + 3 + 2 and any(line.startswith("Class pictures: 2 in ") for line in lines)
