"""Photos: every file a user may have is either read as it looks, or refused with its name and a remedy."""

import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from personalize.common.errors import UserError
from personalize.common.files import sha256
from personalize.core.rng import generator
from personalize.data.crops import crop_box, draw_crops, epoch_order, image_tensor, largest_box, mask_tensor
from personalize.data.decode import MAX_PIXELS
from personalize.data.photos import find_photos, load_photos, preview

# EXIF orientation -> what makes the stored image of an upright one
STORED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 60), (40, 60, 220), (230, 220, 40)


def to_tensor(photo, size, **how):
    return image_tensor(draw_crops([photo], **how), size)[0]


def corners(width=48, height=32):
    """An asymmetric image: four quarters of four colours, wider than high."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate((RED, GREEN, BLUE, YELLOW)):
        image.paste(colour, (i % 2 * width // 2, i // 2 * height // 2, (i % 2 + 1) * width // 2, (i // 2 + 1) * height // 2))
    return image


def noise(seed, width=64, height=64):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def scene(seed, width=320, height=320):
    """Sharp blocks of colours, another image for each seed."""
    return noise(seed, 8, 8).resize((width, height), Image.Resampling.NEAREST)


def read(path, min_size=1):
    """The only photo at this path."""
    (photo,), _ = load_photos([path], min_size=min_size)
    return photo


def pixels(image):
    return np.asarray(image).astype(int)


def refusal(source, min_size=1):
    """What the user is told about a source that cannot be used."""
    with pytest.raises(UserError) as caught:
        load_photos(source, min_size=min_size)
    return str(caught.value)


# Finding


def test_a_folder_is_sorted_by_name_and_foreign_files_are_named(tmp_path):
    for i, name in enumerate(("b.PNG", "a.jpg", "c.webp", ".hidden.png", "Thumbs.db.png")):
        (scene(i) if name != ".hidden.png" else scene(0)).save(tmp_path / name)
    (tmp_path / "Thumbs.db.png").unlink()
    for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "a.txt", "subject.toml", "clip.mov", "layers.psd"):
        (tmp_path / junk).write_bytes(b"junk")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    noise(9).save(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    found, notices = load_photos(tmp_path, min_size=64)
    assert [photo.name for photo in found] == ["a.jpg", "b.PNG", "c.webp"]
    assert notices == ["skipped 2 files that are not photos: clip.mov, layers.psd"]


def test_a_list_keeps_its_order_and_links_are_followed(tmp_path):
    noise(1).save(tmp_path / "a.png")
    noise(2).save(tmp_path / "b.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    found, _ = load_photos([tmp_path / "b.png", str(tmp_path / "link.png")], min_size=64)
    assert [photo.name for photo in found] == ["b.png", "link.png"]
    assert found[1].sha256 == read(tmp_path / "a.png").sha256


def test_the_caption_is_the_text_beside_the_photo(tmp_path):
    for name in ("a", "b", "c"):
        scene(ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("\ufeffa photo of\n my dög \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n")
    found, notices = load_photos(tmp_path, min_size=1)
    assert [photo.caption for photo in found] == ["a photo of my dög", None, None]
    assert notices == []


def test_sources_without_photos_say_what_is_there(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert "gone.jpg does not exist" in refusal([tmp_path / "gone.jpg"])
    empty = refusal(tmp_path)
    assert f"no photos in {tmp_path}" in empty and "JPEG, PNG" in empty
    (tmp_path / "dog").mkdir()
    (tmp_path / "film.mov").touch()
    assert "film.mov" in refusal(tmp_path) and "name the one you mean: dog" in refusal(tmp_path)
    assert "is a folder" in refusal([tmp_path / "dog"])
    assert "list of photos is empty" in refusal([])


# Decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_the_same_rgb_image(tmp_path, mode):
    gray = Image.new("L", (40, 30), 0)
    gray.paste(255, (20, 0, 40, 30))
    wide = {"I;16": (np.uint16, 257), "I": (np.int32, 257), "F": (np.float32, 1 / 255)}
    if mode in wide:
        dtype, scale = wide[mode]
        image = Image.fromarray((np.asarray(gray) * np.float64(scale)).astype(dtype))
    else:
        image = gray.convert("RGB").convert("P").convert("PA") if mode == "PA" else gray.convert("RGB").convert(mode)
    assert image.mode == mode
    path = tmp_path / ("a.png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "a.tif")
    image.save(path)
    photo = read(path)
    assert photo.image.mode == "RGB" and photo.mask is None
    assert np.abs(pixels(photo.image) - pixels(gray.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_give_the_same_upright_image(tmp_path, orientation):
    undo = STORED_BY.get(orientation)
    upright = corners()
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    photo = read(tmp_path / "a.jpg")
    assert photo.size == photo.image.size == (48, 32)
    assert np.abs(pixels(photo.image) - pixels(upright)).mean() < 3


def test_the_orientation_turns_the_mask_too(tmp_path):
    image = corners().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    photo = read(tmp_path / "a.png")
    assert photo.mask.size == photo.image.size == (32, 48)
    assert (photo.mask.getpixel((31, 0)), photo.image.getpixel((31, 0))) == (0, (255, 255, 255))
    assert (photo.mask.getpixel((0, 0)), photo.image.getpixel((0, 0))) == (255, BLUE)


def test_metadata_with_the_place_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 0.0)})
    corners().save(tmp_path / "a.jpg", exif=exif, comment=b"at home")
    assert Image.open(tmp_path / "a.jpg").getexif().get_ifd(0x8825)
    image = read(tmp_path / "a.jpg").image
    image.save(tmp_path / "again.jpg")
    again = Image.open(tmp_path / "again.jpg")
    assert image.info == {} and not image.getexif() and not again.getexif() and "comment" not in again.info


def test_broken_exif_does_not_refuse_a_photo(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read(tmp_path / "a.jpg").size == (48, 32)


def test_a_16_bit_gradient_stays_a_gradient(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp // 64).save(tmp_path / "dark.png")
    assert pixels(read(tmp_path / "a.png").image)[0, :, 0].tolist() == list(range(256))
    assert pixels(read(tmp_path / "dark.png").image).max() == 4


def test_transparency_is_put_on_white_and_kept_as_a_mask(tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.paste((0, 0, 0, 128), (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    (photo,), notices = load_photos(tmp_path, min_size=64)
    seen = [photo.image.getpixel(at) for at in ((0, 0), (63, 0), (63, 63))]
    assert seen == [(255, 255, 255), (127, 127, 127), (255, 0, 0)]
    assert photo.mask.mode == "L" and photo.mask.getextrema() == (0, 255)
    assert notices == ["transparent parts of a.png were put on white; what is not transparent is its mask"]


@pytest.mark.parametrize("kind", ["palette", "colour key"])
def test_a_transparent_colour_is_transparency(tmp_path, kind):
    image = Image.new("RGB", (8, 8), RED)
    image.paste((0, 0, 255), (4, 0, 8, 8))
    if kind == "palette":
        image = image.quantize(2)
        image.save(tmp_path / "a.png", transparency=image.getpixel((7, 0)))
    else:
        image.save(tmp_path / "a.png", transparency=(0, 0, 255))
    photo = read(tmp_path / "a.png")
    assert photo.image.getpixel((7, 0)) == (255, 255, 255) and photo.mask.getpixel((7, 0)) == 0
    assert photo.mask.getpixel((0, 0)) == 255


def test_an_animation_is_its_first_frame(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert np.abs(pixels(read(tmp_path / "a.gif").image.getpixel((0, 0))) - RED).max() < 8


def test_colours_follow_an_embedded_profile(tmp_path):
    image = Image.new("RGB", (8, 8), (120, 60, 200))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    image.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    swapped = bytearray(srgb)
    places = range(132, 132 + 12 * struct.unpack(">I", swapped[128:132])[0], 12)
    tags = {bytes(swapped[at : at + 4]): at for at in places}
    red, blue, name = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4, tags[b"desc"]
    swapped[red : red + 8], swapped[blue : blue + 8] = swapped[blue : blue + 8], swapped[red : red + 8]
    swapped[name : name + 4] = b"zzzz"
    image.save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    assert read(tmp_path / "srgb.png").image.getpixel((0, 0)) == (120, 60, 200)
    assert read(tmp_path / "broken.png").image.getpixel((0, 0)) == (120, 60, 200)
    assert np.abs(pixels(read(tmp_path / "swapped.png").image.getpixel((0, 0))) - (200, 60, 120)).max() <= 2


def test_huge_photos_are_kept_smaller_but_report_their_size(tmp_path):
    Image.new("RGB", (4400, 4200), RED).save(tmp_path / "a.jpg")
    Image.new("RGB", (4200, 4400), RED).save(tmp_path / "b.png")
    jpeg, png = read(tmp_path / "a.jpg"), read(tmp_path / "b.png")
    assert (jpeg.size, png.size) == ((4400, 4200), (4200, 4400))
    assert (jpeg.image.size, png.image.size) == ((2200, 2100), (2100, 2200))


# Refusing


@pytest.mark.parametrize(
    ("suffix", "reason"), [*((kind, "is damaged") for kind in ("jpg", "png", "webp", "tif", "gif")), ("avif", "is no image")]
)
def test_a_truncated_file_is_refused_even_where_pillow_is_told_to_be_lenient(tmp_path, suffix, reason, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / f"a.{suffix}"
    noise(0).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} {reason}" in refusal(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_files_that_only_look_like_photos_are_refused(tmp_path):
    (tmp_path / "notes.jpg").write_text("buy milk")
    assert "notes.jpg is no image" in refusal(tmp_path)
    (tmp_path / "notes.jpg").write_bytes(b"")
    assert "notes.jpg is an empty file" in refusal(tmp_path)
    (tmp_path / "notes.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "notes.jpg is no image" in refusal(tmp_path)
    (tmp_path / "notes.jpg").unlink()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert "cannot read the photo" in refusal(tmp_path)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    limit = Image.MAX_IMAGE_PIXELS
    told = refusal(tmp_path)
    assert "bomb.png says it is 60000×60000 px" in told and str(MAX_PIXELS // 10**6) in told
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["a.heic", "named_wrong.jpg"])
def test_heic_without_a_decoder_names_the_remedy(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    told = refusal(tmp_path)
    assert f"{name} is HEIC" in told and "pip install pillow-heif" in told and "JPEG" in told


def test_a_small_photo_is_refused_with_the_setting_that_allows_it(tmp_path):
    noise(0, 96, 96).save(tmp_path / "IMG_2.jpg")
    path = tmp_path / "IMG_2.jpg"
    assert refusal(tmp_path, 512) == (
        f"{path} is 96×96 px, smaller than the 512 px this base trains at. Use a larger photo, or --set photos.min_size=96."
    )
    assert read(path, 96).size == (96, 96)
    noise(1, 200, 80).save(tmp_path / "z.png")
    told = refusal(tmp_path, 512)
    assert "z.png is 200×80 px" in told and "(1 more too)" in told and told.endswith("photos.min_size=80.")


# Masks


def spot(size=(60, 40), box=(40, 10, 56, 26)):
    """A mask: white within the box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def put_mask(path, name, mask):
    (path.parent / name).parent.mkdir(exist_ok=True)
    mask.save(path.parent / name)


