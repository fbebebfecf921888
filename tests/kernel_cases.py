"""Inputs of the fused group normalization, and its errors beside those of torch's operators."""

import torch

from personalize.models.kernels.group_norm import eager_reference

SHAPES = [(2, 32, 8, 8, 4), (1, 96, 5, 7, 32), (3, 30, 1, 1, 3), (1, 130, 9, 3, 13), (1, 6, 65, 37, 2)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(shape, dtype, seed=0):
    """An image far from mean 0, its weight and bias, and a gradient from above."""
    B, C, h, w, _ = shape
    g = torch.Generator().manual_seed(seed)
    x = (3 + 2 * torch.randn(B, C, h, w, generator=g)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + 0.3 * torch.randn(C, generator=g), 0.3 * torch.randn(C, generator=g)
    return x, weight, bias, torch.randn(B, C, h, w, generator=g).to(dtype)


def everything(function, x, weight, bias, dy):
    """The output and the gradients of x, weight and bias."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


def off(ours, true):
    """The error's size over the true values' own."""
    return float((ours.double() - true).norm() / true.norm().clamp(min=1e-6))


def compare(fused, shape, dtype, silu):
    """Largest errors of the kernel and of torch's operators, each against float64."""
    given, groups, eps = inputs(shape, dtype), shape[-1], 1e-5
    true = everything(lambda x, w, b: eager_reference(x, groups, w, b, eps, silu=silu), *(t.double() for t in given))
    ours = everything(lambda x, w, b: fused(x, groups, w, b, eps, silu), *given)
    plain = everything(lambda x, w, b: eager_reference(x.float(), groups, w, b, eps, silu=silu).to(dtype), *given)
    assert ours[0].dtype == dtype and ours[1].dtype == dtype and ours[2].dtype == torch.float32
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    errors = [max(off(a, b) for a, b in zip(part, true, strict=True)) for part in (ours, plain)]
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # the interpreter cuts bfloat16 off
    assert errors[0] < max(limit, 1.5 * errors[1]), (shape, dtype, silu, errors)
    return shape, dtype, silu, *(f"{error:.1e}" for error in errors)
