"""The whole job on Stable Diffusion 1.x, 2.1-v and SDXL in their full layout, from a diffusers folder and from one file."""

import json
import re
from types import SimpleNamespace

import bases
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import personalize
from personalize import models
from personalize.common import run_folder
from personalize.models.lazy_imports import lazy_imports

SMALL = [
    "device=cpu", "token=zqv", "photos.size=64", "prior.count=2", "prior.steps=2", "train.steps=3", "train.lr=1e-3",
    "draw.size=64", "draw.steps=2", "draw.count=1", "draw.sampler=ddim",
]  # fmt: skip
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
SIZE = {"sd1": 512, "sd2": 768, "sdxl": 1024}
PIPELINE = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}

TRANSFORMERS = {"sd1": 16, "sd2": 16, "sdxl": 70}  # layers with self- and cross-attention, as in the releases


pytestmark = pytest.mark.usefixtures("own_cache")


def ignore(line):
    pass


@pytest.fixture(scope="module", params=bases.LAYOUTS)
def base(request, tmp_path_factory):
    """name, folder and file of one base, and where its class images go."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = bases.LAYOUTS[name](root / name)
    (root / "files").mkdir()
    file = bases.single(folder, root / "files" / f"{name}.safetensors")
    return SimpleNamespace(name=name, folder=folder, file=file, priors=root / "priors")


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Photos as cameras and phones write them: JPEG, of several sizes, upright and not."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (width, height) in enumerate([(1200, 900), (768, 1024), (1280, 720)]):
        blocks = random.integers(0, 255, (height // 120 + 1, width // 120 + 1, 3), np.uint8)
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"IMG_{number}.jpg", quality=90)
    return folder


def test_a_base_says_what_its_release_says(base):
    folder, file = (models.load_model(str(place), device="cpu", say=ignore) for place in (base.folder, base.file))
    for model in (folder, file):
        assert (model.size, model.downscale, model.latent_channels) == (SIZE[base.name], 8, 4)
        assert model.schedule.prediction == PREDICTION[base.name]
    assert folder.schedule.alphas_cumprod.equal(file.schedule.alphas_cumprod)
    assert list(folder.networks) == list(file.networks)
    prompts, z, t = ["a photo of a dog", "", "a dog!"], torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 990])
    with torch.no_grad():
        conds = [model.encode_prompts(prompts) for model in (folder, file)]
        for key in conds[0]:
            torch.testing.assert_close(conds[0][key], conds[1][key], rtol=1e-4, atol=1e-5)
        outs = [model.predict(z, t, cond) for model, cond in zip((folder, file), conds, strict=True)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


JOBS = {"sd1": ("file", "lora"), "sd2": ("folder", "full"), "sdxl": ("file", "lora")}


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_job(base, camera, tmp_path, more):
    """Each base once, from a folder or a file, by full or lora; `more`: the other way too. That a base is the same from both
    is tested above.
    """
    source, method = JOBS[base.name]
    if more:
        source, method = {"file": "folder", "folder": "file"}[source], {"lora": "full", "full": "lora"}[method]
    settings = [*SMALL, f"base={getattr(base, source)}", f"train.methods={method}"]
    drawn = personalize.prior("dog", settings=settings, root=base.priors)
    assert (drawn.drawn, drawn.count) == (2, 2)
    done = personalize.train(camera, class_word="dog", settings=settings, runs=tmp_path / "runs", priors=base.priors)
    manifest = run_folder.read_manifest(done.folder)
    assert (done.steps, manifest["status"], manifest["base"]) == (3, "finished", str(getattr(base, source)))
    losses = [json.loads(line)["loss"] for line in (done.folder / "log.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 100 for loss in losses)
    tuned = personalize.generate(["a photo of a {token} {class}"], run=done.folder)
    plain = personalize.generate(
        ["a photo of a zqv dog"], base=str(getattr(base, source)), settings=SMALL, out=tmp_path / "plain"
    )
    images = [np.asarray(Image.open(each.files[0])).astype(int) for each in (tuned, plain)]
    assert images[0].shape == (64, 64, 3) and np.abs(images[0] - images[1]).max() > 0, "training changed nothing"
    check = opens_as_a_folder if method == "full" else holds_an_adapter
    check(done.folder / "model", base)


def opens_as_a_folder(result, base):
    """Plain diffusers loads what full fine-tuning saved, and only the U-Net is another one."""
    with lazy_imports():
        import diffusers
    tuned, original = (
        diffusers.DiffusionPipeline.from_pretrained(place, safety_checker=None, feature_extractor=None)
        if base.name != "sdxl"
        else diffusers.DiffusionPipeline.from_pretrained(place)
        for place in (result, base.folder)
    )
    assert type(tuned).__name__ == PIPELINE[base.name]
    for name, part in original.components.items():
        if isinstance(part, torch.nn.Module):
            same = all(torch.equal(p, q) for p, q in zip(part.parameters(), tuned.components[name].parameters(), strict=True))
            assert same == (name != "unet"), name
    tuned.set_progress_bar_config(disable=True)
    assert tuned("a photo of a zqv dog", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def holds_an_adapter(result, base):
    """The names are those that every program with diffusers' LoRA layout reads."""
    tensors = load_file(result / "pytorch_lora_weights.safetensors")
    assert tensors and all(re.fullmatch(r"unet\..+\.to_(q|k|v|out\.0)\.lora_[AB]\.weight", key) for key in tensors)
    assert len(tensors) == 2 * 4 * 2 * TRANSFORMERS[base.name]
    # Where SD1 and SD2 see one cell, at 64 px, self-attention has one place to look at: its q and k get no gradient.
    assert sum(not tensor.any() for tensor in tensors.values()) <= 2
