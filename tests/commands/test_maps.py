"""`--maps`: a sheet beside each image, which is the image of before."""

import json

import pytest
from PIL import Image

import personalize
from personalize.common.errors import UserError

FAST = ["draw.steps=2", "device=cpu", "draw.count=2"]
PROMPT = "a photo of a dog"


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture
def draw(tiny_sd, tmp_path):
    def call(*settings, out="out", **options):
        options = {"base": str(tiny_sd), "settings": [*FAST, *settings], "out": tmp_path / out} | options
        return personalize.generate([PROMPT], **options)

    return call


def test_each_image_has_a_sheet_and_is_the_image_without_maps(draw, tmp_path):
    plain, result = draw(out="plain"), draw(maps=True)
    assert [path.name for path in result.files] == [path.name for path in plain.files] and not plain.maps
    assert [Image.open(a).tobytes() for a in result.files] == [Image.open(b).tobytes() for b in plain.files]
    assert [path.name for path in result.maps] == [f"{path.stem}-maps.png" for path in result.files]
    assert (tmp_path / "out" / "images.jsonl").read_text() == (tmp_path / "plain" / "images.jsonl").read_text()
    sheet = Image.open(result.maps[1])
    assert sheet.size == (5 * 160 + 4 * 4, 160 + 160 // 9 + 4), "the image, and the words a, photo, of and dog"
    assert sheet.text == Image.open(result.files[1]).text


def test_an_edited_image_has_a_sheet_of_its_own_words(tiny_sd, tmp_path):
    def edit(out, **options):
        options = {"base": str(tiny_sd), "settings": FAST, "out": tmp_path / out} | options
        return personalize.edit(PROMPT, "a red hat", **options)

    plain, result = edit("plain"), edit("out", maps=True)
    assert [path.name for path in result.files] == [path.name for path in plain.files] and not plain.maps
    assert [Image.open(a).tobytes() for a in result.files] == [Image.open(b).tobytes() for b in plain.files]
    assert [path.name for path in result.maps] == [f"{path.stem}-maps.png" for path in result.files[2::3]]
    assert Image.open(result.maps[0]).width == 4 * 160 + 3 * 4, "the image, and the words a, red and hat"


def test_what_has_no_maps_is_refused_before_anything_is_drawn(draw, tiny_sd, tmp_path):
    with pytest.raises(UserError, match="guidance 0 never reads .* or --local-blend"):
        personalize.edit(PROMPT, "a hat", base=str(tiny_sd), settings=[*FAST, "draw.guidance=0"], local_blend=True)
    with pytest.raises(UserError, match="guidance 0 never reads the prompt"):
        draw("draw.guidance=0", maps=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="--strength 0 draws nothing anew"):
        draw(maps=True, image=tmp_path / "photo.png", strength=0)
    assert not (tmp_path / "out").exists()


def test_the_terminal_takes_it(terminal, tiny_sd):
    status, out, _ = terminal("generate", PROMPT, "--maps", "--base", tiny_sd, "--steps", "1", "--count", "1", "--json")
    assert status == 0 and json.loads(out)["maps"][0].endswith("-maps.png")
