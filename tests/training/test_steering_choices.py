"""`generate` towards a subject, a text or an image: what is trained, kept and recorded, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from screens import RecordingScreen
from torch.nn import functional as F

import personalize
from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.common.recipe_sections import SamplingConfig
from personalize.core.rng import generator
from personalize.data.photos import load_photos
from personalize.evaluation.encoders import load_clip
from personalize.evaluation.preprocessing import resize
from personalize.training import noisy_classifier, steering

PROMPT = "a photo of a dog"
FAST = ["draw.steps=2", "device=cpu", "draw.count=2", "prior.count=3", "prior.steps=1"]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(autouse=True)
def read_once(model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda base, **options: model)
    monkeypatch.setattr(noisy_classifier, "STEPS", 3)


@pytest.fixture
def my_dog(photos, tmp_path):
    folder = tmp_path / "my_dog"
    folder.mkdir()
    for path in sorted(photos.glob("*.png"))[:2]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def draw(tiny_sd, eyes, tmp_path):
    def call(*settings, **options):
        settings = [*FAST, f"evaluate.clip={eyes}/encoders/clip", *settings]
        where = {"priors": tmp_path / "priors", "out": tmp_path / "out"}
        return personalize.generate([PROMPT], base=str(tiny_sd), settings=settings, **where, **options)

    return call


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def last_row(tmp_path):
    return json.loads((tmp_path / "out" / "images.jsonl").read_text().splitlines()[-1])


def test_a_bare_base_draws_towards_photos_by_a_classifier_that_is_trained_once(draw, my_dog, tmp_path):
    screen = RecordingScreen()
    plain, like = draw().files[0], draw("draw.like=50", photos=my_dog, class_word="dog", screen=screen).files[0]
    assert plain.name != like.name and pixels(plain) != pixels(like)
    assert "Like: 50" in Image.open(like).text["parameters"] and "No score" not in Image.open(like).text["parameters"]
    (file,) = (tmp_path / "priors").glob("*/like-*.safetensors")
    assert last_row(tmp_path)["like"] == 50 and f"like-{last_row(tmp_path)['classifier']}" == file.stem
    assert sum("2 photos against 3 class images, 3 steps" in line for line in screen.lines) == 1
    before, bits = file.stat().st_mtime_ns, like.read_bytes()
    again = draw("draw.like=50", photos=my_dog, class_word="dog", screen=screen).files[0]
    assert file.stat().st_mtime_ns == before and again.read_bytes() == bits
    assert sum("photos against" in line for line in screen.lines) == 1
    seeded = draw("draw.like=50", "seed=1", "draw.steps=1", photos=my_dog, class_word="dog").files[0]
    assert seeded != again and list((tmp_path / "priors").glob("*/like-*.safetensors")) == [file]


def test_other_photos_train_another_classifier(draw, my_dog, tmp_path):
    draw("draw.like=1", photos=my_dog, class_word="dog")
    Image.effect_noise((64, 64), 90).convert("RGB").save(my_dog / "another.png")
    draw("draw.like=1", photos=my_dog, class_word="dog")
    assert len(list((tmp_path / "priors").glob("*/like-*.safetensors"))) == 2


def test_scale_zero_asks_for_nothing_and_has_the_bits_and_the_name_of_plain_drawing(draw, tmp_path):
    plain, row = draw().files[0], last_row(tmp_path)
    bits = plain.read_bytes()
    again = draw("draw.like=0", "draw.guide_clip=0", "draw.guide_every=2").files[0]
    assert again == plain and again.read_bytes() == bits and last_row(tmp_path) == row
    assert not {"like", "classifier", "guide_clip"} & row.keys() and not (tmp_path / "priors").exists()


@pytest.fixture
def run(my_dog, tmp_path):
    """A run's folder and manifest, as far as the classifier reads them."""
    folder, recipe = tmp_path / "run", load_recipe(None, ["prior.count=3", "prior.steps=1", "photos.min_size=16"])
    folder.mkdir()
    rows = [{"path": photo.path, "sha256": photo.sha256, "held_out": k == 1}
            for k, photo in enumerate(load_photos(my_dog, min_size=16)[0])]  # fmt: skip
    subject = {"token": "zqv", "class": "dog", "prompt": "a zqv dog", "prior_folder": "", "photos": rows}
    return folder, {"recipe": recipe_to_dict(recipe), "subjects": [subject]}


