"""The whole job on Toyland, short: the subject is learned, the prompt is obeyed, the class survives."""

from pathlib import Path

import pytest

import personalize
from personalize.common.files import read_json, read_jsonl
from personalize.common.run_folder import read_manifest

SETTINGS = ["train.steps=120", "prior.count=16", "draw.steps=10", "draw.count=1", "choose.steps=8", "choose.class_count=4"]
SETTINGS += ["choose.drift=0.5", "evaluate.count=2", "evaluate.class_count=8"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """prior, train, generate, evaluate on the example dog, in an empty folder."""
    folder = tmp_path_factory.mktemp("job")
    photos = Path(__file__).parents[1] / "data_examples" / "dog"
    places = {"runs": folder / "runs", "priors": folder / "priors"}
    result = personalize.quickstart(photos, class_word="dog", settings=SETTINGS, **places)
    return folder, result


def test_it_becomes_the_same_subject(job):
    """From the floor, which is the base on the same prompts and noise, at least 0.3 of the way to the photos."""
    _, result = job
    assert result.metrics["scores"]["dino"]["relative"] >= 0.3


def test_it_still_listens(job):
    """This run loses nothing of CLIP-T, and every image has its action."""
    _, result = job
    assert result.metrics["scores"]["clip_t"]["score"] > 0.9 * result.metrics["scores"]["clip_t"]["floor"]
    assert result.metrics["truth"]["action"]["score"] > 0.7


def test_a_dog_is_still_any_dog(job):
    """Class images stay far from the photos: less than half of the way there."""
    _, result = job
    assert result.metrics["class"]["share"] < 0.5


def test_truth_agrees(job):
    """A probe that knows the world and not the model: nearer to this dog than any dog is, and still where it is told to be."""
    _, result = job
    truth = result.metrics["truth"]
    assert truth["identity error"]["score"] < 0.8 * truth["identity error"]["base"]
    assert truth["place"]["score"] > 0.7
    for colour in ("body", "second", "detail"):
        assert truth[f"{colour} off"]["score"] < 0.6 * truth[f"{colour} off"]["base"], colour


@pytest.mark.slow
def test_without_class_images_the_class_drifts_further(job, tmp_path, photos):
    """The prior term is what keeps a dog any dog: the same run without it moves class images further."""
    _, result = job
    settings = [*SETTINGS, "prior.count=0"]
    run = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path / "runs").folder
    without = personalize.evaluate(run, settings=["evaluate.count=1"]).metrics["class"]
    assert without["excess"] > result.metrics["class"]["excess"] + 0.02


def test_the_job_writes_these_files_and_no_others(job):
    folder, result = job
    run = folder / "runs" / "sks-dog"
    found = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.parts[len(run.parts)] != "model"}
    images = {row["file"] for row in read_jsonl(run / "images" / "images.jsonl")}
    assert len(images) == 8
    found = {name for name in found if "/pictures/" not in name and not name.startswith("choosing/")}
    chosen = read_manifest(run)["chosen"]
    assert found == {
        "manifest.json", "recipe.toml", "log.jsonl", "lock.flock", "choosing.jsonl", "photos.png",
        *(f"checkpoints/step-{step:06d}/state.safetensors" for step in {chosen, 120}),
        *(f"evaluation/{name}" for name in ("metrics.json", "per_image.csv", "report.md", "report.html")),
        "images/images.jsonl", "images/grid.png", *(f"images/{name}" for name in images),
    }  # fmt: skip
    (prior,) = (folder / "priors").iterdir()
    names = {p.name for p in prior.iterdir() if not p.name.startswith("latents-")}
    assert names == {"lock.flock", "manifest.json", "metadata.jsonl", *(f"{i:05d}.png" for i in range(16))}
    assert read_manifest(run)["status"] == read_manifest(prior)["status"] == "finished"
    relative = read_json(run / "evaluation" / "metrics.json")["scores"]["dino"]["relative"]
    assert relative == result.metrics["scores"]["dino"]["relative"] >= 0.3, "the file says what the result says"
