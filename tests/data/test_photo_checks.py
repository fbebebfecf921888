"""The doctor: every fault that was put into a photo is found and named, and good photos are left alone."""

import base64
import io
import json
import os
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from personalize.cli.tools import app
from personalize.commands.check_photos import check_photos
from personalize.common.errors import UserError
from personalize.common.terminal import Terminal
from personalize.data import photo_checks
from personalize.data.photo_checks import NOTE, OK, WARNING, examine_photos
from personalize.data.photo_page import SHOWN, photo_page
from personalize.data.photos import load_photos
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, PLACES

EXAMPLES = Path(__file__).parents[2] / "data_examples"


def noise(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def scene(seed, width=320, height=320):
    """Sharp blocks of colours, another image for each seed."""
    return noise(seed, 8, 8).resize((width, height), Image.Resampling.NEAREST)


def box_mask(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.fixture
def folder(tmp_path):
    """Three photos without a fault, 320 px."""
    place = tmp_path / "photos"
    place.mkdir()
    for k in range(3):
        scene(k).save(place / f"{k}.png")
    return place


def report(folder, size=64, crop="center"):
    return examine_photos(load_photos(folder, min_size=1)[0], size, crop=crop)


def faults(folder, size=64, crop="center"):
    """The findings that are not in order, as one text a severity."""
    found = report(folder, size, crop).findings
    return [" | ".join(f.text for f in found if f.severity == severity) for severity in (WARNING, NOTE)]


# Good photos


@pytest.mark.parametrize("subject", ["dog", "cat", "teapot"])
def test_the_example_photos_have_no_fault(subject):
    found = report(EXAMPLES / subject)
    assert {finding.severity for finding in found.findings} == {OK}
    assert [finding.text for finding in found.together] == ["5 photos: 3 to 5 are usual"]
    assert load_photos(EXAMPLES / subject, min_size=64)[1] == []


def test_each_photo_is_stated_with_its_size_turn_and_crop(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(3, 240, 320).save(folder / "3.png", exif=exif)
    found = report(folder)
    assert [finding.text for finding in found.findings] == [
        *(f"{k}.png: 320×320 px, kept whole" for k in range(3)),
        "3.png: 320×240 px, turned upright (EXIF orientation 6), the crop keeps 75% of it",
        "4 photos: 3 to 5 are usual",
    ]
    exam = found.stats[3]
    assert exam.photo.orientation == 6 and exam.box == (40, 0, 280, 240) and exam.cut_off == 0.25
    assert found.each[3] == (found.findings[3],) and found.findings[3].path == exam.photo.path


@pytest.mark.parametrize(("count", "severity"), [(1, WARNING), (2, WARNING), (3, OK), (6, OK), (12, OK)])
def test_one_or_two_photos_are_few_and_many_are_fine(tmp_path, count, severity):
    for k in range(count):
        scene(k).save(tmp_path / f"{k:02d}.png")
    (finding,) = report(tmp_path).together
    assert finding.severity == severity and f"{count} photo" in finding.text


# Each photo


def test_a_photo_with_too_few_pixels_is_named_with_its_enlargement_and_setting(folder):
    scene(3, 40, 50).save(folder / "small.png")
    warnings, _ = faults(folder)
    assert "small.png is 40×50 px" in warnings and "64 px" in warnings and "1.6 times" in warnings
    assert "photos.min_size=40" in warnings and "0.png" not in warnings
    assert faults(folder, size=32)[0] == ""


def test_what_a_long_photo_loses_is_noted_and_a_wide_screen_one_is_in_order(folder):
    scene(3, 320, 180).save(folder / "wide.png")
    assert faults(folder) == ["", ""]
    scene(4, 320, 160).save(folder / "long.png")
    _, notes = faults(folder)
    assert "50% off long.png" in notes and "mask" in notes


def test_blur_is_noticed_but_not_in_small_images_nor_for_a_soft_background(tmp_path):
    sharp, soft = scene(0, 512, 512), scene(1, 512, 512).filter(ImageFilter.GaussianBlur(6))
    portrait = scene(2, 512, 512).filter(ImageFilter.GaussianBlur(12))
    portrait.paste(noise(3, 100, 100), (200, 200))
    sharp.save(tmp_path / "sharp.png")
    portrait.save(tmp_path / "portrait.png")
    Image.new("RGB", (64, 64), (40, 60, 220)).save(tmp_path / "flat.png")
    assert load_photos(tmp_path, min_size=1)[1] == []
    soft.save(tmp_path / "soft.png")
    (notice,) = load_photos(tmp_path, min_size=1)[1]
    assert "nothing is sharp in soft.png" in notice
    assert notice in faults(tmp_path)[0]


def test_dark_and_burnt_out_photos_are_found(folder):
    dim = np.asarray(scene(3)) // 5
    Image.fromarray(dim.astype(np.uint8)).save(folder / "dark.png")
    burnt = scene(4)
    burnt.paste((255, 255, 255), (90, 90, 230, 230))
    burnt.save(folder / "burnt.png")
    warnings, notes = faults(folder)
    assert "dark.png is very dark" in warnings and "of the middle of burnt.png is pure white" in notes
    box_mask((320, 320), (90, 90, 230, 230)).save(folder / "burnt.mask.png")
    assert "% of the subject of burnt.png is pure white" in faults(folder)[0]
    box_mask((320, 320), (0, 100, 60, 300)).save(folder / "burnt.mask.png")
    assert "burnt.png is pure white" not in " ".join(faults(folder))


def test_transparency_is_noted_and_judged_as_a_mask(folder):
    for k in range(3):
        image = scene(k)
        image.putalpha(box_mask((320, 320), (80, 80, 240, 240)))
        image.save(folder / f"{k}.png")
    found = report(folder)
    assert "transparent parts of 0.png" in faults(folder)[1]
    assert [exam.coverage for exam in found.stats] == pytest.approx([0.25] * 3, abs=0.01)
    assert "all 3 photos have almost the same background" in faults(folder)[0]
    assert "photos.background=0" in faults(folder)[0]


# Masks


def test_a_subject_that_the_crop_cuts_is_warned_of_with_what_would_keep_it(folder):
    scene(3, 400, 200).save(folder / "3.png")
    box_mask((400, 200), (250, 50, 350, 150)).save(folder / "3.mask.png")
    warnings, _ = faults(folder)
    assert "the crop cuts 50% of the subject off 3.png. With --set photos.crop=subject it is 0%." in warnings
    exam = report(folder).stats[3]
    assert exam.lost == pytest.approx(0.5) and exam.coverage == pytest.approx(0.125, abs=0.01)
    kept = report(folder, crop="subject").stats[3]
    assert kept.lost == 0 and kept.box == (200, 0, 400, 200) and "cuts" not in faults(folder, crop="subject")[0]
    box_mask((400, 200), (0, 50, 400, 150)).save(folder / "3.mask.png")
    assert "Use a photo with more room" in faults(folder)[0]


def test_subjects_that_are_tiny_or_everything_and_inverted_masks_are_told(folder):
    box_mask((320, 320), (140, 140, 190, 190)).save(folder / "0.mask.png")
    scene(1, 640).save(folder / "1.png")
    box_mask((640, 320), (150, 0, 490, 320)).save(folder / "1.mask.png")
    inverted = Image.new("L", (320, 320), 255)
    inverted.paste(0, (100, 100, 220, 220))
    inverted.save(folder / "2.mask.png")
    warnings, notes = faults(folder)
    assert "the subject is only 2.4% of the crop of 0.png" in warnings
    assert "the mask of 1.png marks 100% of the crop" in notes
    assert "the mask of 2.png is white along 100% of the photo's edge" in warnings


@pytest.mark.parametrize("box, share", [((0, 0, 40, 40), "1.6%"), ((0, 0, 320, 312), "97.5%")])
def test_a_mask_of_next_to_nothing_or_next_to_all_is_one_warning(folder, box, share):
    box_mask((320, 320), box).save(folder / "0.mask.png")
    (warning, note) = faults(folder)
    assert warning.startswith(f"the mask of 0.png marks {share} of the photo as the subject, where 2% to 95% can be right")
    assert " | " not in warning and "0.png" not in note, "no second finding says the same"


def test_masks_for_some_photos_only_are_noted_and_a_subject_crop_without_any_is_a_warning(folder):
    assert "no photo has a mask" in faults(folder, crop="subject")[0]
    box_mask((320, 320), (80, 80, 240, 240)).save(folder / "0_mask.png")
    for crop in ("center", "subject", "random"):
        assert faults(folder, crop=crop) == ["", "no mask for 1.png, 2.png: of these, the whole image counts as the subject"]


def test_a_mask_that_may_have_been_turned_wrongly_is_noted(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    scene(0).save(folder / "0.png", exif=exif)
    assert faults(folder)[1] == ""
    box_mask((320, 320), (80, 80, 240, 240)).save(folder / "0_mask.png")
    assert "0.png and its mask were turned upright" in faults(folder)[1]


# Between photos


def test_copies_are_noticed_and_different_images_are_not(tmp_path):
    for i in range(4):
        scene(i).save(tmp_path / f"{i}.png")
    assert load_photos(tmp_path, min_size=64)[1] == []
    shutil.copy(tmp_path / "0.png", tmp_path / "same.png")
    scene(1).resize((300, 300)).save(tmp_path / "smaller.jpg", quality=80)
    notices = " | ".join(load_photos(tmp_path, min_size=64)[1])
    assert "0.png and same.png are the same file" in notices
    assert "1.png and smaller.jpg are almost the same image" in notices
    assert "2.png" not in notices and "3.png" not in notices and "background" not in notices
    assert [[finding.severity for finding in found] for found in report(tmp_path).each] == [[OK]] * 4 + [[OK, WARNING]] * 2


def test_many_copies_do_not_flood_the_user(tmp_path):
    for i in range(12):
        scene(0, 320 + i).save(tmp_path / f"{i}.png")
    notices = load_photos(tmp_path, min_size=64)[1]
    assert len(notices) == photo_checks.NAMES_SHOWN + 1 and notices[-1] == "7 more photos like that"


@pytest.mark.parametrize("place", PLACES)
def test_photos_of_one_place_have_the_same_background_and_of_several_have_not(tmp_path, place):
    who = scenes.sample_subject(HELD_OUT + 7, "cat")

    def take(places):
        for k, where in enumerate(places):
            seen = scenes.sample_scene(HELD_OUT + 70 + k, subject=who, place=where, action="standing", accessory=None)
            draw_scene(seen)[0].save(tmp_path / f"{k}.png")
        return faults(tmp_path)[0]

    assert "all 5 photos have almost the same background" in take([place] * 5)
    others = [other for other in PLACES if other != place]
    assert take([place, *others[:4]]) == ""
    assert take([place] * 2 + others[:3]) == ""
    names = take([place] * 4 + others[:1])
    assert "0.png, 1.png, 2.png, 3.png have almost the same background" in names


def test_one_place_seen_through_shifted_windows_is_one_background(tmp_path):
    """The same carpet, the frame moved by a quarter and the light changed: pixels differ, colours do not."""
    wall = noise(0, 40, 40).resize((800, 800), Image.Resampling.BICUBIC).point(lambda v: 90 + v // 4)
    for k, (x, y) in enumerate([(0, 0), (200, 100), (100, 200), (280, 280)]):
        photo = wall.crop((x, y, x + 512, y + 512)).point(lambda v, k=k: v * (20 + k) // 21)
        photo.paste(scene(k, 200, 200), (156, 156))
        photo.save(tmp_path / f"{k}.png")
    assert "all 4 photos have almost the same background" in faults(tmp_path)[0]


def test_a_background_is_what_the_masks_leave(folder):
    """Unlike subjects before one wall; then one subject that fills the border before unlike places."""
    for k in range(3):
        photo = Image.new("RGB", (320, 320), (150, 140, 120))
        photo.paste(scene(k, 320, 240), (0, 0))
        photo.save(folder / f"{k}.png")
        box_mask((320, 320), (0, 0, 320, 240)).save(folder / f"{k}.mask.png")
    assert "all 3 photos have almost the same background" in faults(folder)[0]
    for k in range(3):
        photo = scene(k)
        photo.paste((150, 140, 120), (0, 0, 320, 240))
        photo.save(folder / f"{k}.png")
    assert "background" not in faults(folder)[0]


# The command and its page


class Lines(Terminal):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_the_command_says_every_finding_and_writes_one_page(folder, tmp_path):
    screen, out = Lines(), tmp_path / "made" / "sheet.html"
    result = check_photos(str(folder), out=out, screen=screen)
    assert result.page == out and [path.name for path in out.parent.iterdir()] == ["sheet.html"]
    assert screen.lines == [*(f"ok       {f.text}" for f in result.findings), "nothing to put right"]
    assert json.loads(json.dumps([asdict(f) for f in result.findings]))[0]["path"].endswith("0.png")
    small = check_photos(folder, size=512, out=out).findings
    assert sum(finding.severity == WARNING for finding in small) == 3


def test_without_a_size_photos_are_examined_as_the_base_trains_them(folder, tmp_path, tiny_sd):
    out = tmp_path / "a.html"
    check_photos(folder, out=out)
    assert "at 64×64 px" in out.read_text(encoding="utf-8")
    bare = tmp_path / "bare"
    for part in ("unet", "vae"):
        (bare / part).mkdir(parents=True)
        shutil.copy(tiny_sd / part / "config.json", bare / part)
    check_photos(folder, base=str(bare), out=out)
    assert "at 32×32 px" in out.read_text(encoding="utf-8")
    (bare / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="sample_size. Give --size"):
        check_photos(folder, base=str(bare), out=out)


def test_photos_that_keep_their_shape_are_shown_and_measured_as_what_they_become(folder, tmp_path):
    out = tmp_path / "a.html"
    for k, size in enumerate([(640, 210), (210, 640), (60, 640)]):
        scene(k + 3).resize(size).save(folder / f"{k}.png")
    options = ["photos", str(folder), "--size", "128", "--shape", "buckets", "--out", str(out), "--json"]
    texts = [finding["text"] for finding in json.loads(CliRunner().invoke(app, options).stdout)["findings"]]
    assert "0.png: 640×210 px, becomes 192×64 px, the crop keeps 98% of it" in texts
    assert "1.png: 210×640 px, becomes 64×192 px, the crop keeps 98% of it" in texts
    assert any(
        text.startswith("2.png is 60×640 px, smaller than the 64×256 px it is trained at: it is enlarged 1.1") for text in texts
    )
    assert "they keep their shape, in 3 sizes: 64×192 (1), 64×256 (1), 192×64 (1)" in texts
    page = out.read_text(encoding="utf-8")
    assert "for training at 128×128 px, each in its own shape of that area" in page and page.count("becomes ") == 3
    with pytest.raises(UserError, match="unknown shape 'bucket'; did you mean 'buckets'"):
        check_photos(folder, shape="bucket", out=out)
    with pytest.raises(UserError, match="size 100 px is not a multiple of 32.* The nearest: 96 or 128"):
        check_photos(folder, size=100, shape="buckets", out=out)


def test_the_command_line_prints_the_page_or_the_findings(folder, tmp_path):
    out = str(tmp_path / "a.html")
    assert CliRunner().invoke(app, ["photos", str(folder), "--out", out, "--quiet"]).stdout == out + "\n"
    printed = json.loads(CliRunner().invoke(app, ["photos", str(folder), "--out", out, "--json"]).stdout)
    assert set(printed) == {"sheet", "findings"} and printed["sheet"] == out and len(printed["findings"]) == 4


def test_a_file_that_cannot_be_used_is_named_and_the_others_are_examined(folder, tmp_path):
    (folder / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "clip.mov").touch()
    scene(5).save(folder / "masked.png")
    Image.new("L", (10, 320), 255).save(folder / "masked.mask.png")
    Image.new("L", (10, 10), 255).save(folder / "alone_mask.png")
    findings = check_photos(folder, size=64, out=tmp_path / "a.html").findings
    assert [f.text.partition(":")[0] for f in findings if f.path] == ["0.png", "1.png", "2.png"]
    texts = {severity: " | ".join(f.text for f in findings if f.severity == severity) for severity in (WARNING, NOTE)}
    assert "broken.jpg is" in texts[WARNING] and "masked.mask.png is 10×320 px" in texts[WARNING]
    assert "clip.mov" in texts[NOTE] and "alone_mask.png" in texts[NOTE]


def test_what_leaves_nothing_to_examine_is_an_error(folder, tmp_path):
    def told(source, **changes):
        with pytest.raises(UserError) as caught:
            check_photos(source, **({"size": 64, "out": tmp_path / "a.html"} | changes))
        return str(caught.value)

    assert "unknown crop 'centre'; did you mean 'center'?" in told(folder, crop="centre")
    assert "is a folder" in told(folder, out=folder)
    assert told(folder, out="x.png") == "x.png is no name for the page, which is HTML. Give --out x.html."
    assert "no photos in" in told(tmp_path)
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert "none of these photos can be used (and 2 more)" in told(folder) and not (tmp_path / "a.html").exists()


class Page(HTMLParser):
    """The words of a page, its tags, and its images by their alt."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.images = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            data = base64.b64decode(dict(attributes)["src"].partition("base64,")[2])
            self.images[dict(attributes)["alt"]] = Image.open(io.BytesIO(data)).convert("RGB")

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))


def pixels_like(image, colour):
    return int((np.abs(np.asarray(image, dtype=int) - colour).max(-1) < 40).sum())


def test_the_page_shows_each_photo_with_its_crop_and_its_findings(tmp_path):
    for k in range(3):
        scene(k, 900, 300).save(tmp_path / f"{k}.png")
    text = photo_page(report(tmp_path, size=512))
    page = Page(text)
    assert [image.size for image in page.images.values()] == [(512, 171), (512, 512)] * 3
    assert text.count('style="left:33.33%;top:0.0%;width:33.33%;height:100.0%"') == 3
    assert "3 of 3 photos need to be replaced or put right." in page.words
    for k in range(3):
        assert f"{k}.png" in page.words and any(words.startswith(f"{k}.png is 900×300 px, smaller") for words in page.words)
    assert "http:" not in text and "https:" not in text


def test_names_of_files_are_text_in_the_page_and_never_markup(tmp_path):
    name = "<script>alert('x')</script>&amp; \"q\".png".replace("/", "∕")
    scene(0).save(tmp_path / name)
    Path(os.fsdecode(os.fsencode(tmp_path / "latin-\udce9.png"))).write_bytes((tmp_path / name).read_bytes())
    out = tmp_path / "made" / "a.html"
    check_photos(tmp_path, size=64, out=out)
    page = Page(out.read_text(encoding="utf-8"))
    assert name in page.words and name in page.images and "latin-?.png" in page.words
    assert "script" not in page.tags


def test_what_training_sees_is_as_coarse_as_it_is_and_moves_with_the_crop(tmp_path):
    photo = Image.new("RGB", (200, 100), (10, 20, 30))
    photo.paste((200, 100, 0), (150, 25, 200, 75))
    photo.save(tmp_path / "a.png")
    box_mask((200, 100), (150, 25, 200, 75)).save(tmp_path / "a_mask.png")
    center, subject = (Page(photo_page(report(tmp_path, 4, crop))).images for crop in ("center", "subject"))
    seen = "what training sees of a.png"
    assert center[seen].size == subject[seen].size == (4, 4)
    assert pixels_like(center[seen], (200, 100, 0)) < pixels_like(subject[seen], (200, 100, 0))
    assert pixels_like(subject["a.png"], (40, 215, 120)) > 40


def test_a_page_of_very_many_photos_shows_the_first_and_names_them_all(tmp_path):
    scene(0).save(tmp_path / "a.png")
    photos = load_photos([tmp_path / "a.png"] * 70, min_size=1)[0]
    found = examine_photos(photos, 64)
    assert [len(of_one) for of_one in found.each] == [1] + [2] * 69
    text = photo_page(found)
    assert text.count("<img") == 2 * SHOWN and text.count("<h3>a.png</h3>") == 70 and "Only the first 60 are shown." in text