def classifier(model, run, tmp_path, screen=None):
    screen = screen or RecordingScreen()
    return steering.subject_classifier(model, steering.of_run(*run), priors=tmp_path / "priors", screen=screen)


def test_a_run_keeps_its_classifier_and_needs_neither_photos_nor_class_images_again(model, run, my_dog, tmp_path):
    screen = RecordingScreen()
    network, key = classifier(model, run, tmp_path, screen)
    assert [path.name for path in run[0].iterdir()] == [steering.FILE]
    assert "1 photos against 3 class images" in screen.lines[-1] and "held-out photos with " in screen.lines[-1]
    shutil.rmtree(my_dog)
    shutil.rmtree(tmp_path / "priors")
    again, same = classifier(model, run, tmp_path)
    assert same == key and torch.equal(again.head.weight, network.head.weight)


def test_a_run_of_other_photos_trains_it_anew(model, run, my_dog, tmp_path):
    _, key = classifier(model, run, tmp_path)
    first = run[1]["subjects"][0]["photos"][0]
    Image.effect_noise((64, 64), 90).convert("RGB").save(first["path"])
    assert classifier(model, run, tmp_path)[1] == key, "the run's photos are those it was trained on, whatever lies there now"
    first["sha256"] = load_photos([first["path"]], min_size=16)[0][0].sha256
    assert classifier(model, run, tmp_path)[1] != key


