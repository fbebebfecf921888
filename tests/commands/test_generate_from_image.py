"""`generate --image FILE --mask FILE`: what is kept, what the files say, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import personalize
from personalize.commands.generate import in_turn
from personalize.common.errors import UserError
from personalize.common.terminal import Terminal

FAST = ["draw.steps=3", "device=cpu", "draw.count=2"]
PROMPT = "a photo of a dog"


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture
def draw(tiny_sd, tmp_path):
    def call(*settings, **options):
        return personalize.generate([PROMPT], base=str(tiny_sd), settings=[*FAST, *settings], out=tmp_path / "out", **options)

    return call


@pytest.fixture
def photo(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return saved(tmp_path / "photo.png", Image.fromarray(array))


@pytest.fixture
def mask(tmp_path):
    return saved(tmp_path / "mask.png", box((32, 32), (9, 6, 23, 20)))


def saved(path, image):
    image.save(path)
    return path


def box(size, place):
    image = Image.new("L", size, 0)
    image.paste(255, place)
    return image


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def row(folder):
    return json.loads((folder / "out" / "images.jsonl").read_text().splitlines()[0])


def test_kept_pixels_are_the_photos_exactly_and_the_others_are_not(draw, photo, mask):
    kept = pixels(mask) == 0
    for file in draw(image=photo, mask=mask).files:
        assert (pixels(file)[kept] == pixels(photo)[kept]).all()
        assert (pixels(file)[~kept] != pixels(photo)[~kept]).mean() > 0.8


def test_of_a_photo_of_another_shape_the_middle_square_is_drawn_and_that_is_said(draw, photo, mask, tmp_path, heard):
    wide = saved(tmp_path / "wide.png", Image.new("RGB", (48, 32), "red"))
    with Image.open(photo) as image, Image.open(wide) as red:
        red.paste(image, (8, 0))
        red.save(wide)
    wide_mask = saved(tmp_path / "wide_mask.png", box((48, 32), (8 + 9, 6, 8 + 23, 20)))
    results = [draw(image=image, mask=m, screen=heard).files for image, m in ((photo, mask), (wide, wide_mask))]
    assert [pixels(a).tobytes() for a in results[0]] == [pixels(b).tobytes() for b in results[1]]
    assert heard.lines == ["wide.png is 48×32 px: its middle square is drawn. For another part, crop it first."]


@pytest.fixture
def heard():
    class Heard(Terminal):
        def __init__(self):
            super().__init__(quiet=True)
            self.lines = []

        def say(self, line):
            self.lines.append(line)

    return Heard()


def test_a_row_and_an_image_say_all_of_it(draw, photo, mask, tmp_path):
    file = draw(image=photo, mask=mask, careful=2).files[0]
    written = row(tmp_path)
    assert written["image"]["file"] == "photo.png" and len(written["image"]["sha256"]) == 64 == len(written["mask"]["sha256"])
    assert (written["strength"], written["careful"], written["sampler"]) == (1.0, 2, "ddpm")
    said = Image.open(file).text["parameters"]
    assert f"Denoising strength: 1, Image hash: {written['image']['sha256'][:12]}" in said
    assert f"Mask hash: {written['mask']['sha256'][:12]}, Careful: 2" in said


def test_whatever_changes_an_edit_changes_its_name(draw, photo, mask, tmp_path):
    other = saved(tmp_path / "other.png", Image.open(photo).rotate(90))
    smaller = saved(tmp_path / "smaller.png", box((32, 32), (9, 6, 21, 20)))
    calls = [
        {}, {"image": photo}, {"image": other}, {"image": photo, "strength": 0.4}, {"image": photo, "mask": mask},
        {"image": photo, "mask": smaller}, {"image": photo, "mask": mask, "careful": 2},
        {"image": photo, "mask": mask, "strength": 0.7},
    ]  # fmt: skip
    assert len({draw(**call).files[0].name for call in calls}) == len(calls)


def test_an_image_alone_changes_by_0_6_and_the_sampler_stays(draw, photo, tmp_path):
    draw(image=photo)
    assert (row(tmp_path)["strength"], row(tmp_path)["sampler"], "mask" in row(tmp_path)) == (0.6, "dpm++2m", False)


def test_a_sampler_that_was_asked_for_is_used_with_a_mask_too(draw, photo, mask, tmp_path):
    draw("draw.sampler=ddim", image=photo, mask=mask)
    assert row(tmp_path)["sampler"] == "ddim"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": 0.5}, "--strength is about an image.*--image FILE"),
        ({"mask": "mask"}, "--mask is about an image"),
        ({"careful": 2}, "--careful is about an image"),
        ({"image": "photo", "strength": 1.5}, "--strength 1.5 is not between 0"),
        ({"image": "photo", "strength": float("nan")}, "--strength nan is not between 0"),
        ({"image": "photo", "careful": 2}, "--careful 2 .* Give a --mask FILE too"),
        ({"image": "photo", "mask": "mask", "careful": 0}, "--careful 0 is how often.* Give 1 or more"),
        ({"image": "absent"}, "absent.png"),
        ({"image": "text"}, "text.png is no image"),
        ({"image": "photo", "mask": "absent"}, "absent.png"),
        ({"image": "clear"}, "clear.png is transparent in part.*--mask FILE that is white there"),
        ({"image": "photo", "mask": "clear"}, "clear.png is transparent in part, which may mean either.*white is painted anew"),
        ({"image": "photo", "mask": "large"}, "large.png is 64×64 px, but its image .*photo.png is 32×32 px"),
        ({"image": "photo", "mask": "black"}, "the mask of photo.png is black, so that nothing is painted"),
        ({"image": "photo", "mask": "white"}, "the mask of photo.png is white, so .*Leave --mask out"),
        ({"image": "wide", "mask": "side"}, "the mask of wide.png is black in its middle square"),
    ],
)
def test_what_cannot_be_is_the_users_error_and_nothing_is_drawn(draw, photo, mask, tmp_path, options, match):
    clear = Image.new("RGBA", (32, 32), (9, 9, 9, 255))
    clear.putpixel((3, 3), (0, 0, 0, 0))
    images = {
        "clear": clear, "large": box((64, 64), (9, 9, 23, 23)), "black": Image.new("L", (32, 32), 127),
        "white": Image.new("L", (32, 32), 128), "wide": Image.new("RGB", (48, 32)), "side": box((48, 32), (0, 0, 7, 32)),
    }  # fmt: skip
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    options = {key: tmp_path / f"{value}.png" if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=match):
        draw(**options)
    assert not (tmp_path / "out").exists()


def test_careful_with_a_sampler_that_cannot_go_back_is_refused(draw, photo, mask, tmp_path):
    with pytest.raises(UserError, match="--careful 3 .* the sampler is ddim. Leave out --sampler, or --careful"):
        draw("draw.sampler=ddim", image=photo, mask=mask, careful=3)
    assert not (tmp_path / "out").exists()


def test_a_strength_that_makes_no_step_is_refused(draw, photo, tmp_path):
    with pytest.raises(UserError, match="--strength 0.1 of 3 steps is none.*--steps"):
        draw(image=photo, strength=0.1)
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_kept_whatever_steers_the_rest():
    """Guidance moves a prediction first, and the known region has the last word."""
    steer = in_turn(lambda guided, rows: (*guided, "like"), lambda guided, rows: (*guided, "kept"))
    assert steer((), slice(0, 1)) == ("like", "kept")
