"""On Toyland: CLIP guidance raises the score that it climbs."""

import pytest

from benchmarks import guidance, toyland
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.evaluation import encoders
from personalize.toyland.world.scenes import sample_scene

COUNT = 20


@pytest.mark.slow
def test_clip_guidance_raises_clip_t(tmp_path):
    model = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None)
    encoder = encoders.load_encoders(model.folder, "cpu")
    texts = [toyland.prompt(sample_scene(guidance.FIRST + k)) for k in range(COUNT)]
    words, clip_t = encoder.clip_text(texts), []
    for scale in (0, 1):
        settings = ["draw.guidance=1", "draw.steps=16", f"draw.guide_clip={scale}"]
        images = guidance.guided(model, texts, settings, tmp_path)
        clip_t.append((encoder.clip_image(images) * words).sum(1).mean().item())
    assert clip_t[1] > clip_t[0] + 0.02, clip_t
