"""`benchmarks.few_steps` measures each row once, and goes on with those that are missing."""

import pytest

from benchmarks import ddgan, few_steps
from personalize import models


@pytest.fixture(scope="module")
def judge(tiny_sd):
    return few_steps.make_judge(models.load_model(str(tiny_sd), device="cpu", say=lambda line: None), 4)


@pytest.fixture(autouse=True)
def fewer_rows(monkeypatch):
    for name, value in {"STEPS": (1, 2), "TEACHER": "DDIM-2", "SAMPLERS": {"DDIM": "ddim", "LCM": "lcm"}}.items():
        monkeypatch.setattr(few_steps, name, value)


def test_rows_are_written_and_drawn_once(judge, tmp_path, monkeypatch):
    network = ddgan.generator(judge.bench.model.unet).eval()
    rows = [*few_steps.sampler_rows(2.2, None), few_steps.Row("DDGAN", 1, few_steps.by_gan(network, 1), student=True)]
    few_steps.run(tmp_path, rows[:-1], judge, "command")
    drawn = []
    monkeypatch.setattr(
        few_steps, "generate", lambda row, *rest, own=few_steps.generate: drawn.append(row.name) or own(row, *rest)
    )
    few_steps.run(tmp_path, rows, judge, "command")
    assert drawn == ["DDGAN-1"]
    text = (tmp_path / "few-steps.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert [line.split(" | ")[1] for line in lines] == ["DDIM", "LCM", "DDGAN", "DDIM", "LCM"]
    assert "nan" not in text and "- DDGAN-1: misses class" in text
    assert (tmp_path / "few-steps.png").stat().st_size > 1000


def test_the_same_image_every_time_has_no_diversity_and_rendered_scenes_have_no_excess_of_kid(judge):
    scenes = [few_steps.sample_scene(few_steps.FIRST + k) for k in range(len(judge.texts))]
    images = judge.bench.render(scenes).repeat(few_steps.EACH, 1, 1, 1)
    row = judge.score(images)
    assert max(row["diversity"]) < 1e-5 and row["KID"] == pytest.approx([0, 0], abs=1e-6)
    assert len(row["class"]) == len(images)


def test_a_bar_is_a_least_or_a_most():
    assert few_steps.reached(0.8, 0.8, False) and not few_steps.reached(0.79, 0.8, False)
    assert few_steps.reached(0.06, 0.06, True) and not few_steps.reached(0.061, 0.06, True)
