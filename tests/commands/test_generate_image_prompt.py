"""`personalize generate --image-prompt`: photos beside the prompt."""

import pytest
import torch
from adapters import images, write_adapter
from PIL import Image

from personalize import generate, models
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl

SETTINGS = ("draw.steps=2", "draw.count=1", "draw.sampler=ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_sd):
    place = tmp_path_factory.mktemp("adapter")
    write_adapter(place, models.load_model(str(tiny_sd), device="cpu", say=lambda line: None), "plain")
    (place / "photos").mkdir()
    for k, image in enumerate(images(2)):
        image.save(place / "photos" / f"{k}.png")
    return place


def draw(tiny_sd, folder, out, **options):
    given = {"image_prompt": folder / "photos", "adapter": folder / "ip-adapter.safetensors"} | options
    return generate(["a photo of a dog"], base=str(tiny_sd), settings=SETTINGS, out=out, **given).files[0]


def pixels(path):
    return torch.tensor(list(Image.open(path).tobytes()))


def test_photos_change_an_image_whose_name_and_parameters_say_so(tiny_sd, folder, tmp_path):
    plain = draw(tiny_sd, folder, tmp_path, image_prompt="", adapter=None)
    told = draw(tiny_sd, folder, tmp_path)
    less = draw(tiny_sd, folder, tmp_path, image_scale=0.2)
    one = draw(tiny_sd, folder, tmp_path, image_prompt=folder / "photos" / "0.png")
    assert len({path.name for path in (plain, told, less, one)}) == 4
    assert len({tuple(pixels(path).tolist()) for path in (plain, told, less, one)}) == 4
    row = next(row for row in read_jsonl(tmp_path / "images.jsonl") if row["file"] == told.name)
    assert row["image_prompt"]["scale"] == 0.7 and [image["file"] for image in row["image_prompt"]["images"]] == [
        "0.png",
        "1.png",
    ]
    assert "Image prompt scale: 0.7" in Image.open(told).text["parameters"]


def test_scale_0_draws_what_the_base_draws_to_the_bit(tiny_sd, folder, tmp_path):
    plain = draw(tiny_sd, folder, tmp_path / "a", image_prompt="", adapter=None)
    assert torch.equal(pixels(draw(tiny_sd, folder, tmp_path / "b", image_scale=0.0)), pixels(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_prompt": "", "image_scale": 0.5}, "are for an image prompt"),
        ({"image_scale": 11.0}, "--image-scale 11 is not from 0"),
        ({"adapter": None}, "--adapter FILE"),
        ({"image_prompt": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_is_wrong_with_an_image_prompt_is_named(tiny_sd, folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        draw(tiny_sd, folder, tmp_path, **options)
