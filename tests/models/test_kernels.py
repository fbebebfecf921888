"""The fused group normalization is torch's own, values and gradients; the kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_cases import SHAPES, inputs
from torch.nn import functional as F

from personalize.models.kernels.group_norm import group_norm_silu, why_not_fused

ROOT = Path(__file__).parents[2]
CHILD = """
import torch
from personalize.models.kernels.group_norm_triton import Fused
from kernel_cases import DTYPES, SHAPES, compare
for shape in SHAPES:
    for dtype, silu in [(torch.float32, False), *((dtype, True) for dtype in DTYPES)]:
        print(*compare(Fused.apply, shape, dtype, silu))
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
