"""Photos are added only if they are photos; captions, crops and masks land where `train` reads them."""

import io

import pytest
from PIL import Image, ImageDraw

from personalize.common.errors import UserError
from personalize.data import photo_edits
from personalize.data.photos import find_photos, load_photos


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def test_photos_are_added_under_plain_names_and_others_are_refused(tmp_path, folder):
    new = tmp_path / "new"
    new.mkdir()
    (new / "evil.png").write_text("%!PS-Adobe")
    (new / "x.svg").write_text("<svg/>")
    for name in ("My Dog.JPG", "a.jpeg"):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), "green").save(buffer, "JPEG")
        (new / name).write_bytes(buffer.getvalue())
    refused = photo_edits.add_photos(folder, sorted(new.iterdir()))
    assert len(refused) == 2 and "evil.png" in refused[0] and "x.svg" in refused[1]
    assert [path.name for path in find_photos(folder)[0]] == ["a-2.jpeg", "a.png", "b.png", "my-dog.jpg"]
    with pytest.raises(UserError, match="60"):
        photo_edits.add_photos(folder, [new / "a.jpeg"] * 60)


def test_captions_are_written_changed_and_taken_away(folder):
    photo_edits.write_captions(folder, [["a.png", " a {token}\n dog "], ["b.png", ""]])
    assert photo_edits.captions_of(folder) == [["a.png", "a {token} dog"], ["b.png", ""]]
    photo_edits.write_captions(folder, [["a.png", ""]])
    assert photo_edits.captions_of(folder) == [["a.png", ""], ["b.png", ""]] and not (folder / "a.txt").exists()
    with pytest.raises(UserError, match="no photo"):
        photo_edits.write_captions(folder, [["../a.png", "x"]])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_painted_mask_is_the_one_that_training_reads(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30), "red").save(folder / "a.png", exif=exif)
    size = photo_edits.photo_of(folder, "a.png").image.size
    painted = Image.new("RGBA", size)
    ImageDraw.Draw(painted).rectangle((2, 3, 12, 13), fill="white")
    for _ in range(2):  # again, in place of the first
        photo_edits.keep_photo_mask(folder, "a.png", {"layers": [painted]})
    mask = load_photos(folder, min_size=1)[0][0].mask
    assert mask.getbbox() == (2, 3, 13, 14)
    with pytest.raises(UserError, match="nothing is painted"):
        photo_edits.keep_photo_mask(folder, "a.png", {"layers": [Image.new("RGBA", size)]})


def test_a_crop_takes_the_photos_place_and_the_original_stays(folder):
    photo_edits.keep_photo_crop(folder, "a.png", {"background": Image.new("RGBA", (20, 20), "red")})
    photos = load_photos(folder, min_size=1)[0]
    assert [photo.size for photo in photos] == [(20, 20), (40, 30)] and (folder / "originals" / "a.png").exists()
    with pytest.raises(UserError, match="choose a photo"):
        photo_edits.keep_photo_crop(folder, "../a.png", {"background": Image.new("RGB", (2, 2))})
