"""On a real card: images are drawn towards photos and by CLIP there, and the gradients are those of a CPU."""

import pytest
import torch
from torch.nn import functional as F

import personalize
from personalize import models
from personalize.evaluation.encoders import load_clip
from personalize.training import noisy_classifier, steering

pytestmark = pytest.mark.gpu


def test_images_are_drawn_towards_photos_and_a_prompt(tiny_sd, eyes, photos, tmp_path):
    settings = ["device=cuda:0", "draw.steps=3", "draw.count=2", "prior.count=3", "prior.steps=2"]
    settings += ["draw.like=5", "draw.guide_clip=5", f"evaluate.clip={eyes}/encoders/clip"]
    where = {"priors": tmp_path / "priors", "out": tmp_path / "out"}
    result = personalize.generate(["a dog"], base=str(tiny_sd), photos=photos, class_word="dog", settings=settings, **where)
    assert len(result.files) == 2


def test_gradients_are_those_of_a_cpu(tiny_sd, eyes):
    z0, found = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), []
    torch.manual_seed(0)
    network = noisy_classifier.NoisyClassifier(4, 2).eval().requires_grad_(False)
    for device in ("cpu", "cuda:0"):
        model = models.load_model(str(tiny_sd), device=device, dtype="float32", say=lambda line: None)
        clip, network = load_clip(eyes, model.device), network.to(model.device)
        with torch.no_grad():
            targets = F.normalize(clip.text(["a dog", "a cat"]), dim=-1)
        z = z0.to(model.device)
        pair = noisy_classifier.class_gradient(network, 1)(z, 300.0), steering.clip_gradient(model, clip, targets)(z, 300.0)
        found.append([g.cpu() for g in pair])
    for on_cpu, on_card in zip(*found, strict=True):
        torch.testing.assert_close(on_card, on_cpu, rtol=0, atol=1e-3 * on_cpu.abs().max().item())
