"""What the commands share: a base that has a world is a Toyland, whatever its folder is called."""

import hashlib
import json
import shutil

import pytest

import personalize
from personalize.common.bases import TOYLAND, has_world

SHORT = ["train.steps=2", "prior.count=2", "prior.steps=2", "draw.steps=2", "draw.count=1", "device=cpu"]
SHORT += ["choose.every=2", "choose.steps=2", "choose.count=1", "choose.class_count=1"]
SHORT += ["evaluate.count=1", "evaluate.class_count=1", "train.batch=1"]


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "my-own"
    shutil.copytree(TOYLAND, folder)
    return folder


def test_a_base_with_probes_has_a_world_and_others_have_none(renamed, tiny_sd):
    assert has_world("toyland") and has_world(str(renamed))
    assert not has_world(str(tiny_sd)) and not has_world("owner/name") and not has_world("no-such-folder")


def test_a_renamed_toyland_takes_toylands_defaults(renamed):
    named, own = (personalize.resolve(None, [f"base={base}", "train.methods=lora"]) for base in ("toyland", renamed))
    assert named.train == own.train and named.draw == own.draw and named.choose == own.choose
    assert own.train.steps != personalize.resolve(None, ["base=owner/name", "train.methods=lora"]).train.steps


@pytest.mark.slow
def test_a_renamed_toyland_trains_draws_and_scores_the_same_bits(renamed, photos, tmp_path):
    """Its defaults, rare tokens, dev prompts, encoders, probe and protocol, by name and by folder."""
    results = []
    for base in ("toyland", str(renamed)):
        root = tmp_path / base.strip("/").replace("/", "-")
        folders = {"runs": root / "runs", "priors": root / "priors"}
        run = personalize.train(photos, class_word="dog", settings=[f"base={base}", *SHORT], **folders).folder
        image = personalize.generate(["a {token} {class}"], run=run).files[0]
        metrics = personalize.evaluate(run).metrics
        files = [*sorted((run / "model").rglob("*.safetensors")), image]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files[:-1]]
        scores = {key: metrics[key] for key in ("scores", "truth", "class", "copying", "prompts", "encoders")}
        results.append((hashes, _pixels(image), json.dumps(scores), metrics["protocol"]["name"]))
    assert results[0] == results[1]
    assert results[0][3] == "toyland" and metrics["truth"] and len(hashes) >= 1


def _pixels(path):
    from PIL import Image

    return Image.open(path).tobytes()
