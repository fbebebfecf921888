"""The part "image-adapter" of pretraining, in a few steps onto the shipped base."""

import numpy as np
import pytest
import torch
from PIL import Image

from personalize import models
from personalize.commands.pretrain import pretrain
from personalize.common.bases import TOYLAND
from personalize.common.files import content_hash, read_json
from personalize.data.image_prompt import read_image_prompt
from personalize.formats.safetensors_io import load_tensors
from personalize.models.fast_unet import IMAGE_KEYS_VALUES
from personalize.models.image_adapter import FOLDER, load_image_adapter
from personalize.toyland.pretraining import image_adapter as part
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import COLOURS, HELD_OUT, sample_scene, sample_subject

SETTINGS = ("subjects=6", "encoder_steps=2", "adapter_steps=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The shipped base without the part, and a work folder beside it in which the part was trained onto it."""
    place = tmp_path_factory.mktemp("part")
    (place / "base").mkdir()
    for path in TOYLAND.iterdir():
        if path.name != FOLDER:
            (place / "base" / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "ENCODER_BATCH", 8)
        patch.setattr(part, "ADAPTER_BATCH", 4)
        pretrain(place / "base", work=place / "work", part="image-adapter", settings=SETTINGS)
    return place / "base"


@pytest.fixture(scope="module")
def model(base):
    return models.load_model(str(base), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    for k in range(2):
        image, _ = draw_scene(part.photo_scene(k), 64)
        image.convert("RGB").save(place / f"{k}.png")
    return place


def test_the_part_is_read_as_the_base_s_own_adapter(base, model, photos):
    assert set(SETTINGS) <= {f"{k}={v}" for k, v in read_json(base / FOLDER / "pretraining.json")["settings"].items()}
    prompt, record = read_image_prompt(model, photos)
    assert record["image_prompt"]["adapter"]["file"] == part.FILE and prompt.cond.keys() == prompt.uncond.keys()
    assert any(kv.chunk(2, -1)[1].any() for kv in prompt.cond.values()), "two steps have moved no value"
    assert read_image_prompt(model, photos, scale=0)[0] is None
    assert models.load_model(str(TOYLAND), device="cpu", say=lambda line: None).fingerprint == model.fingerprint


def test_it_reads_what_it_was_trained_to_say(base, model, photos):
    """The released layout, half precision aside, is the network of the training; without a photo it says the embedding 0."""
    adapter, _ = load_image_adapter(model)
    prompt = adapter.prompt([Image.open(path) for path in sorted(photos.iterdir())], 1.0)
    trained = part.Adapter(model.unet, sum(part.columns().values()))
    state = {name.replace("image_proj.proj", "image_proj.image_embeds"): value
             for name, value in load_tensors(base / FOLDER / part.FILE).items()}  # fmt: skip
    trained.load_state_dict({name: value.float() for name, value in state.items()})
    x = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(photos.iterdir())])
    with torch.no_grad():
        embedding = adapter.encoder(pixel_values=x.permute(0, 3, 1, 2) / 127.5 - 1).image_embeds[None]
        for read, expected in ((prompt.cond, trained(embedding)), (prompt.uncond, trained(torch.zeros_like(embedding)))):
            assert read.keys() == expected.keys()
            for name in read:
                torch.testing.assert_close(read[name], expected[name], atol=1e-3, rtol=1e-3)


def test_the_same_call_again_changes_nothing(base):
    before = content_hash(base / FOLDER / part.FILE)
    pretrain(base, work=base.parent / "work", part="image-adapter", settings=SETTINGS)
    assert content_hash(base / FOLDER / part.FILE) == before


def test_an_adapter_begins_as_the_base(model):
    fresh = part.Adapter(model.unet, 37)
    z, t, cond = torch.randn(1, 4, 16, 16), torch.tensor([500]), model.encode_prompts(["a dog"])
    with torch.no_grad():
        told = fresh(torch.randn(1, 3, 37))
        assert all(name.startswith(IMAGE_KEYS_VALUES) and kv.shape[1] == 3 * part.TOKENS for name, kv in told.items())
        assert torch.equal(model.predict(z, t, model.prepare(cond) | told), model.predict(z, t, model.prepare(cond)))


def test_photos_show_the_subjects_of_the_scenes_and_captions_leave_their_colour_to_them():
    for k in range(12):
        scene = part.view_scene(k)
        photo = part.photo_scene(k // part.VIEWS * part.PHOTOS)
        assert photo.subject == scene.subject and (photo.action, photo.accessory) == ("standing", None)
        word = scene.subject.class_word
        assert not any(f"{colour} {word}" in part._caption(k, 3) for colour in COLOURS)


def test_timesteps_leave_out_the_clear_quarter_and_lean_to_noise():
    t = part.noisy_timesteps(400, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 250 and t.max() <= 999 and 650 < t.float().mean() < 750


def test_the_shipped_encoder_reads_colours_off_subjects_it_never_saw():
    model = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None)
    adapter, _ = load_image_adapter(model)
    subjects = [sample_subject(HELD_OUT + 9_900_000 + k) for k in range(32)]
    shown = [sample_scene(k, subject=who, action="standing", accessory=None) for k, who in enumerate(subjects)]
    x = torch.stack([torch.from_numpy(np.array(draw_scene(scene, 64)[0].convert("RGB"))) for scene in shown])
    with torch.no_grad():
        read = adapter.encoder(pixel_values=x.permute(0, 3, 1, 2) / 127.5 - 1).image_embeds
    names = [name for name, count in part.columns().items() for _ in range(count)]
    for name in ("body", "second", "detail"):
        columns = [k for k, each in enumerate(names) if each == name]
        pair = torch.stack([read[:, columns], part.attributes(subjects)[:, columns]])
        pair = pair - pair.mean(1, keepdim=True)
        assert (pair[0] * pair[1]).sum() / pair.square().sum((1, 2)).prod().sqrt() > 0.75, name
