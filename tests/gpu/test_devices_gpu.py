"""On real cards: the chosen one does the work, and several processes share one card or have one each."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from personalize import models
from personalize.core.guidance import Cond
from personalize.generation import sampling
from personalize.models import devices

pytestmark = pytest.mark.gpu
SETTINGS = [
    "token=zqv", "dtype=float32", "photos.min_size=16", "train.steps=3", "train.batch=3", "train.prior_batch=2",
    "prior.count=4", "prior.steps=2", "train.lr=1e-3",
]  # fmt: skip


def test_the_last_card_does_the_work(tiny_sd):
    last = torch.cuda.device_count() - 1
    before = [torch.cuda.memory_allocated(k) for k in range(last)]
    model = models.load_model(str(tiny_sd), device=f"cuda:{last}", dtype="bfloat16", say=lambda line: None)
    assert torch.cuda.current_device() == last
    cond: Cond = sampling.encode_texts(model, ["a dog"] * 2)
    out = model.predict(torch.randn(2, 4, 16, 16, device=model.device), torch.ones(2, device=model.device), cond)
    assert out.device.index == last and out.isfinite().all()
    assert before == [torch.cuda.memory_allocated(k) for k in range(last)], "something went to another card"


@pytest.mark.parametrize("device", ["cuda:0", "auto"])
def test_two_processes_give_the_weights_of_one(tiny_sd, photos, tmp_path, device):
    """By gloo where they share a card, by NCCL where each has one."""
    if device == "auto" and torch.cuda.device_count() < 2:
        pytest.skip("there is one card")
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        settings = [f"--set={text}" for text in (f"base={tiny_sd}", f"device={device}", *SETTINGS)]
        done = subprocess.run(
            [*launch, "-m", "personalize", "train", str(photos), "--class", "dog", *settings],
            cwd=folder, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(folder / done.stdout.strip() / "model" / "unet" / "diffusion_pytorch_model.safetensors"))
    base = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    moved, apart = (torch.cat([(w[k] - weights[0][k]).flatten() for k in base]) for w in (base, weights[1]))
    assert apart.norm() < 1e-2 * moved.norm()


def test_two_cards_with_shares_of_the_weights_give_the_weights_of_one(tiny_sd, photos, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one card")
    settings = [f"--set={text}" for text in (f"base={tiny_sd}", *SETTINGS, "train.batch=2", "train.sample_every=2")]
    weights = []
    for processes, kind in ((1, []), (2, ["--use_fsdp", "--fsdp_version", "2"])):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "personalize"]
        done = subprocess.run(
            [*launch, "train", str(photos), "--class", "dog", *settings],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (processes == 2) == ("its share of the weights" in done.stderr)
        weights.append(load_file(folder / done.stdout.strip() / "model" / "unet" / "diffusion_pytorch_model.safetensors"))
    base = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    moved, apart = (torch.cat([(w[k] - weights[0][k]).flatten() for k in base]) for w in (base, weights[1]))
    assert apart.norm() < 1e-2 * moved.norm()


def test_auto_is_the_first_card():
    assert devices.choose_device("auto") == torch.device("cuda", 0)
