"""In a real browser the photo page fits phone and desktop, decodes all its images, asks for nothing, and has a dark side."""

import chromium
import pytest
from PIL import Image, ImageDraw

from personalize.data.photo_checks import examine_photos
from personalize.data.photo_page import photo_page
from personalize.data.photos import load_photos

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not chromium.CHROMIUM, reason="there is no chromium")]


@pytest.fixture
def page(tmp_path):
    """A wide, a high and a square photo, one of them with a mask, all with a name that is hard to break."""
    place = tmp_path / "photos"
    place.mkdir()
    for k, size in enumerate([(900, 200), (200, 900), (64, 64)]):
        Image.new("RGB", size, (200, 90 * k, 30)).save(place / f"{'a-long-name' * 8}{k}.png")
    mask = Image.new("L", (900, 200))
    ImageDraw.Draw(mask).ellipse((500, 20, 700, 180), fill=255)
    mask.save(place / f"{'a-long-name' * 8}0.mask.png")
    return photo_page(examine_photos(load_photos(place, min_size=1)[0], 128, crop="subject"))


def test_the_page_fits_and_every_image_is_decoded(tmp_path, page):
    for width, found in zip(chromium.WIDTHS, chromium.measure(tmp_path, page), strict=True):
        assert found["width"] == found["needed"] == width and not found["asked"] and not found["small"]
        assert not [html for html in found["beyond"] if not html.startswith("<i ")]  # the crop's frame ends in its photo
        assert len(found["images"]) == 6 and all(found["images"])


@pytest.mark.slow
def test_the_dark_page_is_dark_and_the_light_one_light(tmp_path, page):
    assert chromium.corner(tmp_path, page, chromium.DARK) == (0x15, 0x17, 0x1B)
    assert chromium.corner(tmp_path, page, chromium.LIGHT) == (0xFD, 0xFD, 0xFC)
