"""`personalize upscale` and `generate --upscale`: names, parameters, and what is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image

from personalize import generate, upscale
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl, write_json
from personalize.toyland.pretraining import upscaler as part

SETTINGS = ("draw.steps=2", "draw.count=2", "draw.sampler=ddim")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_sd):
    """A tiny base of 32 px with an upscaler of random weights, and images beside it."""
    folder = tmp_path_factory.mktemp("upscale")
    shutil.copytree(tiny_sd, folder / "base")
    torch.manual_seed(0)
    unet = part.network(size=32, channels=(8,))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    part.export(folder / "base" / "upscaler", unet)
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "A dog.png")
    Image.new("RGB", (48, 32)).save(folder / "wide.png")
    (folder / "text.png").write_text("no image")
    return folder


def test_an_images_name_and_parameters_say_from_what_and_how(base, tmp_path):
    def files(**options):
        return upscale([base / "A dog.png"], base=str(base / "base"), out=tmp_path, **options)

    plain = files()[0]
    assert plain.name.startswith("a-dog-64px-") and Image.open(plain).size == (64, 64)
    other = files(settings=["seed=1"])[0]
    assert plain.name != other.name and Image.open(plain).tobytes() != Image.open(other).tobytes()
    text = Image.open(other).text["parameters"]
    assert text.startswith("Postprocess upscale by: 2, ") and "Postprocess steps: 1, Seed: 1, Image hash: " in text
    before = plain.read_bytes()
    assert files() == [plain] and plain.read_bytes() == before


def test_generate_draws_what_it_draws_and_makes_it_twice_as_large(base, tmp_path):
    options = {"base": str(base / "base"), "settings": SETTINGS}
    plain = generate(["a dog"], **options, out=tmp_path / "a").files
    large = generate(["a dog"], **options, out=tmp_path / "b", upscale=True).files
    assert {path.name for path in plain}.isdisjoint(path.name for path in large)
    row = read_jsonl(tmp_path / "b" / "images.jsonl")[1]
    assert (row["width"], row["height"], row["upscale"]["factor"]) == (64, 64, 2)
    assert "upscale" not in read_jsonl(tmp_path / "a" / "images.jsonl")[1]
    text = Image.open(large[1]).text["parameters"]
    assert "Size: 64x64" in text and f"Postprocess upscaler: {row['upscale']['sha256'][:12]}" in text
    assert Image.open(large[0]).tobytes() != Image.open(plain[0]).resize((64, 64), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide.png", "wide.png is 48×32 px, and the upscaler takes 32 px"),
        ("text.png", "text.png"),
        ("nowhere.png", "cannot read the image .*nowhere.png"),
    ],
)
def test_what_is_no_image_of_its_size_is_named(base, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        upscale([base / name], base=str(base / "base"), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_size_of_drawing_is_refused_before_anything_is_drawn(base, tmp_path):
    with pytest.raises(UserError, match="drawn at this --size is 48×48 px, and the upscaler takes 32 px"):
        generate(["a dog"], base=str(base / "base"), settings=[*SETTINGS, "draw.size=48"], out=tmp_path, upscale=True)
    assert not list(tmp_path.glob("*.png"))


def test_a_base_without_an_upscaler_or_with_one_of_another_family_is_named(base, tmp_path, tiny_sd):
    with pytest.raises(UserError, match="has no upscaler: .* --part upscaler"):
        generate(["a dog"], base=str(tiny_sd), settings=SETTINGS, out=tmp_path, upscale=True)
    folder = tmp_path / "base" / "upscaler"
    shutil.copytree(base / "base" / "upscaler", folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    write_json(folder / "unet" / "config.json", config | {"in_channels": 7})
    with pytest.raises(UserError, match="in_channels is 7; expected 15. Give an upscaler of this package"):
        upscale([base / "A dog.png"], base=str(tmp_path / "base"), out=tmp_path)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"})
    with pytest.raises(UserError, match="'StableDiffusionUpscalePipeline', an upscaler of another family"):
        upscale([base / "A dog.png"], base=str(tmp_path / "base"), out=tmp_path)


def test_the_command_prints_its_files(base, terminal, tmp_path):
    status, out, _ = terminal("upscale", base / "A dog.png", "--base", base / "base", "--json")
    assert status == 0 and json.loads(out)["files"][0].startswith("upscaled/a-dog-64px-")
