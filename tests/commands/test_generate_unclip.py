"""`personalize generate --unclip` and `--vary`, and the part of a base that they draw with, trained for two steps."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from personalize import generate, models
from personalize.commands.embeddings import text_differences
from personalize.commands.pretrain import _changed
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.models.unclip import read_unclip
from personalize.toyland.pretraining import networks
from personalize.toyland.pretraining import unclip as part

SETTINGS = ("draw.steps=2", "draw.count=2", "draw.sampler=ddim")
FEW = ["pictures=4", "pair_steps=2", "words_steps=2", "prior_steps=2"]


def tiny(folder):
    return models.load_model(str(folder), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_sd):
    """A tiny base with a CLIP and the part; in `work` what its training left."""
    folder = tmp_path_factory.mktemp("unclip")
    shutil.copytree(tiny_sd, folder / "base")
    torch.manual_seed(0)
    model = tiny(folder / "base")
    networks.clip(model.tokenizers["text_encoder"], model.size).save_pretrained(folder / "base" / "encoders" / "clip")
    (folder / "work").mkdir()
    part.train(model, folder / "base" / "unclip", folder / "work", _changed(part.Settings(), FEW), lambda line: None)
    return folder


def draw(base, out, prompts=("a dog",), more=(), **options):
    return generate(list(prompts), base=str(base / "base"), settings=[*SETTINGS, *more], out=out, **options).files


def pixels(paths):
    return [np.asarray(Image.open(path)) for path in paths]


def test_a_stopped_training_goes_on_from_its_files(base, tmp_path):
    whole = {path.name: path.read_bytes() for path in (base / "base" / "unclip").glob("*.safetensors")}
    again = tmp_path / "unclip"
    part.train(tiny(base / "base"), again, base / "work", _changed(part.Settings(), FEW), lambda line: None)
    assert whole and whole == {path.name: path.read_bytes() for path in again.glob("*.safetensors")}


def test_images_from_embeddings_are_others_and_their_names_and_parameters_say_so(base, photos, tmp_path):
    one, two = sorted(photos.glob("*.png"))[:2]
    plain, told = draw(base, tmp_path), draw(base, tmp_path, unclip=True)
    varied, moved = draw(base, tmp_path, ("",), vary=[one]), draw(base, tmp_path, ("a red hat",), vary=[one], was="a dog")
    lying = draw(base, tmp_path, ("",), vary=[one, two])
    every = [*plain, *told, *varied, *moved, *lying]
    assert len(set(every)) == len(every) == 10
    alone = draw(base, tmp_path / "alone", ("",), ["draw.batch=1"], vary=[one, two])
    assert all(abs(a.astype(int) - b).max() <= 2 for a, b in zip(pixels(alone), pixels(lying), strict=True))
    first = [image.astype(int) for image in pixels([varied[0], moved[0], lying[0]])]  # all of the photo itself
    assert all(abs(image - first[0]).max() <= 2 for image in first)
    others = pixels([*plain, *told, *varied, moved[1], lying[1]])
    assert len({image.tobytes() for image in others}) == len(others)
    rows = {row["file"]: row for row in read_jsonl(tmp_path / "images.jsonl")}
    assert set(rows[told[0].name]["unclip"]) == {"pair", "decoder", "prior"} and "unclip" not in rows[plain[0].name]
    assert rows[moved[0].name]["unclip"]["was"] == "a dog"
    assert [image["file"] for image in rows[lying[0].name]["unclip"]["images"]] == [one.name, two.name]
    assert "Variation of" in Image.open(varied[0]).text["parameters"] and "unCLIP: " in Image.open(told[0]).text["parameters"]


def test_a_text_difference_has_length_1_and_is_none_of_the_same_text(base):
    model = tiny(base / "base")
    away = text_differences(model, read_unclip(model).pair, ["a red hat", "a dog"], "a cat")
    assert torch.allclose(away.norm(dim=1), torch.ones(2)) and not torch.allclose(away[0], away[1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"was": "a cat"}, "Give the photo too: --vary PHOTO"),
        ({"unclip": True, "vary": ["a.png"]}, "Give one of them"),
        ({"vary": ["a.png"] * 3}, "--vary is given 3 times"),
        ({"vary": ["a.png"] * 2, "was": "a cat"}, "--was changes one photo"),
        ({"vary": ["a.png"]}, "Leave out the prompt, or say what it changes: --was TEXT"),
        ({"vary": ["nowhere.png"], "was": "a cat"}, "nowhere.png does not exist"),
        ({"unclip": True, "image_prompt": "a.png"}, "--unclip does not go with --image-prompt"),
        ({"unclip": True, "weights": ["dog=1.5"]}, "--unclip does not go with --weight"),
        ({"unclip": True, "maps": True}, "--unclip does not go with --maps"),
    ],
)
def test_what_does_not_go_together_is_named_with_the_remedy(base, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        draw(base, tmp_path, **options)


def test_a_base_without_the_part_with_another_clip_or_with_anothers_part_is_named(base, tiny_sd, tmp_path):
    with pytest.raises(UserError, match="there is no folder unclip .* --part unclip"):
        generate(["a dog"], base=str(tiny_sd), settings=SETTINGS, out=tmp_path, unclip=True)
    other = tmp_path / "other"
    shutil.copytree(base / "base", other)
    (other / "unclip" / "decoder.safetensors").write_bytes((other / "unclip" / "pair.safetensors").read_bytes())
    with pytest.raises(UserError, match="decoder.safetensors is of another base"):
        read_unclip(tiny(other))
    (other / "encoders" / "clip" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="was trained with another CLIP"):
        read_unclip(tiny(other))


def test_a_run_and_a_sheet_of_one_are_refused(base, photos, tmp_path):
    with pytest.raises(UserError, match="by a bare base, not by a run"):
        generate(["a dog"], run=tmp_path, unclip=True)
    one = sorted(photos.glob("*.png"))[0]
    with pytest.raises(UserError, match="give --count 2 or more"):
        generate(["a cat"], base=str(base / "base"), settings=["draw.count=1"], out=tmp_path, vary=[one], was="a dog")
