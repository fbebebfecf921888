"""One subject after another on a base that stays in memory: each run has the bits that it has alone."""

import hashlib

import pytest
import torch

import personalize
from personalize.commands.personalizer import Personalizer
from personalize.common import run_folder
from personalize.models import load_model, loading
from personalize.training import preflight

SHORT = ["device=cpu", "train.steps=2", "prior.count=3", "prior.steps=2", "draw.steps=2", "draw.sampler=ddim", "choose.every=0"]
LORA = {"train.methods": "lora", "train.lr": 1e-2}
ROWS = [
    {"id": "lora", **LORA},
    {"id": "full", "train.methods": ["full"], "train.lr": 1e-3, "train.text_encoder": True},
    {"id": "word", "train.methods": "textual-inversion", "token": "<rex>", "train.lr": "1e-2"},
    {"id": "custom", "train.methods": "custom-diffusion", "token": "<rex>", "train.gradient_checkpointing": True},
    {"id": "again", **LORA, "seed": 1},
]


def bits(folder):
    """Of each weights file of the result, and of the newest checkpoint."""
    results = sorted((folder / "model").rglob("*.safetensors"))
    assert results
    return [
        hashlib.sha256(p.read_bytes()).hexdigest() for p in (*results, run_folder.checkpoints(folder)[-1] / "state.safetensors")
    ]


@pytest.fixture(scope="module")
def warm(tiny_sd, photos, tmp_path_factory):
    """A worker, and what it said of each row."""
    root = tmp_path_factory.mktemp("warm")
    work = Personalizer(str(tiny_sd), settings=SHORT, runs=root / "runs", priors=root / "priors")
    return work, {row["id"]: work({"photos": str(photos), "class": "dog", **row}) for row in ROWS}


@pytest.mark.parametrize("row", [ROWS[1], ROWS[2], ROWS[4]], ids=["full", "word", "lora after all others"])
def test_a_row_has_the_bits_of_its_run_alone(tiny_sd, photos, warm, tmp_path, row):
    work, results = warm
    texts = [f"{k}={str(v).lower() if v is True else v}" for k, v in row.items() if k not in ("id", "train.methods")]
    method = row["train.methods"] if isinstance(row["train.methods"], str) else row["train.methods"][0]
    settings = [f"base={tiny_sd}", *SHORT, f"train.methods={method}", *texts]
    alone = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path, priors=work.priors).folder
    assert results[row["id"]]["status"] == "done", results[row["id"]]["error"]
    folder = work.runs / row["id"]
    assert results[row["id"]]["run"] == str(folder) and results[row["id"]]["checkpoint"] == "model"
    assert bits(folder) == bits(alone)
    assert run_folder.read_manifest(folder)["identity"] == run_folder.read_manifest(alone)["identity"]


def test_what_is_kept_is_the_base_after_all_rows(tiny_sd, warm):
    fresh = load_model(str(tiny_sd), device="cpu", say=lambda line: None)
    kept = {part: network for (part, _, _), network in warm[0]._kept._networks.items()}
    for part, network in {**fresh.networks, "vae": fresh.vae}.items():
        values = kept[part].state_dict()
        assert values.keys() == network.state_dict().keys()
        assert all(torch.equal(values[key], value) for key, value in network.state_dict().items())


def test_a_warm_row_reads_no_network(photos, warm, monkeypatch):
    monkeypatch.setattr(loading, "load_network", None)
    row = {"id": "third", "photos": str(photos), "class": "dog", **LORA, "seed": 2, "prior.count": 0}
    assert warm[0](row)["status"] == "done"


def test_a_fault_leaves_its_traceback_beside_the_run(photos, warm, monkeypatch):
    work, _ = warm
    monkeypatch.setattr("personalize.commands.personalizer.train", lambda *a, **k: 1 / 0)
    row = work({"id": "fault", "photos": str(photos), "class": "dog"})
    assert row["status"] == "failed" and row["error"].startswith("ZeroDivisionError: division by zero. See ")
    assert "Traceback" in (work.runs / "fault" / "error.txt").read_text()


def test_a_gpu_that_has_faulted_ends_the_worker(photos, monkeypatch):
    work = Personalizer("toyland")
    work._device = torch.device("cuda")
    monkeypatch.setattr(preflight, "peak_bytes", lambda device: 0)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        work({"id": "next", "photos": "", "class": "dog"})
