"""Runs on an inpainting base: every method, resumed to the same bits, planned, and exported to what diffusers opens."""

import json

import numpy as np
import pytest
import torch
from bases import inpainting_base, packable
from PIL import Image
from safetensors.torch import load_file
from screens import RecordingScreen

import personalize
from personalize.commands.export import verify
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.recipe import load_recipe
from personalize.data import class_images
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.models.lazy_imports import lazy_imports
from personalize.training import engine
from personalize.training.load_run import STATE
from personalize.training.memory import fake_networks
from personalize.training.memory.counter import estimate_memory
from personalize.training.memory.rehearsal import Rehearsal, rehearse

with lazy_imports():
    import diffusers

SETTINGS = ["class_word=dog", "device=cpu", "prior.count=3", "prior.steps=2", "draw.steps=2", "draw.sampler=ddim"]
SETTINGS += ["train.steps=3", "train.checkpoint_every=2"]
DRAW = ["draw.size=32", "draw.steps=2", "draw.sampler=ddim", "draw.count=1", "device=cpu"]
WORD, LORA = ["train.methods=textual-inversion", "token=<zqv>", "embedding.lr=1"], ["train.methods=lora", "train.lr=1e-1"]
FULL = ["train.methods=full", "train.lr=3e-3"]
METHODS = {
    "full": [*FULL, "train.sample_every=3"],
    "lora": [*LORA, "photos.crop=random", "photos.flip=true", "train.batch=2"],
    "lora-predictions": [*LORA, "prior.kind=predictions"],
    "lora-text-convolutions": [*LORA, "train.text_encoder=true", "lora.conv=true"],
    "lokr": ["train.methods=lokr", "train.lr=1e-1"],
    "textual-inversion": WORD,
    "pivotal": [*WORD, "train.methods=textual-inversion,lora"],
    "custom-diffusion": ["train.methods=custom-diffusion", "token=<zqv>", "train.lr=1e-2"],
}
KIND = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bases(tiny_sd, tiny_sdxl, tmp_path_factory):
    place, plain = tmp_path_factory.mktemp("bases"), {"sd": tiny_sd, "sdxl": tiny_sdxl}
    return {name: inpainting_base(packable(plain[name], place / name), place / f"{name}-9", scale=0.1) for name in KIND}


@pytest.fixture(scope="module")
def run(bases, photos, tmp_path_factory):
    """(folder, method, settings) -> a finished run's folder; class images are drawn once."""
    priors = tmp_path_factory.mktemp("priors")

    def train(folder, name, *more, family="sd", screen=None):
        settings = [f"base={bases[family]}", *SETTINGS, *METHODS[name], *more]
        screen = screen or RecordingScreen()
        return personalize.train(photos, settings=settings, runs=folder, priors=priors, screen=screen).folder

    return train


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of `full` on class images, and what it said."""
    screen = RecordingScreen()
    return run(tmp_path_factory.mktemp("whole"), "full", screen=screen), screen.lines


def tensors(folder):
    """All that training left: of the result, and of the newest checkpoint with the optimizer's state."""
    files = [*sorted((folder / "model").rglob("*.safetensors")), run_folder.checkpoints(folder)[-1] / STATE]
    return [value for file in files for _, value in sorted(load_file(file).items())]


def stopped(monkeypatch, steps):
    """The next run ends after so many steps, as if the power went."""
    whole_step, done = engine.Engine.step, []

    def step(self, batch, *, scale):
        if len(done) == steps:
            raise Interrupted("the power went")
        done.append(scale)
        return whole_step(self, batch, scale=scale)

    monkeypatch.setattr(engine.Engine, "step", step)


