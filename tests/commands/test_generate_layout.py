"""`personalize generate --layout`: boxes beside the prompt, and the part of a base that reads them."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize import generate, models
from personalize.common.bases import TOYLAND
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.data.layout import read_layout
from personalize.formats.safetensors_io import load_tensors
from personalize.models.interface import LAYOUT
from personalize.models.layout import CONV_IN, FOLDER, PLANES, Box, open_layout, planes, put_planes
from personalize.toyland.pretraining import layout as part

SETTINGS = ("draw.steps=2", "draw.count=1", "draw.sampler=ddim")
DOG = {"class": "dog", "x0": 0.0, "y0": 0.25, "x1": 0.5, "y1": 1.0}


def tiny(folder):
    return models.load_model(str(folder), device="cpu", say=lambda line: None)


def trained(folder):
    """A model with a layout part whose weights are not zero, the same at every call."""
    model, g = tiny(folder), torch.Generator().manual_seed(0)
    for p in part.attach(model.unet, 2):
        learned = p.data[:, -len(part.NAMES) :] if p is model.unet.conv_in.weight else p.data
        learned.copy_(0.1 * torch.randn(learned.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_sd):
    """A tiny base with a layout part whose weights are not zero, and files of boxes beside it."""
    folder = tmp_path_factory.mktemp("layout")
    shutil.copytree(tiny_sd, folder / "base")
    part.export(folder / "base" / "layout", trained(tiny_sd).unet)
    (folder / "dog.json").write_text(json.dumps([DOG]))
    (folder / "right.json").write_text(json.dumps([DOG | {"x0": 0.5, "x1": 1.0}]))
    return folder


def test_a_plane_has_the_share_of_each_cell_that_a_box_covers():
    boxes = [Box("dog", 0.125, 0.0, 0.5, 1.0), Box("hat", 0.0, 0.0, 0.25, 0.25), Box("dog", 0.0, 0.0, 1.0, 0.25)]
    dog, hat = planes(boxes, ["dog", "hat"], (4, 4))
    assert dog[1].tolist() == [0.5, 1, 0, 0] and dog[0].tolist() == [1, 1, 1, 1]
    assert hat[0, 0] == 1 and hat.sum() == 1


def test_before_training_the_network_is_the_base_exactly(tiny_sd):
    model = tiny(tiny_sd)
    cond = model.encode_prompts(["a dog", "a cat"])
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 10])
    before = model.predict(z, t, cond)
    trains = part.attach(model.unet, 2)
    shown = cond | {LAYOUT: torch.rand(2, len(part.NAMES), 16, 16)}
    assert torch.equal(model.predict(z, t, shown), before)
    weight = model.unet.conv_in.weight.detach().clone()
    model.predict(z, t, shown).square().mean().backward()
    assert any(p is model.unet.conv_in.weight for p in trains)
    assert model.unet.conv_in.weight.grad[:, :4].abs().max() == 0 < model.unet.conv_in.weight.grad[:, 4:].abs().max()
    assert torch.equal(model.unet.conv_in.weight, weight)


def test_boxes_change_an_image_whose_name_and_parameters_say_so(base, tmp_path):
    def drawn(**options):
        return generate(["a dog"], base=str(base / "base"), settings=SETTINGS, out=tmp_path, **options).files[0]

    paths = [drawn(), drawn(layout=base / "dog.json"), drawn(layout=base / "right.json")]
    assert len({path.name for path in paths}) == len({Image.open(path).tobytes() for path in paths}) == 3
    row = next(row for row in read_jsonl(tmp_path / "images.jsonl") if row["file"] == paths[1].name)
    assert row["layout"]["boxes"] == [["dog", 0.0, 0.25, 0.5, 1.0]]
    assert 'Layout: "dog 0 0.25 0.5 1"' in Image.open(paths[1]).text["parameters"]


def test_what_training_writes_is_what_generate_reads(base, tiny_sd):
    from personalize.methods import lora

    read = tiny(base / "base")
    folder, classes, _ = open_layout(read)
    put_planes(read, folder, classes)
    lora.load_adapter(read, folder / part.LORA, name="layout", weight=1.0)
    cond = read.encode_prompts(["a dog"]) | {LAYOUT: torch.rand(1, len(classes), 16, 16)}
    z, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        a, b = (model.predict(z, t, cond) for model in (trained(tiny_sd), read))
    assert torch.allclose(a, b, atol=0.02 * a.abs().max().item())


def test_boxes_are_left_out_and_captions_too_as_often_as_the_settings_say(tiny_sd, monkeypatch):
    model, asked = tiny(tiny_sd), {}

    def predict(z_t, t, cond):
        asked.update(cond)
        return torch.zeros_like(z_t)

    monkeypatch.setattr(model, "predict", predict)
    monkeypatch.setattr(model, "encode_prompts", lambda texts: asked.update(texts=texts) or {})
    monkeypatch.setattr(part.networks, "LATENT", 16)
    images, of_boxes = np.zeros((4, 32, 32, 4), np.uint8), np.full((4, len(part.NAMES), 16, 16), 255, np.uint8)
    images[:, :16, :, 3] = 255
    moments = np.zeros((4, 2, 4, 16, 16), np.float16)

    def loss(**changes):
        asked.clear()
        settings = replace(part.Settings(), **changes)
        return part.batch_loss(model, images, of_boxes, moments, torch.arange(4), settings, 0)

    first = loss(dropout=0.0, caption_dropout=0.0)
    assert asked[LAYOUT].min() == 1 and any(asked["texts"])
    assert not torch.allclose(loss(subject_weight=0.0), first, rtol=1e-4)
    loss(dropout=1.0, caption_dropout=1.0)
    assert asked[LAYOUT].max() == 0 and asked["texts"] == [""] * 4


def test_a_scenes_boxes_hold_what_shows_of_it():
    for k in range(6):
        scene = part.scene_of(k)
        image, boxes = part.draw_with_boxes(scene, 64)
        assert image.shape == (64, 64, 4) and boxes[0].name == scene.subject.class_word
        inside = planes(boxes, [box.name for box in boxes], (64, 64)).amax(0) > 0
        assert (image[..., 3] > 0)[~inside.numpy()].mean() == 0
        assert (len(boxes) == 2) == bool(scene.accessory and (image[..., 3] == 255).any())
    scales = [part.scene_of(k).scale for k in range(50)]
    assert min(scales) < 0.6 and max(scales) > 1.1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"class": "dog"}, "is no list of 1 to 16 boxes"),
        ([], "is no list of 1 to 16 boxes"),
        ([DOG, DOG | {"class": "dgo"}], "box 2: unknown class 'dgo'; did you mean 'dog'"),
        ([DOG | {"x1": 1.2}], r"box 1: x1 is 1.2; expected a number from 0 to 1. Edges are shares"),
        ([DOG | {"x1": 0.0}], "box 1 is empty"),
        ([{"class": "dog", "x0": 0}], "box 1: the content is without y0, x1, y1"),
    ],
)
def test_what_is_wrong_with_a_layout_is_named(tmp_path, content, message):
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_layout(tmp_path / "boxes.json", part.NAMES)


def test_the_part_that_ships_has_the_worlds_classes_and_fits_its_base():
    weight = load_tensors(TOYLAND / FOLDER / CONV_IN, "planes")["weight"]
    width = json.loads((TOYLAND / "unet" / "config.json").read_text())["block_out_channels"][0]
    assert json.loads((TOYLAND / FOLDER / PLANES).read_text())["classes"] == list(part.NAMES)
    assert weight.shape == (width, len(part.NAMES), 3, 3) and weight.abs().max() > 0
    layers = {name.split(".lora_")[0] for name in load_tensors(TOYLAND / FOLDER / part.LORA, "a LoRA")}
    unet = [name for file in (TOYLAND / "unet").glob("*.safetensors") for name in load_tensors(file, "a U-Net")]
    assert layers <= {f"unet.{name.removesuffix('.weight')}" for name in unet} and len(layers) > 100


def test_a_base_without_the_part_or_with_another_bases_is_named(base, tiny_sd, tmp_path):
    with pytest.raises(UserError, match="reads no layout: .* --part layout"):
        generate(["a dog"], base=str(tiny_sd), settings=SETTINGS, out=tmp_path, layout=base / "dog.json")
    model, classes = copy.copy(tiny(tiny_sd)), [*part.NAMES, "sofa"]
    with pytest.raises(UserError, match=r"has weights of the shape \(16, 18, 3, 3\), expected is \(16, 19, 3, 3\)"):
        put_planes(model, base / "base" / "layout", classes)
