"""Subjects trained in one batch leave the runs that `train` leaves, and one that fails does not stop the others."""

import itertools
import json

import pytest
from safetensors.torch import load_file
from screens import RecordingScreen, terminate

import personalize
from personalize import models
from personalize.commands.session import resolve_subjects
from personalize.commands.together import train_together
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import read_jsonl

LORA = "pytorch_lora_weights.safetensors"
COMMON = ["device=cpu", "prior.count=3", "prior.steps=2", "draw.steps=2", "draw.sampler=ddim", "photos.hold_out=0"]
COMMON += ["train.methods=lora", "train.text_encoder=true", "train.lr=1e-2", "train.clip=0.1", "train.checkpoint_every=2"]


@pytest.fixture
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


def rows_of(base, photos, *differing):
    """A row for each: settings that differ."""
    settings = [f"base={base}", *COMMON]
    return [resolve_subjects(photos, "dog", None, [*settings, *more]) for more in differing]


def tensors(folder):
    return load_file(folder / "model" / LORA)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def far(one, other):
    """The largest distance between two results, as a share of the second's largest weight."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one) / max(float(v.abs().max()) for v in other.values())


SHORT, LONG = ["train.steps=3", "train.ema=0.9"], ["train.steps=5", "seed=1", "train.lr_schedule=cosine", "choose.every=0"]


def test_each_is_the_run_that_train_makes_of_it_alone(model, tiny_sd, photos, tmp_path):
    rows, options = rows_of(tiny_sd, photos, SHORT, LONG), {"runs": tmp_path / "a", "priors": tmp_path / "priors"}
    results = train_together(model, rows, names=["rex", "tim"], **options)
    assert [(result.folder.name, result.steps) for result in results] == [("rex", 3), ("tim", 5)]
    for result, more in zip(results, (SHORT, LONG), strict=True):
        settings = [f"base={tiny_sd}", *COMMON, *more]
        alone = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path / "b", priors=tmp_path / "priors")
        together, own = (run_folder.read_manifest(folder) for folder in (result.folder, alone.folder))
        assert together.pop("together") == 2 and together["status"] == "finished"
        assert together.keys() == own.keys() and together["identity"] == own["identity"]
        assert names(result.folder) == names(alone.folder)
        assert 0 < far(tensors(result.folder), tensors(alone.folder)) < 1e-3
        logs = [[row["loss"] for row in read_jsonl(folder / "log.jsonl")] for folder in (result.folder, alone.folder)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    images = personalize.generate(
        ["a {token} dog"], run=results[1].folder, settings=["draw.count=1", *COMMON[:5]], out=tmp_path
    )
    assert images
    assert [result.steps for result in train_together(model, rows, **options)] == [0, 0], "they are finished"
    assert not [name for name, m in model.unet.named_modules() if hasattr(m, "base_layer")], "the base is bare again"


@pytest.mark.slow
def test_what_stops_all_is_resumed_to_the_same_bits_and_what_fails_alone_stops_no_other(model, tiny_sd, photos, tmp_path):
    rows = rows_of(tiny_sd, photos, ["train.steps=4"], ["train.steps=4", "seed=1"])
    nothing = rows_of(tiny_sd, tmp_path / "none", ["train.steps=4"])
    diverges = rows_of(tiny_sd, photos, ["train.steps=4", "seed=2", "train.lr=1e30", "train.clip=0"])
    whole = train_together(model, [*rows, *nothing, *diverges], runs=tmp_path / "a", priors=tmp_path / "priors")
    assert [type(each).__name__ for each in whole[:3]] == ["TrainResult", "TrainResult", "UserError"]
    assert isinstance(whole[3], UserError) and "Lower it" in str(whole[3])
    statuses = [run_folder.read_manifest(path.parent)["status"] for path in sorted((tmp_path / "a").glob("*/manifest.json"))]
    assert sorted(statuses) == ["failed", "finished", "finished"]
    stopped = {"runs": tmp_path / "b", "priors": tmp_path / "priors"}
    with pytest.raises(Interrupted):
        train_together(model, rows, **stopped, screen=RecordingScreen(step=6, action=terminate))
    folders = [path.parent for path in sorted((tmp_path / "b").glob("*/manifest.json"))]
    assert [run_folder.read_manifest(folder)["status"] for folder in folders] == ["interrupted"] * 2
    checked = personalize.verify(whole[0].folder, steps=2)
    assert not checked.failed and any("in one batch with 2 other subjects" in line for line in checked.passed), checked
    resumed = train_together(model, rows, **stopped)
    assert [result.steps for result in resumed] == [1, 1]
    for one, other in zip(whole, resumed):
        assert all((v == tensors(other.folder)[k]).all() for k, v in tensors(one.folder).items())


REFUSED = [
    ("train.methods=full", "of which there is one"), ("train.methods=lokr", "not a product of two matrices"),
    ("lora.dora=true", "norm"), ("train.quantize=8bit", "quantized"), ("train.engine=compiled", "addresses"),
    ("train.offload=true", "train.offload"), ("photos.shape=buckets", "other sizes"),
    ("train.held_out_every=2", "held_out_every"), ("train.methods=custom-diffusion", "of which there is one"),
]  # fmt: skip


def test_what_cannot_train_in_one_batch_is_refused_with_the_reason(model, tiny_sd, photos, tmp_path):
    for setting, why in REFUSED:
        with pytest.raises(UserError, match=f"cannot train in one batch.*{why}"):
            train_together(model, rows_of(tiny_sd, photos, [setting], [setting]), runs=tmp_path)
    with pytest.raises(UserError, match="subjects 1 and 3 cannot train in one batch: lora.rank is 4 and 8"):
        train_together(model, rows_of(tiny_sd, photos, [], [], ["lora.rank=8"]), runs=tmp_path)
    assert not list(itertools.chain(tmp_path.iterdir()))


def test_many_trains_rows_in_one_batch_where_their_recipes_allow_it(tiny_sd, photos, tmp_path):
    rows = [{"id": "rex", "seed": 0}, {"id": "odd", "lora.rank": 2}, {"id": "tim", "seed": 1}, {"id": "none", "photos": "no"}]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"photos": str(photos), "class": "dog"} | row) + "\n" for row in rows))
    settings, folders = [f"base={tiny_sd}", *COMMON, "train.steps=1"], {"runs": tmp_path / "a", "priors": tmp_path / "priors"}
    result = personalize.many(table, settings=settings, together=3, **folders)
    assert [row["status"] for row in result.rows] == ["done", "done", "done", "failed"]
    manifests = [run_folder.read_manifest(tmp_path / "a" / name) for name in ("rex", "odd", "tim")]
    assert [manifest.get("together") for manifest in manifests] == [2, None, 2]
    with pytest.raises(UserError, match="of which there is one"):
        personalize.many(table, settings=[*settings, "train.methods=full"], together=3, **folders)