@pytest.mark.parametrize("name", [name if name == "full" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_a_run_that_was_stopped_ends_with_the_same_bits(run, whole, tmp_path, monkeypatch, name):
    expected = whole[0] if name == "full" else run(tmp_path / "whole", name)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped(patch, 2)
        run(tmp_path / "parts", name)
    parts = run(tmp_path / "parts", name)
    assert all(torch.equal(a, b) for a, b in zip(tensors(parts), tensors(expected), strict=True))


def test_a_run_says_that_it_masks_draws_samples_and_moves_the_new_channels(bases, whole):
    folder, lines = whole
    assert any("an inpainting base: each image is seen under random masks" in line for line in lines)
    assert (folder / "samples" / "step-000003.png").exists()
    trained, old = (load_file(place / WEIGHTS)["conv_in.weight"] for place in (folder / "model", bases["sd"]))
    assert (trained - old).abs().amax((0, 2, 3)).min() > 1e-3


def painted(pipeline):
    """By diffusers alone: the middle of a grey ramp is painted."""
    pipeline.set_progress_bar_config(disable=True)
    ramp, mask = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (32, 1)), np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    image, mask = Image.fromarray(ramp).convert("RGB"), Image.fromarray(mask)
    options = {"generator": torch.Generator().manual_seed(0), "height": 32, "width": 32, "strength": 1.0}
    drawn = pipeline("a photo of a dog", num_inference_steps=2, image=image, mask_image=mask, **options)
    return np.asarray(drawn.images[0]).astype(int)


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_diffusers_paints_with_an_exported_base(bases, run, whole, tmp_path, family):
    folder = whole[0] if family == "sd" else run(tmp_path, "full", family=family)
    out = personalize.export(folder, to="diffusers", out=tmp_path / "dog", settings=DRAW, check=False).files[0]
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == KIND[family]
    pipelines = [diffusers.DiffusionPipeline.from_pretrained(place, local_files_only=True) for place in (out, bases[family])]
    assert all(type(pipeline).__name__ == KIND[family] for pipeline in pipelines)
    assert pipelines[0].unet.config.in_channels == 9
    trained, bare = map(painted, pipelines)
    assert np.abs(trained - bare).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [("full", {"to": "single-file"}), ("full", {"to": "diffusers"}), ("lora", {"to": "diffusers"}), ("lora", {"to": "kohya"}),
     ("lora", {"to": "diffusers", "fuse": True})],
)  # fmt: skip
@pytest.mark.parametrize("family", KIND)
def test_a_fresh_process_draws_the_runs_image_with_the_export(run, tmp_path, monkeypatch, family, name, form):
    """With its own check: plain diffusers and PEFT open it, and what is drawn with it is the run's."""
    monkeypatch.setattr(verify, "MARGIN", 2)
    done = personalize.export(run(tmp_path, name, "train.steps=12", family=family), settings=DRAW, **form)
    assert done.check.to_run <= done.check.allowed < done.check.to_base


def planned(bases, photos, *more):
    texts = [f"base={bases['sd']}", "class_word=dog", "token=zqv", "device=cpu", "dtype=float32", "prior.count=2", *more]
    return load_recipe(None, [*texts, "train.methods=lora"]), [Subject("zqv", "dog", load_photos(photos, min_size=32)[0][:4])]


@pytest.mark.slow
def test_the_plan_counts_every_mask_that_is_kept(bases, photos):
    """1 to 10 masks of 4 photos, and 2 to 20 of 2 class images: 5 channels of 16 x 16 in float32."""

    def cached(steps, counts):
        rehearsal = Rehearsal(*planned(bases, photos, f"train.steps={steps}"), make_network=fake_networks.fake_network)
        rehearsal.encode_masked = counts
        phases = rehearsal.phases()
        return estimate_memory({name: phases[name] for name in ("load", "attach", "cache")}, device="cpu").phases["cache"]

    few, many = (cached(steps, fake_networks.fake_versions) for steps in (4, 40))
    assert many.end - few.end == pytest.approx((4 * (10 - 1) + 2 * (20 - 2)) * 5 * 16 * 16 * 4, abs=64)
    assert many.work.flops == few.work.flops, "one is encoded for all"


@pytest.mark.slow
def test_the_plan_is_a_real_runs_and_crops_that_are_cut_anew_cost_more(bases, photos):
    fixed, anew = (rehearse(*planned(bases, photos, f"photos.crop={crop}")) for crop in ("center", "random"))
    assert anew.phases["step"].work.flops > fixed.phases["step"].work.flops, "photos are encoded at each step, twice"
    assert personalize.plan(photos, class_word="dog", settings=[f"base={bases['sdxl']}", "device=cpu"]).fits


def test_a_class_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / class_images.name(0)).write_bytes(b"no image")
    with pytest.raises(UserError, match="00000.png"):
        class_images.class_pixels({"dog": tmp_path}, {"dog": (32, 32)})("dog", 0)
