"""Photos that keep their shape: which bucket each is in, which a step takes, and that all of a batch is of its size."""

import shutil
from collections import Counter

import pytest
import torch
from bases import inpainting_base
from PIL import Image

from personalize import methods, models
from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.data import buckets
from personalize.data.bucketed_set import build_data, size_lines
from personalize.data.crops import share_kept
from personalize.data.subjects import Subject, load_subjects
from personalize.training import compile
from personalize.training.engine import Engine
from personalize.training.find_run import decisive_settings

SETTINGS = ["class_word=dog", "token=zqv", "photos.hold_out=0", "photos.min_size=16", "train.lr=1e-3", "prior.count=5"]
BUCKETS = "photos.shape=buckets"
# kohya's sd-scripts, model_util.make_bucket_resolutions((512, 512)): at 256 to 1024 px in steps of 64
KOHYA_512 = [(256, w) for w in (832, 896, 960, 1024)] + [(320, 704), (320, 768), (384, 640), (448, 576)]
KOHYA_512 = sorted([*KOHYA_512, *((h, w) for w, h in KOHYA_512), (512, 512)])
SHAPES = {"a": (132, 40), "b": (132, 40), "c": (66, 64), "d": (132, 40), "e": (40, 132)}  # three wide, one square, one tall
PHOTO_SIZES = [(4032, 3024), (3024, 4032), (6000, 4000), (1920, 1080), (1080, 1920), (1080, 1350), (2048, 2048), (3440, 1440)]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Five photos of three shapes, each with its left half as the subject."""
    folder = tmp_path_factory.mktemp("shaped")
    for k, (name, size) in enumerate(SHAPES.items()):
        image = Image.linear_gradient("L").rotate(90 * k).resize(size).convert("RGB")
        alpha = Image.new("L", size)
        alpha.paste(255, (0, 0, size[0] // 2, size[1]))
        image.putalpha(alpha)
        image.save(folder / f"{name}.png")
    return folder


def made(base, folder, *more, prior=False):
    """Data and engine on a tiny base; class images are noise."""
    model = models.load_model(str(base), device="cpu", dtype="float32", say=lambda line: None)
    recipe = load_recipe(None, [*SETTINGS, BUCKETS, *more])
    known, _ = load_subjects([folder], recipe, tokens=["zqv"], size=1)
    torch.manual_seed(0)
    groups = methods.attach(model, recipe)
    sets = buckets.class_sets(known, recipe, edge=model.size, step=8 * model.downscale)
    g = torch.Generator().manual_seed(0)
    priors, images = {}, {}
    for one in sets if prior else ():
        priors[one.name] = torch.randn(one.count, 4, one.size[1] // 2, one.size[0] // 2, generator=g)
        images[one.name] = torch.zeros(1, 3, *one.size[::-1])
    pixels = (lambda name, i: images[name]) if prior else None
    data = build_data(model, recipe, known, priors=priors, text_trains=False, class_pixels=pixels)
    return data, Engine(model, recipe, groups)


def test_the_buckets_of_512_px_are_kohyas_and_other_bases_have_theirs():
    assert buckets.bucket_sizes(512, 64) == KOHYA_512
    assert buckets.bucket_sizes(32, 16) == [(16, 48), (16, 64), (32, 32), (48, 16), (64, 16)]
    for edge, step in ((512, 64), (768, 64), (1024, 64), (64, 32), (640, 128), (16, 16)):
        for width, height in buckets.bucket_sizes(edge, step):
            assert width % step == height % step == 0 and 0.7 * edge**2 < width * height <= edge**2
            assert max(1, edge // step // 2) * step <= min(width, height) <= max(width, height) <= 2 * edge
            assert (height, width) in buckets.bucket_sizes(edge, step)


def test_a_photo_is_in_the_bucket_that_cuts_least_off_it():
    """Of these, diffusers' find_nearest_bucket, least |h w' - w h'|, takes the same; kohya's nearest w / h almost always."""

    def by_kohya(w, h):
        return min(KOHYA_512, key=lambda size: abs(size[0] / size[1] - w / h))

    def by_diffusers(w, h):
        return min(reversed(KOHYA_512), key=lambda size: abs(h * size[0] - w * size[1]))

    assert all(buckets.nearest_bucket(size, KOHYA_512) == by_kohya(*size) for size in PHOTO_SIZES)
    assert buckets.nearest_bucket((6000, 4000), KOHYA_512) == (640, 384)
    assert share_kept((6000, 4000), (640, 384)) == pytest.approx(0.9)
    worse = 0
    for width in range(200, 2000, 13):
        kept = share_kept((width, 700), buckets.nearest_bucket((width, 700), KOHYA_512))
        assert kept == max(share_kept((width, 700), size) for size in KOHYA_512)
        assert kept == share_kept((width, 700), by_diffusers(width, 700))
        worse += kept > share_kept((width, 700), by_kohya(width, 700))
    assert worse == 7, "of 139: a photo between the arithmetic and the geometric mean of two ratios"


def test_every_photo_is_seen_equally_often_also_one_that_is_alone_in_its_bucket():
    counts, seed = [3, 1, 1], 7
    for row in range(3):
        taken = Counter(buckets.turn(counts, 5 * row + k, seed=seed) for k in range(5))
        assert set(taken.values()) == {1}, "a visit has its own number"
        assert Counter(bucket for bucket, _ in taken) == {0: 3, 1: 1, 2: 1}
    visits = [buckets.turn(counts, step, seed=seed) for step in range(15)]
    assert [visit for bucket, visit in visits if bucket == 0] == list(range(9))
    assert visits[7] == buckets.turn(counts, 7, seed=seed)
    assert [v for v, _ in visits] != [buckets.turn(counts, step, seed=8)[0] for step in range(15)]


def test_a_batch_is_of_one_size_and_a_function_of_seed_and_step(tiny_sd, shaped):
    data, _ = made(tiny_sd, shaped, "train.batch=2", "train.prior_batch=1", "photos.background=0", prior=True)
    assert {size: len(part.photos) for size, part in data.parts.items()} == {(16, 48): 1, (32, 32): 1, (48, 16): 3}
    assert size_lines(data) == [
        "photos keep their shape, in 3 sizes: 16×48 (1), 32×32 (1), 48×16 (3); each batch is of one size"
    ]
    seen, batches = Counter(), [data.at(step) for step in range(10)]
    for step, batch in enumerate(batches):
        size = list(data.parts)[buckets.turn(data.counts, step, seed=0)[0]]
        assert batch.z0.shape == (3, 4, size[1] // 2, size[0] // 2) == (3, *batch.eps.shape[1:])
        mean = data.parts[size].latents[0]
        seen.update((size, int((mean - z).square().sum((1, 2, 3)).argmin())) for z in batch.z0[:2])
        assert batch.mask.shape == (3, 1, size[1] // 2, size[0] // 2) and (batch.mask[2] == 1).all()
        assert batch.mask[:2, ..., : size[0] // 4 - 1].min() == 1 and batch.mask[:2, ..., size[0] // 4 + 1 :].max() == 0
    assert set(seen.values()) == {4}, "ten steps of two photos, five photos"
    again = data.at(3)
    assert torch.equal(again.z0, batches[3].z0) and torch.equal(again.t, batches[3].t)
    assert data.prompts == ["a zqv dog"] * 5 + ["a dog"] and data.prior_count == 5


def test_photos_of_one_shape_have_the_batches_of_a_plain_run(tiny_sd, photos):
    one, many = made(tiny_sd, photos, "train.batch=2")[0], made(tiny_sd, photos, "photos.shape=square", "train.batch=2")[0]
    assert list(one.parts) == [(32, 32)] and all(torch.equal(one.at(k).z0, many.at(k).z0) for k in range(4))


def test_sdxl_is_told_the_size_of_the_file_the_crop_and_the_bucket(tiny_sdxl, shaped):
    data, engine = made(tiny_sdxl, shaped, "train.batch=1", prior=True)
    rows = set()
    for step in range(5):
        batch = data.at(step)
        rows |= {tuple(row) for row in batch.cond(slice(0, 2))["sizes"].tolist()}
        assert batch.z0.shape[-2:] == tuple(int(n) // 2 for n in batch.cond(slice(0, 1))["sizes"][0, 4:])
    photos_told = {(40, 132, 0, 2, 16, 48), (64, 66, 0, 0, 32, 32), (132, 40, 2, 0, 48, 16)}
    assert rows == photos_told | {(h, w, 0, 0, h, w) for _, _, _, _, h, w in photos_told}
    assert engine.step(data.at(0), scale=1.0)["loss"].isfinite()
    z, t, cond = torch.randn(1, 4, 8, 24), torch.tensor([3]), data.model.encode_prompts(["a dog"])
    told = cond | data.model.size_conditions([(48, 16)], [(0, 0)], (48, 16))
    with torch.no_grad():
        assert torch.equal(data.model.predict(z, t, cond), data.model.predict(z, t, told)), "what is drawn is told its size"
        assert not torch.equal(
            data.model.predict(z, t, cond), data.model.predict(z, t, cond | {"sizes": told["sizes"].flip(1)})
        )


@pytest.mark.parametrize("more", [[], ["photos.crop=random", "photos.flip=true"]], ids=["encoded once", "random crops"])
def test_an_inpainting_base_paints_rectangles_of_the_bucket(tiny_sd, shaped, tmp_path, more):
    base = inpainting_base(tiny_sd, tmp_path / "inpainting", scale=0.1)
    data, engine = made(base, shaped, "train.batch=1", "train.steps=5", *more, prior=True)
    for step in range(5):
        batch = data.at(step)
        assert batch.cond(slice(0, 2))["masked"].shape == (2, 5, *batch.z0.shape[-2:])
        assert engine.step(batch, scale=1.0)["loss"].isfinite()


def test_captions_are_shuffled_and_dropped_in_any_bucket(tiny_sd, shaped, tmp_path):
    folder = shutil.copytree(shaped, tmp_path / "captioned")
    for k, name in enumerate(SHAPES):
        (folder / f"{name}.txt").write_text(f"a {{token}} {{class}}, a red hat, number {k}")
    more = ["train.caption_shuffle=true", "train.caption_dropout=0.5", "train.steps=40"]
    data, _ = made(tiny_sd, folder, *more)
    said = Counter()
    for step in range(40):
        part = data.parts[data.at(step).z0.shape[-1] * 2, data.at(step).z0.shape[-2] * 2]
        text = data.at(step).cond(slice(0, 1))["text"][0]
        said[part.prompts[next(k for k, row in enumerate(part.texts["text"]) if torch.equal(row, text))]] += 1
    assert 10 <= said.pop("") <= 30 and all(text.startswith("a zqv dog, ") for text in said) and len(said) > 5
    assert data.prompts[5:] == ["a dog"]


@pytest.mark.slow
def test_a_compiled_step_of_any_size_is_the_eager_one(tiny_sd, shaped, monkeypatch):
    compiled = []
    monkeypatch.setattr(compile, "BACKEND", lambda graph, inputs: compiled.append(graph) or graph.forward)
    data, engine = made(tiny_sd, shaped, "train.engine=compiled", "train.methods=lora")
    plain, eager = made(tiny_sd, shaped, "train.methods=lora")
    for step in range(12):
        losses = [each.step(data.at(step), scale=1.0)["loss"] for data, each in ((data, engine), (plain, eager))]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)
    assert len(compiled) >= 3, "one a bucket"


def test_predictions_of_the_base_are_shared_out_like_the_photos(tiny_sd, shaped):
    data, engine = made(tiny_sd, shaped, "prior.kind=predictions", "prior.count=10")
    assert [part.prior_count for part in data.parts.values()] == [2, 2, 6]
    assert engine.backward(data.at(0))[2] < 1e-9


def test_the_parts_of_two_processes_add_up_in_any_bucket(tiny_sd, shaped, monkeypatch):
    data, engine = made(tiny_sd, shaped, "train.batch=3")
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    batch = data.at(data.largest_step)
    assert batch.z0.shape[-2:] == (16, 16)
    whole = engine.backward(batch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(engine.backward(batch))
    torch.testing.assert_close(sum(parts), whole)


def test_class_images_are_shared_out_like_the_photos_of_their_class(shaped):
    recipe = load_recipe(None, [*SETTINGS, BUCKETS, "prior.count=100"])
    (dog,), _ = load_subjects([shaped], recipe, tokens=["zqv"], size=1)
    cat = Subject("red", "cat", dog.photos[:1])
    sets = buckets.class_sets([dog, cat], recipe, edge=32, step=16)
    assert [(one.name, one.size, one.count) for one in sets] == [
        ("dog 48x16", (48, 16), 60), ("dog 16x48", (16, 48), 20), ("dog 32", (32, 32), 20), ("cat 48x16", (48, 16), 100),
    ]  # fmt: skip
    square = load_recipe(None, [*SETTINGS, "prior.count=100"])
    plain = buckets.class_sets([dog, cat], square, edge=32, step=16)
    assert [(one.name, one.size, one.count) for one in plain] == [("dog", (32, 32), 100), ("cat", (32, 32), 100)]
    assert buckets.shares(2, [3, 1, 1]) == [1, 1, 1] and sum(buckets.shares(101, [7, 5, 3])) == 101
    assert buckets.shares(100, [1] * 3) == [34, 33, 33]


def test_a_photo_must_fill_its_bucket_not_the_square(shaped):
    recipe = load_recipe(None, [*SETTINGS, BUCKETS])
    (dog,), _ = load_subjects([shaped], recipe, tokens=["zqv"], size=1)
    sizes = buckets.sizes_of(dog.photos, "buckets", edge=32, step=16)
    buckets.require_pixels(dog.photos, sizes)
    with pytest.raises(UserError, match=r"a\.png is 132×40 px, and its bucket of 192×64 px would enlarge it.*min_size=40"):
        buckets.require_pixels(dog.photos, [tuple(4 * edge for edge in size) for size in sizes])


def test_buckets_are_another_run_and_the_square_is_the_run_from_before_the_setting():
    square, other = (decisive_settings(recipe_to_dict(load_recipe(None, [f"photos.shape={s}"]))) for s in ("square", "buckets"))
    before = recipe_to_dict(load_recipe(None))
    del before["photos"]["shape"]
    assert decisive_settings(before) == square != other