@pytest.mark.parametrize("name", ["a.mask.png", "a_mask.png", "masks/a.png", "a_MASK.PNG", "a.mask.webp", "masks/a.jpg"])
def test_a_mask_beside_a_photo_is_its_mask_and_no_photo(tmp_path, name):
    scene(0, 60, 40).save(tmp_path / "a.jpg")
    scene(1, 60, 40).save(tmp_path / "b.jpg")
    put_mask(tmp_path / "a.jpg", name, spot())
    found, skipped = find_photos(tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.jpg"] and skipped == []
    (a, b), _ = load_photos(tmp_path, min_size=1)
    assert a.mask.mode == "L" and a.mask.size == a.image.size and a.subject == (40, 10, 56, 26)
    assert a.mask_sha256 == sha256(tmp_path / name) and a.sha256 == sha256(tmp_path / "a.jpg")
    assert (b.mask, b.mask_sha256, b.subject) == (None, None, None)
    assert load_photos([tmp_path / "a.jpg", *tmp_path.glob(name)], min_size=1)[0][0].mask_sha256 == a.mask_sha256


def test_a_mask_is_brightness_or_alpha_of_any_depth(tmp_path):
    scene(0, 60, 40).save(tmp_path / "a.png")
    cut_out = scene(5, 60, 40).convert("RGBA")
    cut_out.putalpha(spot())
    deep = Image.fromarray(np.asarray(spot()).astype(np.uint16) * 257)
    for mask in (spot(), spot().convert("RGB"), spot().convert("1"), spot().convert("P"), cut_out, deep):
        mask.save(tmp_path / "a.mask.png")
        assert read(tmp_path / "a.png").mask.tobytes() == spot().tobytes(), mask.mode


def test_a_mask_file_counts_for_more_than_the_alpha_of_the_photo(tmp_path):
    image = scene(0, 60, 40).convert("RGBA")
    image.putalpha(spot(box=(0, 0, 20, 20)))
    image.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").subject == (0, 0, 20, 20) and read(tmp_path / "a.png").mask_sha256 is None
    spot().save(tmp_path / "a_mask.png")
    assert read(tmp_path / "a.png").subject == (40, 10, 56, 26)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_of_the_stored_size_is_turned_with_its_photo(tmp_path, orientation):
    undo = STORED_BY.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo, mask = (x if undo is None else x.transpose(undo) for x in (scene(0, 60, 40), spot()))
    photo.save(tmp_path / "a.png", exif=exif)
    mask.save(tmp_path / "a.mask.png")
    assert read(tmp_path / "a.png").mask.tobytes() == spot().tobytes()
    assert read(tmp_path / "a.png").orientation == orientation
    mask.save(tmp_path / "a.mask.png", exif=exif)
    assert read(tmp_path / "a.png").mask.tobytes() == spot().tobytes()
    if orientation in (5, 6, 7, 8):
        spot().save(tmp_path / "a.mask.png")
        assert read(tmp_path / "a.png").mask.tobytes() == spot().tobytes()
        mask.resize([side // 2 for side in mask.size], Image.Resampling.BOX).save(tmp_path / "a.mask.png")
        assert read(tmp_path / "a.png").subject == pytest.approx((40, 10, 56, 26), abs=1)


def test_a_mask_of_the_same_shape_is_scaled_and_another_is_refused_with_both_sizes(tmp_path):
    scene(0, 60, 40).save(tmp_path / "a.png")
    spot().resize((1200, 796)).save(tmp_path / "a.mask.png")
    assert read(tmp_path / "a.png").subject == pytest.approx((40, 10, 56, 26), abs=1)
    spot().resize((30, 20), Image.Resampling.BOX).save(tmp_path / "a.mask.png")
    assert read(tmp_path / "a.png").subject == pytest.approx((40, 10, 56, 26), abs=1)
    spot().resize((50, 40)).save(tmp_path / "a.mask.png")
    told = refusal(tmp_path)
    assert "a.mask.png is 50×40 px" in told and "a.png is 60×40 px" in told


def test_masks_of_huge_photos_are_kept_smaller_with_them(tmp_path):
    Image.new("RGB", (4400, 4200), RED).save(tmp_path / "a.jpg")
    spot((4400, 4200), (1000, 2000, 3000, 4000)).save(tmp_path / "a.mask.png")
    photo = read(tmp_path / "a.jpg")
    assert photo.mask.size == photo.image.size == (2200, 2100) and photo.subject == (500, 1000, 1500, 2000)


def test_masks_that_cannot_be_used_are_refused(tmp_path):
    scene(0, 60, 40).save(tmp_path / "a.png")
    Image.new("L", (60, 40), 1).save(tmp_path / "a.mask.png")
    told = refusal(tmp_path)
    assert "a.mask.png, the mask of" in told and "its brightest value is 1 of 255" in told
    (tmp_path / "a.mask.png").write_bytes(b"")
    assert "a.mask.png is an empty file" in refusal(tmp_path)
    spot().save(tmp_path / "a.mask.png")
    put_mask(tmp_path / "a.png", "masks/a.png", spot())
    assert "has 2 masks: a.mask.png, masks/a.png" in refusal(tmp_path)
    Image.new("RGBA", (60, 40)).save(tmp_path / "b.png")
    assert "b.png is transparent all over" in refusal([tmp_path / "b.png"])


def test_a_mask_without_its_photo_is_said_and_a_folder_of_masks_has_no_photos(tmp_path):
    scene(0, 60, 40).save(tmp_path / "a.png")
    spot().save(tmp_path / "gone_mask.png")
    put_mask(tmp_path / "a.png", "masks/lost.png", spot())
    found, skipped = find_photos(tmp_path)
    assert [path.name for path in found] == ["a.png"]
    assert len(skipped) == 1 and "gone_mask.png, masks/lost.png" in skipped[0]
    (tmp_path / "a.png").unlink()
    assert "gone_mask.png is a mask; rename it if it is a photo" in refusal(tmp_path)


def test_the_masks_of_an_imagefolder_are_no_rows(tmp_path, offline_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        scene(ord(name), 60, 40).save(folder / f"{name}.png")
    spot().save(folder / "a_mask.png")
    put_mask(folder / "b.png", "masks/b.png", spot())
    found, _ = load_photos(f"hf:{folder}", min_size=1)
    assert len(found) == 2 and all(photo.subject == (40, 10, 56, 26) for photo in found)


# Data sets


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_an_imagefolder_gives_the_same_photos_as_the_folder(tmp_path, offline_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    corners().save(folder / "a.jpg", exif=exif)
    noise(1).save(folder / "b.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a flag"}\n{"file_name": "b.png", "text": ""}\n')
    found, _ = load_photos(f"hf:{folder}", min_size=1)
    plain, _ = load_photos(folder, min_size=1)
    assert [photo.caption for photo in found] == ["a flag", None]
    assert [(photo.sha256, photo.size) for photo in found] == [(photo.sha256, photo.size) for photo in plain]
    assert [photo.image.tobytes() for photo in found] == [photo.image.tobytes() for photo in plain]
    assert found[0].path == f"hf:{folder}[0]" and found[0].name == "set[0]"


def test_a_data_set_that_cannot_be_loaded_names_id_and_remedies(offline_cache):
    assert "hf: names no data set" in refusal("hf:")
    told = refusal("hf:nobody/no-such-set/dog")
    assert "hf:nobody/no-such-set/dog could not be loaded" in told
    assert "HF_HUB_OFFLINE" in told and "local folder" in told


def test_an_id_is_split_into_name_and_config_and_never_trusts_remote_code(offline_cache, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return offline_cache.Dataset.from_dict({"words": ["no image"]})

    monkeypatch.setattr(offline_cache, "load_dataset", load_dataset)
    assert "has no images" in refusal("hf:google/dreambooth/dog")
    assert "columns words" in refusal("hf:google/dreambooth")
    assert asked == [(("google/dreambooth", name), {"split": "train"}) for name in ("dog", None)]


# Crops and tensors


def test_a_center_crop_is_the_middle_and_stays_inside():
    assert crop_box((300, 200)) == (50, 0, 250, 200)
    assert crop_box((200, 301)) == (0, 50, 200, 250)
    assert crop_box((64, 64)) == (0, 0, 64, 64)


def test_a_random_crop_reaches_both_ends_and_repeats_for_its_generator():
    boxes = [crop_box((8, 5), "random", generator(0, "crop", k)) for k in range(100)]
    assert {box[0] for box in boxes} == {0, 1, 2, 3} and {box[1] for box in boxes} == {0}
    assert boxes == [crop_box((8, 5), "random", generator(0, "crop", k)) for k in range(100)]


def test_a_subject_crop_has_the_subject_in_its_middle_and_stays_inside():
    assert crop_box((300, 200), "subject", subject=(150, 50, 190, 90)) == (70, 0, 270, 200)
    assert crop_box((300, 200), "subject", subject=(280, 0, 300, 20)) == (100, 0, 300, 200)
    assert crop_box((300, 200), "subject", subject=(0, 0, 5, 5)) == (0, 0, 200, 200)
    assert crop_box((200, 300), "subject", subject=(0, 20, 200, 280)) == (0, 50, 200, 250)
    assert crop_box((300, 200), "subject") == crop_box((300, 200))
    assert crop_box((300, 200), subject=(280, 0, 300, 20)) == crop_box((300, 200))


def test_a_photo_without_a_mask_is_cut_in_the_middle_where_the_subject_is_asked_for(tmp_path):
    photo = photo_of(scene(0, 90, 60), tmp_path)
    assert torch.equal(to_tensor(photo, 32, crop="subject"), to_tensor(photo, 32))
    spot((90, 60), (70, 10, 90, 30)).save(tmp_path / "a_mask.png")
    assert largest_box(read(tmp_path / "a.png"), "subject") == (30, 0, 90, 60)


@pytest.mark.parametrize("crop", ["center", "random", "subject"])
def test_masks_are_cut_and_mirrored_as_their_images(tmp_path, crop):
    """The image is its own mask, so that each must stay what the other is."""
    some = []
    for k, size in enumerate([(96, 64), (64, 80)]):
        mask = scene(k, *size).convert("L").point([255 * (v > 128) for v in range(256)])
        mask.convert("RGB").save(tmp_path / f"{k}.png")
        mask.save(tmp_path / f"{k}.mask.png")
        some.append(read(tmp_path / f"{k}.png"))
    for step in range(8):
        crops = draw_crops(some, crop, flip=True, generator=generator(0, "crop", step))
        images, marks = image_tensor(crops, 64), mask_tensor(crops, 64)
        assert marks.shape == (2, 1, 64, 64) and marks.dtype == torch.float32
        assert torch.equal(marks.expand(-1, 3, -1, -1), (images + 1) / 2)
    small = mask_tensor(crops, 8)
    assert small.shape == (2, 1, 8, 8) and small.min() >= 0 and small.max() <= 1


def test_a_photo_without_a_mask_is_all_subject(tmp_path):
    photo = photo_of(noise(0), tmp_path)
    assert torch.equal(mask_tensor(draw_crops([photo]), 16), torch.ones(1, 1, 16, 16))


def photo_of(image, tmp_path, name="a.png"):
    image.save(tmp_path / name)
    return read(tmp_path / name)


def test_a_tensor_holds_the_pixels_in_minus_one_to_one(tmp_path):
    photo = photo_of(noise(0), tmp_path)
    x = to_tensor(photo, 64)
    assert x.shape == (3, 64, 64) and x.dtype == torch.float32
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.tensor(np.array(photo.image)))
    white = photo_of(Image.new("RGB", (90, 70), "white"), tmp_path, "white.png")
    assert torch.equal(to_tensor(white, 32), torch.ones(3, 32, 32))


@pytest.mark.parametrize("size_wh", [(300, 200), (128, 200), (70, 50)])
def test_cropping_before_resizing_equals_resizing_before_cropping(tmp_path, size_wh):
    photo = photo_of(scene(3, *size_wh), tmp_path)
    scale = 100 / min(size_wh)
    whole = photo.image.resize([round(s * scale) for s in size_wh], Image.Resampling.LANCZOS)
    left, top = (whole.width - 100) // 2, (whole.height - 100) // 2
    expected = pixels(whole.crop((left, top, left + 100, top + 100)))
    got = ((to_tensor(photo, 100) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(got - expected).mean() < 3


def test_a_very_long_image_costs_no_large_one_between(tmp_path):
    assert to_tensor(photo_of(Image.new("RGB", (20000, 2), RED), tmp_path), 512).shape == (3, 512, 512)


def test_crops_and_flips_differ_by_step_and_repeat_for_the_same_generator(tmp_path):
    photo = photo_of(noise(0, 128, 64), tmp_path)

    def draw(step):
        return to_tensor(photo, 64, crop="random", flip=True, generator=generator(0, "crop", step))

    steps = [draw(step) for step in range(8)]
    assert len({x.numpy().tobytes() for x in steps}) > 4
    assert all(torch.equal(x, draw(step)) for step, x in enumerate(steps))


def test_flips_mirror_half_of_the_draws(tmp_path):
    photo = photo_of(noise(0), tmp_path)
    plain = to_tensor(photo, 64)
    drawn = [to_tensor(photo, 64, flip=True, generator=generator(0, "flip", k)) for k in range(64)]
    mirrored = sum(torch.equal(x, plain.flip(-1)) for x in drawn)
    assert mirrored + sum(torch.equal(x, plain) for x in drawn) == 64 and 20 < mirrored < 44


def test_a_batch_stacks_photos_of_any_shape_and_draws_for_each(tmp_path):
    some = [photo_of(noise(0, 90, 64), tmp_path), photo_of(noise(1, 64, 80), tmp_path, "b.png")]
    x = image_tensor(draw_crops(some, "random", flip=True, generator=generator(0, "batch", 0)), 32)
    assert x.shape == (2, 3, 32, 32) and x.abs().max() <= 1
    shared = generator(0, "batch", 0)
    assert torch.equal(x, torch.stack([to_tensor(p, 32, crop="random", flip=True, generator=shared) for p in some]))


def test_the_preview_is_the_squares_that_training_sees(tmp_path):
    some = [photo_of(scene(i, 300, 200), tmp_path, f"{i}.png") for i in range(7)]
    sheet = pixels(preview(some, 64))
    assert sheet.shape == (2 * 64 + 4, 5 * 64 + 4 * 4, 3)
    for k, photo in enumerate(some):
        top, left = k // 5 * 68, k % 5 * 68
        seen = (to_tensor(photo, 64).permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(sheet[top : top + 64, left : left + 64] - seen).max() < 0.01
    assert preview(some[:2], 1024, crop="random").size == (2 * 256 + 4, 256)


# Order


@pytest.mark.parametrize(("count", "size"), [(5, 1), (5, 2), (4, 4), (3, 8), (1, 3), (7, 5)])
def test_every_epoch_uses_each_photo_exactly_once(count, size):
    row = [i for step in range(4 * count) for i in epoch_order(count, size, step, seed=3)]
    assert len(row) == 4 * count * size
    for start in range(0, len(row), count):
        assert sorted(row[start : start + count]) == list(range(count))


def test_the_order_depends_on_seed_purpose_and_epoch_alone():
    def row(seed=0, purpose="subject"):
        return [epoch_order(50, 50, step, seed=seed, purpose=purpose) for step in range(2)]

    assert row() == row() and row()[0] != row()[1]
    assert row()[0] != row(seed=1)[0] and row()[0] != row(purpose="prior")[0]
    late = epoch_order(7, 3, 1000, seed=0)
    assert late == epoch_order(7, 3, 1000, seed=0) and len(late) == 3
    whole = [i for step in range(6) for i in epoch_order(7, 1, step, seed=0)]
    assert whole == [i for step in range(2) for i in epoch_order(7, 3, step, seed=0)]
