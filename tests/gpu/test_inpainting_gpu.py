"""On a card: an edit is the CPU's, what is kept is the image's own, and an inpainting base trains as on a CPU."""

import pytest
import torch
from bases import inpainting_base

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.data.training_set import build_training_set
from personalize.generation import inpainting, sampling
from personalize.generation.inpainting import Canvas
from personalize.training.engine import Engine

pytestmark = pytest.mark.gpu


def test_an_edit_on_a_card_is_the_cpus_and_keeps_the_images_pixels(tiny_sd):
    pixels = rng.normal([rng.generator(3, "photo", 0)], (3, 32, 32))[0].clamp(-1, 1)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:26] = 1
    canvas, how, images = Canvas(pixels, mask, 0.8, visits=2), SamplingConfig("ddpm", 4, 3.0), []
    for device in ("cpu", "cuda"):
        model = models.load_model(str(tiny_sd), device=device, dtype="float32", say=lambda line: None)
        options = inpainting.sampling_options(model, canvas, how.steps)(2)
        z0 = sampling.sample_latents(model, ["a dog"] * 2, sampling.image_generators(0, range(2)), how, **options)
        images.append(inpainting.paste_kept(model.decode_latents(z0), canvas, model.downscale).cpu())
    kept = (mask == 0).expand(2, 3, -1, -1)
    assert all(torch.equal(drawn[kept], pixels.expand(2, -1, -1, -1)[kept]) for drawn in images)
    torch.testing.assert_close(*images, rtol=0, atol=1e-2)  # convolutions in TF32


@pytest.mark.parametrize(
    "more", [[], ["photos.crop=random", "photos.flip=true"]], ids=["from the cache", "encoded at each step"]
)
def test_an_inpainting_base_trains_on_a_card_as_on_the_cpu_and_as_a_graph(tiny_sd, photos, tmp_path, more):
    base, losses = inpainting_base(tiny_sd, tmp_path / "wide", scale=0.1), []
    for device, engine in (("cpu", "eager"), ("cuda", "eager"), ("cuda", "graph")):
        model = models.load_model(str(base), device=device, dtype="float32", say=lambda line: None)
        texts = ["class_word=dog", "train.steps=10", "train.batch=2", "train.methods=lora", f"train.engine={engine}", *more]
        recipe, known = load_recipe(None, texts), [Subject("zqv", "dog", load_photos(photos, min_size=32)[0][:4])]
        torch.manual_seed(0)
        groups = methods.attach(model, recipe)
        data = build_training_set(
            model, recipe, known, priors={"dog": torch.full((5, 4, 16, 16), 0.5)}, text_trains=False,
            class_pixels=lambda word, i: torch.full((1, 3, 32, 32), i / 5),
        )  # fmt: skip
        said: list[str] = []
        run = Engine(model, recipe, groups, say=said.append)
        rows = [torch.stack(list(run.step(data.at(step), scale=1.0).values())) for step in range(8)]
        assert not said, "a graph that fell back to eager steps"
        losses.append(torch.stack(rows).cpu())
    for each in losses[1:]:
        torch.testing.assert_close(each, losses[0], rtol=1e-2, atol=1e-3)  # convolutions in TF32
