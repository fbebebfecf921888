"""A float32 number as a bfloat16 and the 16 bits that it lacks: exact, and the upper half is a number to compute with.

The lower half is the distance from the bfloat16 to the number in bits of float32, -32768 to 32767. So the bfloat16 is the
nearest one; of two equally near ones it is the larger, where torch takes the even one.
"""

import torch
from torch import Tensor, nn

LOW = "low"  # the attribute of a bfloat16 parameter that holds its lower half (same shape, int16)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (...) -> bfloat16 (...), int16 (...). Every number but NaN comes back from `join` bit for bit."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)  # a GPU's own NaN would round up to -0
    low = bits.to(torch.int16)
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """bfloat16 (...), int16 (...) -> float32 (...): the inverse of `split`."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def add_low_half(p: nn.Parameter) -> None:
    """Gives a bfloat16 parameter its lower half, 0."""
    setattr(p, LOW, torch.zeros_like(p, dtype=torch.int16, requires_grad=False))


def master_weight(p: Tensor) -> Tensor:
    """The exact float32 value of a parameter that has a lower half, a copy; any other tensor as it is."""
    return join(p.detach(), getattr(p, LOW)) if hasattr(p, LOW) else p


@torch.no_grad()
def set_master_weight(p: nn.Parameter, value: Tensor) -> None:
    """Overwrites both halves of a parameter with a float32 value."""
    for part, half in zip((p, getattr(p, LOW)), split(value.to(p.device))):
        part.copy_(half)


def merge_halves(module: nn.Module) -> None:
    """Turns a module's split parameters into plain float32 ones."""
    for p in module.parameters():
        if hasattr(p, LOW):
            p.grad = None
            p.data = master_weight(p)
            delattr(p, LOW)
