"""Group normalization and SiLU as one operator for channels-last images, where torch runs three and a transpose.

B images, C channels, h w size, G groups.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.models.devices import dtype_for, is_fake

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
    if fault := triton_fault(x.device):
        return fault
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return "it is not channels-last"
    if x.dtype not in DTYPES or x.shape[1] % groups or not 0 < x.numel() < 2**31:
        return f"{x.dtype}, {tuple(x.shape)} in {groups} groups is beyond the kernel"
    return ""


@cache
def triton_fault(device: torch.device) -> str:
    """Why Triton's kernels are not for this device, or "" where they are; they are tried once, values and gradients.

    Triton compiles at its first launch, with a C compiler and Python's headers, which slim images lack. The first call is not
    one inside a recomputed block, whose hooks would keep what the trial saves; so `models.load_model` makes it.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from personalize.models.kernels.group_norm_triton import Fused

        ours = _trial(lambda x, w, b: Fused.apply(x, 4, w, b, 1e-5, True), device)
    except Exception as error:  # of a compiler, a driver or a file system, so of any kind
        return f"Triton failed, it needs a C compiler and Python's headers ({type(error).__name__}: {error})".splitlines()[0]
    plain = _trial(lambda x, w, b: eager_reference(x, 4, w, b, 1e-5), device)
    same = all((a - b).norm() < 0.02 * b.norm() for a, b in zip(ours, plain, strict=True))
    return "" if same else "Triton's kernel gives other numbers than torch"


@torch.inference_mode(False)
@torch.enable_grad()
def _trial(function: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
    """The output and the gradients of x, weight and bias, in the type that most runs compute in."""
    dtype = dtype_for(device, "auto", lambda line: None)
    numbers = torch.linspace(-1, 1, 2 * 32 * 8 * 8, device=device).square().view(2, 32, 8, 8)
    x = numbers.to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.linspace(low, 1, 32, device=device).requires_grad_() for low in (0.5, -1))
    out = function(x, weight, bias)
    return [out, *torch.autograd.grad(out, (x, weight, bias), x.detach())]
