"""A metric is one row: scoring, metrics.json, the report, the comparison and the model card find it there."""

from dataclasses import replace

import pytest
import torch

import personalize
from personalize.evaluation import metrics
from personalize.evaluation.metrics import METRICS, Metric

SETTINGS = [
    "train.steps=1",
    "train.methods=lora",
    "prior.count=0",
    "photos.hold_out=0",
    "draw.steps=2",
    "device=cpu",
    "choose.every=0",
]
SETTINGS += ["evaluate.count=1", "evaluate.class_count=0", 'evaluate.prompts="a {token} {class}"']


def brightness(images):
    return images.pixels.flatten(1).mean(1)


@pytest.fixture
def toy(monkeypatch):
    row = Metric("TOY: brightness", "lower", "", brightness, lambda reference: 0.25)
    monkeypatch.setitem(METRICS, "toy", row)


@pytest.mark.slow
def test_a_new_row_is_in_the_metrics_the_report_and_the_comparison(toy, photos, tmp_path):
    runs = [
        personalize.train(photos, class_word="dog", settings=[*SETTINGS, f"seed={seed}"], runs=tmp_path).folder
        for seed in (0, 1)
    ]
    comparison = personalize.compare(runs)
    evaluation = personalize.evaluate(runs[0], settings=["seed=0"])
    score = evaluation.metrics["scores"]["toy"]
    assert (score["title"], score["better"], score["ceiling"]) == ("TOY: brightness", "lower", 0.25)
    assert (
        "TOY: brightness" in evaluation.report.read_text()
        and "TOY: brightness" in (evaluation.report.parent / "report.md").read_text()
    )
    assert "| TOY: brightness |" in comparison.text and "toy" in comparison.rows[0]["changes"]
    assert ",toy," in (evaluation.report.parent / "per_image.csv").read_text().splitlines()[0] + ","


def test_what_a_metric_needs_decides_whether_it_is_measured():
    one = torch.nn.functional.normalize(torch.ones(1, 4), dim=1)
    photos = metrics.similarity.Embeddings(one, one)
    bare = metrics.Reference(None, photos, None, None)
    assert list(metrics.measured(bare)) == ["dino", "clip_i", "clip_t", "diversity"]
    assert set(metrics.measured(replace(bare, look_alikes=photos))) - set(metrics.measured(bare)) == {"first"}
    held = metrics.Reference(None, photos, photos, None)
    assert set(metrics.measured(held)) - set(metrics.measured(bare)) == {"held_out"}
