"""A mask of next to nothing, or of next to everything, is never trained by and never judged by."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe
from personalize.data.mask_coverage import mask_fault
from personalize.data.photos import load_photos
from personalize.data.subjects import load_subjects
from personalize.evaluation.encoders import Identity
from personalize.evaluation.scoring import make_reference


def put_mask(folder, name, height):
    """A photo of 100 × 100 px whose topmost rows are marked, by alpha for .png, by a file for .jpg."""
    image, mask = Image.new("RGB", (100, 100), (200, 90, 30)), Image.new("L", (100, 100))
    mask.paste(255, (0, 0, 100, height))
    if name.endswith(".png"):
        image.putalpha(mask)
    else:
        mask.save(folder / f"{name[:-4]}.mask.png")
    image.save(folder / name)


@pytest.mark.parametrize("height, share", [(1, "1.0%"), (2, None), (95, None), (96, "96.0%"), (99, "99.0%")])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_the_bounds_hold_for_masks_of_every_source(tmp_path, name, height, share):
    put_mask(tmp_path, name, height)
    (photo,), notices = load_photos(tmp_path, min_size=1)
    assert photo.covered == height / 100
    fault = mask_fault(photo)
    assert fault is None if share is None else fault.startswith(f"the mask of {name} marks {share} of the photo")
    assert fault is None or any(fault in notice for notice in notices), "train repeats it"


def test_training_refuses_such_a_mask_where_it_uses_masks_and_nowhere_else(tmp_path):
    for name, height in (("a.jpg", 50), ("b.png", 1)):
        put_mask(tmp_path, name, height)

    def load(*settings):
        recipe = load_recipe(None, ["class_word=dog", "token=sks", "photos.min_size=16", *settings])
        return load_subjects([tmp_path], recipe, tokens=["sks"], size=64)

    for setting in ("photos.background=0.9", "photos.crop=subject"):
        with pytest.raises(UserError, match="the mask of b.png marks 1.0% of the photo.*make the mask anew"):
            load(setting)
    load("photos.crop=random")
    (tmp_path / "b.png").unlink()
    load("photos.background=0", "photos.crop=subject")


def test_such_a_mask_is_no_foreground(tmp_path):
    for name, height in (("a.jpg", 50), ("b.png", 99)):
        put_mask(tmp_path, name, height)
    seen = lambda images: torch.zeros(len(images), 3)  # noqa: E731
    encoders = SimpleNamespace(
        dino=lambda images: Identity(seen(images), torch.zeros(len(images), 4, 3)), clip_image=seen, grid=2,
        cover=lambda masks: torch.nn.functional.adaptive_avg_pool2d(masks, 2).flatten(1),
    )  # fmt: skip

    def foreground(*names):
        photos, _ = load_photos([tmp_path / name for name in names], min_size=1)
        return make_reference(encoders, photos, [], size=64, crop="center", class_word="dog").foreground

    assert foreground("a.jpg", "b.png").tolist() == [[True, True, False, False], [False] * 4]
    assert foreground("b.png") is None
