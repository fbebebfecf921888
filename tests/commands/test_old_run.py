"""Runs, class images and exports that an older version wrote: they open, resume and draw as they did there.

What is in tests/fixtures/old_run, and how it was made, stands in its README. Numbers are compared with a tolerance, because
another processor rounds otherwise: images may differ by 1 of 255 in the mean (the base's image differs by 42).
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from personalize.common.recipe import recipe_from_dict

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
RUN = "zqv-dog"
# The run's own recipe, whole; what came later begins from Toyland's defaults, and none of them here.
RECIPE = ("--recipe", f"runs/{RUN}/recipe.toml", "--set", "choose.strengths=[]")
PROMPT = "a {token} {class} on the beach"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def home(tmp_path, photos):
    """A copy of the fixture where the old version would have left it: runs, interrupted, priors, exported, drawn."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "finished").rename(tmp_path / "runs")
    (tmp_path / "class_images").rename(tmp_path / "priors")
    for path in (*tmp_path.rglob("manifest.json"), *tmp_path.rglob("exports.jsonl")):
        path.write_text(path.read_text().replace("@PHOTOS@", str(photos)).replace("@HOME@", str(tmp_path)))
    return tmp_path


@pytest.fixture
def personalize(home, terminal):
    """Runs a command line in `home` -> what it printed; status 0 is asserted."""

    def call(*words):
        status, out, err = terminal(*words)
        assert not status, err
        return out + err

    return call


def contents(folder):
    """Every file's hash and time of writing, so that a file written anew with the same bytes shows too; but for the lock."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock.flock")
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def image(folder):
    """The one image that `generate` wrote to a folder, as its row names it."""
    (row,) = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    return np.asarray(Image.open(folder / row["file"]).convert("RGB"), dtype=np.float32), row


def test_a_finished_run_is_finished_and_draws_and_exports_as_it_did(home, personalize, photos):
    before = {name: contents(home / name) for name in ("runs", "priors")}
    said = personalize("train", photos, "--class", "dog", *RECIPE)
    assert "this run is finished" in said
    assert {name: contents(home / name) for name in ("runs", "priors")} == before, "nothing was trained or drawn again"

    personalize("generate", PROMPT, "--out", "now")
    (old, old_row), (new, new_row) = image(home / "drawn"), image(home / "now")
    assert new_row == old_row | {"run": new_row["run"]}, "the same settings, seed and file name"
    assert abs(new - old).mean() <= 1

    personalize("export", f"runs/{RUN}", "--to", "diffusers", "--out", "again", "--no-check")
    old_lora, new_lora = load_file(home / "exported" / LORA), load_file(home / "again" / LORA)
    assert old_lora and {k: v.tolist() for k, v in new_lora.items()} == {k: v.tolist() for k, v in old_lora.items()}


def test_an_interrupted_run_goes_on_to_the_same_end(home, personalize, photos):
    before = contents(home / "priors") | contents(home / "interrupted" / "base-pictures")
    command = ("train", photos, "--class", "dog", *RECIPE, "--runs", "interrupted")
    assert f"interrupted/{RUN} after step 4" in personalize(*command)
    assert before == contents(home / "priors") | contents(home / "interrupted" / "base-pictures"), "nothing was drawn again"

    run, other = home / "interrupted" / RUN, home / "runs" / RUN  # the same recipe, run without a stop
    manifest, uninterrupted = (json.loads((folder / "manifest.json").read_text()) for folder in (run, other))
    for key in ("status", "identity", "chosen", "subjects"):
        assert manifest[key] == uninterrupted[key], key
    now, then = (recipe_from_dict(m["recipe"], "the run") for m in (manifest, uninterrupted))
    assert now == then, "settings that came later have their defaults"
    steps = [
        [json.loads(line)["step"] for line in (folder / "choosing.jsonl").read_text().splitlines()] for folder in (run, other)
    ]
    assert steps == [[3, 6], [3, 6]]

    stopped = load_file(OLD / "interrupted" / RUN / "checkpoints/step-000004/state.safetensors")
    end, reached = (load_file(folder / "checkpoints/step-000006/state.safetensors") for folder in (other, run))
    assert reached.keys() == end.keys()
    trained = [name for name in end if name.startswith("trained")]
    way = sum(float((end[name] - stopped[name]).square().sum()) for name in trained) ** 0.5
    missed = sum(float((reached[name] - end[name]).square().sum()) for name in trained) ** 0.5
    assert trained and missed <= 0.01 * way, "1 % of the way from step 4 to 6 is left to rounding"


def test_an_exported_lora_loads_onto_the_base(home, personalize):
    settings = [f"--set=draw.{k}={v}" for k, v in {"sampler": "dpm++2m", "steps": 4, "guidance": 6, "count": 1}.items()]
    personalize("generate", "a zqv dog on the beach", "--base", "toyland", "--lora", "exported", *settings, "--out", "now")
    assert abs(image(home / "now")[0] - image(home / "drawn")[0]).mean() <= 1


def test_a_run_edits_its_subject(home, personalize):
    personalize("edit", PROMPT, "a {token} {class} in the snow", "--count", "1", "--steps", "2")
    rows = [json.loads(line) for line in (home / "runs" / RUN / "edits" / "images.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a zqv dog on the beach", *["a zqv dog in the snow"] * 2]
    assert {Path(row["run"]).name for row in rows} == {RUN} and len({row["file"] for row in rows}) == 3