def test_photos_that_changed_since_the_run_are_refused_by_name(model, run, tmp_path):
    first = run[1]["subjects"][0]["photos"][0]
    Image.effect_noise((64, 64), 90).convert("RGB").save(first["path"])
    with pytest.raises(UserError, match=r"is not the one this run was trained on: its content has changed"):
        classifier(model, run, tmp_path)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["draw.like=2"], {}, "--like on a bare base needs --photos and --class"),
        ([], {"photos": "x", "class_word": "dog"}, "--like on a bare base needs --photos and --class"),
        ([], {"class_word": "dog"}, "--like on a bare base needs --photos and --class"),
        (["draw.like=2"], {"photos": "my_dog"}, "what is on the photos"),
        (["draw.like=2"], {"photos": "nowhere", "class_word": "dog"}, "nowhere does not exist"),
        (["draw.like=2"], {"photos": "my_dog", "class_word": "dog", "run": "r"}, "A run has photos of its own"),
        (["draw.guide_image=gone.png"], {}, "gone.png does not exist"),
        (["draw.guide_clip=1", "evaluate.clip=/nowhere"], {}, "cannot load the CLIP encoder /nowhere"),
        (["draw.like=-1"], {}, "draw.like"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(draw, my_dog, settings, options, message):
    options = {key: my_dog if value == "my_dog" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        draw(*settings, **options)


@pytest.fixture(scope="module")
def clip(eyes):
    return load_clip(eyes, "cpu")


def cosine(model, clip, z0, targets):
    return (F.normalize(clip.image(model.decode_unclamped(z0)), dim=-1) * targets).sum(-1)


def test_thirty_steps_along_the_gradient_of_clip_raise_the_cosine(model, clip):
    z0 = torch.randn(2, 4, 16, 16, generator=generator(0, "z"))
    with torch.no_grad():
        targets = F.normalize(clip.text(["a dog in the snow", "a cat on the beach"]), dim=-1)
        before, gradient = cosine(model, clip, z0, targets), steering.clip_gradient(model, clip, targets)
    with torch.inference_mode():  # as sampling is
        for _ in range(30):
            g = gradient(z0, 0)
            z0 = z0 + 0.5 * g / g.std((1, 2, 3), keepdim=True)
    assert (cosine(model, clip, z0, targets) > before + 0.02).all()


def test_the_gradient_of_clip_is_that_of_the_logit_and_of_its_own_row(model, clip, monkeypatch):
    z0, step = torch.randn(3, 4, 16, 16, generator=generator(1, "z")), 0.05
    with torch.no_grad():
        targets = F.normalize(clip.text(["a dog", "a cat", "snow"]), dim=-1)
        g = steering.clip_gradient(model, clip, targets)(z0, 0)
        steepness = g.flatten(1).norm(dim=1)
        climb = step * g / steepness[:, None, None, None]
        slope = clip.scale * (cosine(model, clip, z0 + climb, targets) - cosine(model, clip, z0 - climb, targets)) / (2 * step)
    torch.testing.assert_close(steepness, slope, rtol=0.03, atol=0)
    monkeypatch.setattr(steering, "DECODED", 1)  # one image at a time
    torch.testing.assert_close(
        steering.clip_gradient(model, clip, targets)(z0, 0), g, rtol=1e-3, atol=1e-3 * g.abs().max().item()
    )


def test_a_decode_that_leaves_the_range_of_colours_keeps_its_gradient(model):
    z0 = (1e3 * torch.randn(1, 4, 16, 16, generator=generator(0, "far"))).requires_grad_()
    images = model.decode_unclamped(z0)
    torch.testing.assert_close(images.detach().clamp(-1, 1), model.decode_latents(z0.detach()), rtol=0, atol=1e-5)
    (g,) = torch.autograd.grad(images.sum(), z0)
    assert g.isfinite().all() and g.abs().max() > 0


def test_an_encoder_sees_clipped_pixels_whose_gradient_is_not_clipped():
    image = (torch.rand(1, 3, 32, 32, generator=generator(0, "pixels")) > 0.5).float()
    plain = resize(image, 24)
    assert plain.min() == 0 and plain.max() == 1
    image.requires_grad_()
    seen = resize(image, 24)
    torch.testing.assert_close(seen.detach(), plain)
    (g,) = torch.autograd.grad(seen[plain == 1].sum(), image)
    assert g.abs().sum() > 0


def test_images_drawn_towards_clip_say_so_and_that_it_is_no_score_of_them(draw, tmp_path):
    screen = RecordingScreen()
    plain, guided = draw("draw.steps=4").files[0], draw("draw.steps=4", "draw.guide_clip=30", screen=screen).files[0]
    assert guided.name != plain.name and pixels(guided) != pixels(plain)
    said = Image.open(guided).text["parameters"]
    assert "CLIP guidance: 30" in said and "No score: CLIP-T" in said
    row = last_row(tmp_path)
    assert (row["guide_clip"], row["guide_every"]) == (30.0, 1) and "sha256:" in row["guide_encoder"]
    assert any("decodes each image at 4 of 4 steps" in line for line in screen.lines)
    rarely = draw("draw.steps=4", "draw.guide_clip=30", "draw.guide_every=2", screen=screen).files[0]
    assert rarely.name != guided.name and pixels(rarely) != pixels(guided)
    assert any("at 2 of 4 steps" in line for line in screen.lines)


def test_clip_is_not_told_the_word_that_it_cannot_know(model, clip, monkeypatch, tmp_path):
    told = []
    recorder = dataclasses.replace(clip, text=lambda texts: told.extend(texts) or clip.text(texts))
    monkeypatch.setattr(steering, "load_clip", lambda *place, **options: recorder)
    recipe, where = load_recipe(None, ["draw.guide_clip=1"]), {"priors": tmp_path, "screen": RecordingScreen()}
    steering.prepare(model, recipe, None, tokens=["zqv"], **where).of(["a zqv dog in the snow"])
    assert told == ["a dog in the snow"]


def test_an_image_is_guided_the_same_in_any_batch(draw):
    together = [pixels(path) for path in draw("draw.guide_clip=30").files]
    alone = [pixels(path) for path in draw("draw.guide_clip=30", "draw.batch=1").files]
    assert all(max(abs(a - b) for a, b in zip(x, y, strict=True)) <= 1 for x, y in zip(together, alone, strict=True))


def test_an_image_to_go_to_is_named_by_its_content(draw, my_dog, tmp_path):
    first, second = sorted(my_dog.glob("*.png"))
    one = draw(f"draw.guide_image={first}").files[0]
    row = last_row(tmp_path)
    assert row["guide_clip"] == 1.0 and row["guide_image"]["file"] == first.name and len(row["guide_image"]["sha256"]) == 64
    assert "No score: CLIP-I" in Image.open(one).text["parameters"]
    shutil.copy(second, first)
    assert draw(f"draw.guide_image={first}").files[0] != one


def test_what_is_drawn_towards_is_no_part_of_what_names_the_images_of_plain_drawing():
    plain = SamplingConfig().decisive()
    assert plain.keys() == {"sampler", "steps", "guidance", "rescale", "interval", "negative", "size", "batch"}
    assert SamplingConfig(like=2, guide_clip=1, guide_image="a.png", guide_every=3).decisive() == plain
