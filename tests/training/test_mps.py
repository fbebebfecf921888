"""Training and drawing on Apple's GPU, as far as a CPU shows it: a stand-in device on which float64 is refused.

The stand-in is torch's "meta" device: it computes shapes and dtypes, which is all that this is about.
"""

import contextlib

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from personalize import methods, models
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe
from personalize.data import training_set
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.generation import sampling
from personalize.models import devices
from personalize.training.engine import Engine


class RefusesFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return out


@pytest.fixture
def mps(monkeypatch):
    """Inside, "mps" is the stand-in."""
    monkeypatch.setattr(devices, "choose_device", lambda name: {"mps": torch.device("meta")}[name])
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # it knows no "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with RefusesFloat64():
        yield


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("tiny_sd", ["train.methods=full", "train.snr_gamma=5"]),
        ("tiny_sd", ["train.methods=lora", "prior.kind=predictions"]),
        ("tiny_sdxl", ["train.methods=lora", "prior.count=0", "photos.background=0.5", "draw.sampler=ddpm"]),
    ],
)
def test_a_step_and_a_picture_need_no_float64(mps, request, photos, base, settings):
    model = models.load_model(str(request.getfixturevalue(base)), device="mps", dtype="float32", say=lambda line: None)
    recipe = load_recipe(None, ["class_word=dog", "prior.count=3", "draw.steps=3", *settings])
    known = [Subject("zqv", "dog", load_photos(photos, min_size=16)[0][:3])]
    groups = methods.attach(model, recipe)
    drawn = {"dog": torch.zeros(3, 4, 16, 16)} if recipe.prior.kind == "pictures" and recipe.prior.count else {}
    data = training_set.build_training_set(model, recipe, known, priors=drawn, text_trains=False)
    engine = Engine(model, recipe, groups)
    assert engine.backward(data.at(0)).device.type == "meta" and all(p.grad is not None for p in engine.params)
    z0 = sampling.sample_latents(model, ["a dog"] * 2, sampling.image_generators(0, range(2)), recipe.draw)
    assert model.decode_latents(z0).shape == (2, 3, 32, 32)


def test_the_stand_in_refuses_what_mps_refuses(mps):
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, dtype=torch.float64).to("meta")


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(0, True, "mps"), (1, True, "cuda:0"), (0, False, "cpu")])
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert str(devices.choose_device("auto")) == expected
    if not mps:
        with pytest.raises(UserError, match="not on this machine"):
            devices.choose_device("mps")
