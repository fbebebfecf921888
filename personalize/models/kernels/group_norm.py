"""Group normalization and SiLU as one operator for channels-last images, where torch runs three and a transpose.

B images, C channels, h w size, G groups.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.models.devices import is_fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = True) -> Tensor:
    """(B,C,h,w) -> (B,C,h,w) of the same type: silu((x - mean) / sqrt(variance + eps) * weight + bias), by group of channels.

    Group normalization (Wu & He 1803.08494, eq. 7); weight, bias (C,); mean and variance are taken in float32. silu=False
    leaves the activation out. Channels-last CUDA tensors go through Triton, gradients too; all others do not.
    """
    if why_not_fused(x, groups):
        return eager_reference(x, groups, weight, bias, eps, silu=silu)
    from personalize.models.kernels import group_norm_triton

    return group_norm_triton.Fused.apply(x, groups, weight, bias, eps, silu)


def eager_reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = True) -> Tensor:
    """`group_norm_silu` by torch's own operators, on any device and in any layout."""
    out = F.group_norm(x, groups, weight, bias, eps)
    return (F.silu(out) if silu else out).to(x.dtype)


def why_not_fused(x: Tensor, groups: int) -> str:
    """Why the kernel cannot take this input, or "" where it can."""
    if not x.is_cuda:
        return f"it is on {x.device.type}"
    if torch.compiler.is_compiling():
        return "the compiler fuses the eager reference itself"
    if is_fake(x):
        return "it has no data"
    if not has_triton():
        return "Triton is not installed"
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return "it is not channels-last"
    if x.dtype not in DTYPES or x.shape[1] % groups or not 0 < x.numel() < 2**31:
        return f"{x.dtype}, {tuple(x.shape)} in {groups} groups is beyond the kernel"
    return ""


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None
