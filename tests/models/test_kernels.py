"""The fused group normalization is torch's own, values and gradients; the kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_cases import SHAPES, inputs
from torch.nn import functional as F

from personalize import models
from personalize.models import devices, latent_diffusion
from personalize.models.kernels import group_norm
from personalize.models.kernels.group_norm import eager_reference, group_norm_silu, triton_fault, why_not_fused

ROOT = Path(__file__).parents[2]
CHILD = """
import torch
from personalize.models.kernels.group_norm import triton_fault
from personalize.models.kernels.group_norm_triton import Fused
from kernel_cases import DTYPES, SHAPES, compare
for shape in SHAPES:
    for dtype, silu in [(torch.float32, False), *((dtype, True) for dtype in DTYPES)]:
        print(*compare(Fused.apply, shape, dtype, silu))
assert triton_fault(torch.device("cpu")) == ""
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_torchs_operators_to_rounding():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 4 * len(SHAPES)
    print(done.stdout)


@pytest.mark.parametrize("silu", [True, False])
def test_on_the_cpu_it_is_torchs_own_bit_for_bit(silu):
    x, weight, bias, _ = inputs(SHAPES[0], torch.float32)
    expected = F.group_norm(x, 4, weight, bias, 1e-5)
    assert torch.equal(group_norm_silu(x, 4, weight, bias, 1e-5, silu=silu), F.silu(expected) if silu else expected)


def test_what_the_kernel_cannot_take_is_said():
    assert why_not_fused(torch.zeros(1, 8, 4, 4), 4) == "it is on cpu"


class Kernels(ModuleType):
    """A stand-in for the module of Triton's kernels, in which each call is `run`; counts them."""

    def __init__(self, run):
        super().__init__("group_norm_triton")
        self.calls, self.Fused = 0, SimpleNamespace(apply=self.apply)
        self.run = run

    def apply(self, x, groups, weight, bias, eps, silu):
        self.calls += 1
        return self.run(eager_reference(x, groups, weight, bias, eps, silu=silu))


def no_compiler(out):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.1 * dy


@pytest.mark.parametrize(
    "run, why",
    [
        (lambda out: out, ""),
        (no_compiler, "Triton failed, it needs a C compiler and Python's headers (RuntimeError: Failed to find C compiler."),
        (lambda out: 1.1 * out, "Triton's kernel gives other numbers than torch"),
        (lambda out: out * torch.nan, "Triton's kernel gives other numbers than torch"),
        (WrongGradient.apply, "Triton's kernel gives other numbers than torch"),
    ],
    ids=["works", "no compiler", "other numbers", "NaN", "other gradients"],
)
def test_triton_is_tried_once_and_what_it_cannot_do_is_said_when_a_base_is_loaded(monkeypatch, tiny_sd, run, why):
    kernels, said, gpu = Kernels(run), [], torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "personalize.models.kernels.group_norm_triton", kernels)
    monkeypatch.setattr(group_norm, "find_spec", lambda name: name)
    monkeypatch.setattr(group_norm, "triton_fault", cache(lambda device: triton_fault.__wrapped__(torch.device("cpu"))))
    monkeypatch.setattr(devices, "choose_device", lambda name: gpu)
    monkeypatch.setattr(devices, "dtype_for", lambda device, name, say: torch.float32)
    monkeypatch.setattr(latent_diffusion, "LatentDiffusion", lambda *arguments, **named: None)
    with torch.inference_mode():  # the trial has gradients all the same
        for _ in range(2):
            models.load_model(str(tiny_sd), device="cuda", say=said.append)
    assert said == 2 * [f"group norms run as torch's own operators, which are slower: {why}"] if why else said == []
    on_gpu = torch.empty(1, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert why_not_fused(on_gpu, 4) == why
    assert kernels.calls == 2, "once for cuda, once for meta"


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(group_norm, "find_spec", lambda name: None)
    assert triton_fault.__wrapped__(torch.device("cpu")) == "Triton is not installed"
