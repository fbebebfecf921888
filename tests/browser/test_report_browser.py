"""In a real browser the report fits phone and desktop, loads all its images, asks for nothing, and has a dark side."""

import chromium
import pytest
import reports

from personalize.evaluation.report.page import html

MANY = [f"a sks dog with a very long description of everything around it, number {k}" for k in range(25)]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not chromium.CHROMIUM, reason="there is no chromium")]


@pytest.mark.parametrize("prompts,size", [(None, 64), (MANY, 160)], ids=["toyland", "25 prompts"])
def test_the_page_fits_and_every_image_is_decoded(tmp_path, prompts, size):
    page = html(reports.evaluation(prompts, 2), reports.shown(prompts, 2, size=size))
    for width, found in zip(chromium.WIDTHS, chromium.measure(tmp_path, page), strict=True):
        assert found["width"] == found["needed"] == width and not found["beyond"] and not found["asked"]
        assert found["images"] and all(found["images"]) and all(found["styled"])
        assert len(found["images"]) + len(set(found["styled"])) > 20 and not found["small"]


def test_a_page_that_asks_for_something_is_seen_to(tmp_path):
    for found in chromium.measure(tmp_path, "<main><img src='picture.png'><img src='http://127.0.0.1:9/far.png'></main>"):
        assert any(name.endswith("/picture.png") for name in found["asked"]) and found["images"] == [0, 0]
        assert "http://127.0.0.1:9/far.png" in found["asked"]


@pytest.mark.slow
def test_the_dark_page_is_dark_and_the_light_one_light(tmp_path):
    page = html(reports.evaluation(), reports.shown())
    assert chromium.corner(tmp_path, page, chromium.DARK) == (0x15, 0x17, 0x1B)
    assert chromium.corner(tmp_path, page, chromium.LIGHT) == (0xFD, 0xFD, 0xFC)


def test_a_script_that_got_in_would_not_run(tmp_path):
    page = html(reports.evaluation(), reports.shown()).replace("</main>", "<script>document.title = 'ran'</script></main>")
    assert "<title>ran" not in chromium.after_loading(tmp_path, page)
