"""`generate --image FILE --mask word:dog`: the mask that the maps of a word give, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import personalize
from personalize import models
from personalize.common.errors import UserError
from personalize.data.image_to_edit import read_image_to_edit
from personalize.generation import word_mask

FAST = ["draw.steps=2", "device=cpu", "draw.count=1"]
PROMPT = "a photo of a dog"


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture
def photo(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def draw(tiny_sd, tmp_path, photo):
    def call(**options):
        options = {"base": str(tiny_sd), "settings": FAST, "out": tmp_path / "out", "image": photo} | options
        return personalize.generate([PROMPT], **options).files[0]

    return call


def test_a_word_does_what_its_mask_in_a_file_does_and_is_named_by_both(draw, model, photo, tmp_path):
    found = read_image_to_edit(photo, "word:dog", None, 1).masked_by(model, PROMPT, 32).photo.mask
    assert found.size == (80, 64) and np.asarray(found)[:, :8].max() == 0, "only the middle square has one"
    found.save(tmp_path / "mask.png")
    by_word, other, by_file = draw(mask="word:dog"), draw(mask="word:photo"), draw(mask=tmp_path / "mask.png")
    assert len({by_word, other, by_file}) == 3
    assert Image.open(by_word).tobytes() == Image.open(by_file).tobytes() != Image.open(other).tobytes()
    row = json.loads((tmp_path / "out" / "images.jsonl").read_text().splitlines()[0])
    assert row["mask"]["word"] == "dog" and (row["strength"], row["sampler"]) == (1.0, "ddpm")
    assert f"Mask word: dog, Mask hash: {row['mask']['sha256'][:12]}" in Image.open(by_word).text["parameters"]


def test_a_word_that_finds_no_place_is_refused(draw, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no prompt says 'fog', which --mask is to find in the image; did you mean 'dog'"):
        draw(mask="word:fog")
    with pytest.raises(UserError, match="--mask word: names no word"):
        draw(mask="word:")
    with pytest.raises(UserError, match="--mask is about an image"):
        draw(mask="word:dog", image=None)
    for value, share in ((1.0, "0.[0-9]%"), (-1.0, "9[0-9].[0-9]%")):
        maps = torch.zeros(64, 32, 32)
        maps[:, 3, 3] = value
        monkeypatch.setattr(word_mask, "image_maps", lambda *_, maps=maps: maps)
        with pytest.raises(UserError, match=f"the attention to 'dog' marks {share} of the image, and a mask is 2% to 95%"):
            draw(mask="word:dog")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_toylands_base_finds_the_animals_of_the_world(monkeypatch):
    """The maps of the class word on rendered scenes; all of the image would be 0.2."""
    from benchmarks.maps import iou, prompt_of
    from personalize.evaluation.image_cache import load_tensors
    from personalize.toyland.world.render import draw_scene
    from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject

    monkeypatch.undo()
    model, overlaps = models.load_model("toyland", device="cpu", dtype="float32", say=lambda line: None), []
    for k in range(6):
        scene = sample_scene(HELD_OUT + k, subject=sample_subject(HELD_OUT, "dog"))
        image, mask = draw_scene(scene)
        found = word_mask.word_mask(model, load_tensors([image.convert("RGB")])[0], prompt_of(scene, "dog"), "dog")
        overlaps.append(iou(found[0] > 0.5, torch.from_numpy(np.asarray(mask) > 127)))
    assert sum(overlaps) / len(overlaps) > 0.4
