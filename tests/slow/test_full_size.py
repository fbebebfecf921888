"""Stable Diffusion 1.5 at its full size, random weights, in half precision on disk as users have it: two steps on the CPU.

What this proves is that memory and shapes hold; minutes of two cores, 11 GB of memory, 12 GB of disk.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import bases
import numpy as np
import pytest
import torch
from PIL import Image

from personalize.formats.safetensors_io import read_header
from personalize.models.lazy_imports import lazy_imports

MEMORY, DISK = 20e9, 20e9  # bytes that a machine must have, free in the case of the disk
PEAK = 14e9  # bytes that training may take
COMMON = ["photos.size=512", "prior.count=0", "train.steps=2", "device=cpu", "token=zqv", "draw.sampler=ddim"]
METHODS = {
    "lora": ["train.methods=lora"],
    "full": ["train.methods=full", "train.optimizer=adamw8bit", "train.gradient_checkpointing=true"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "sysconf") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < MEMORY,
        reason="needs 20 GB of memory",
    ),
]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd15")
    if shutil.disk_usage(root).free < DISK:
        pytest.skip("needs 20 GB of disk")
    yield full_size(root / "base")
    shutil.rmtree(root)


def full_size(folder):
    """860 M parameters in the U-Net, 123 M in the text encoder, 84 M in the VAE: 2.1 GB."""
    with lazy_imports():
        import diffusers
        from transformers import CLIPTextModel
    torch.manual_seed(0)
    words, cross = bases.tokenizer(pad="<|endoftext|>"), (bases.CROSS,) * 3
    parts = {
        "unet": bases.unet((320, 640, 1280, 1280), (*cross, bases.PLAIN), text=768, sample_size=64, attention_head_dim=8),
        "vae": bases.vae(512, widths=(128, 256, 512, 512), scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(bases.text(words, 768, layers=12, act="quick_gelu", vocab_size=49408)),
        "tokenizer": words,
        "scheduler": diffusers.PNDMScheduler(**bases.BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if hasattr(part, "parameters")}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}, "not the release's sizes"
    return bases.saved(diffusers.StableDiffusionPipeline, folder, parts, half=True, **bases.NO_CHECKER)


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (width, height) in enumerate([(1200, 900), (768, 1024)]):
        blocks = random.integers(0, 255, (height // 120 + 1, width // 120 + 1, 3), np.uint8)
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"IMG_{number}.jpg", quality=90)
    return folder


def personalize(*words, **environment):
    """(exit status, output, seconds, peak bytes) of a command in a process of its own, with two threads."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "personalize", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )  # fmt: skip
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, output, time.monotonic() - began, usage.ru_maxrss * 1024


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_at_full_size(sd15, camera, tmp_path, method):
    settings = [part for setting in [*COMMON, *METHODS[method]] for part in ("--set", setting)]
    status, output, seconds, peak = personalize(
        "train", camera, "--class", "dog", "--base", sd15, "--runs", tmp_path, *settings
    )
    assert status == 0, output
    print(f"\n{method}: {seconds:.0f} s, {peak / 1e9:.1f} GB at most\n{output}")
    assert peak < PEAK
    run = tmp_path / "zqv-dog"
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 10 for row in rows)
    state = shapes(run / "checkpoints" / "step-000002" / "state.safetensors")
    trained = {name: shape for name, shape in state.items() if name.startswith("trained/")}
    opened = opens_as_a_folder if method == "full" else fits_the_unet
    opened(run / "model", sd15, trained)
    shutil.rmtree(tmp_path)


def shapes(path):
    return {name: shape for name, (_, shape) in read_header(path)["tensors"].items()}


def fits_the_unet(result, base, trained):
    unet = shapes(base / "unet" / "diffusion_pytorch_model.safetensors")
    saved = shapes(result / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(trained) == 2 * 8 * 16
    for name, shape in saved.items():
        rows, columns = unet[layer(name)]
        assert shape == ((4, columns) if "lora_A" in name else (rows, 4)), name


def layer(name):
    """The weight that an adapter's tensor is for."""
    return name.removeprefix("unet.").rpartition(".lora_")[0] + ".weight"


def opens_as_a_folder(result, base, trained):
    with lazy_imports():
        import diffusers
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(result, torch_dtype=torch.bfloat16)
    unet = {name: tuple(p.shape) for name, p in pipeline.unet.named_parameters()}
    assert unet == shapes(base / "unet" / "diffusion_pytorch_model.safetensors") and len(trained) == len(unet)
    assert all(p.isfinite().all() for p in pipeline.unet.parameters())
    assert sorted(path.name for path in result.iterdir() if path.is_dir()) == [
        "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    ]  # fmt: skip
