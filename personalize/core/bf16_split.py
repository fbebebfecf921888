"""A float32 number as a bfloat16 and the 16 bits that it lacks: exact, and the upper half is a number to compute with.

The lower half counts, in bits of float32, from the bfloat16 to the number, -32768 to 32767. So the bfloat16 is the nearest
one; of two equally near it is the larger, where torch takes the even one.
"""

import torch
from torch import Tensor, nn

LOW = "low"  # the attribute of a bfloat16 parameter that holds its lower half (same shape, int16)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (...) -> bfloat16 (...), int16 (...). Every number but NaN comes back from `joined` bit for bit."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)  # a GPU's own NaN would round up to -0
    low = bits.to(torch.int16)
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The other way."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def halve(p: nn.Parameter) -> None:
    """Gives a bfloat16 parameter its lower half, 0."""
    setattr(p, LOW, torch.zeros_like(p, dtype=torch.int16, requires_grad=False))


def master(p: Tensor) -> Tensor:
    """The exact float32 value of a parameter that has a lower half, a copy; any other tensor is itself."""
    return joined(p.detach(), getattr(p, LOW)) if hasattr(p, LOW) else p


@torch.no_grad()
def put(p: nn.Parameter, value: Tensor) -> None:
    """Overwrites both halves by a float32 value."""
    for part, half in zip((p, getattr(p, LOW)), split(value.to(p.device))):
        part.copy_(half)


def unite(module: nn.Module) -> None:
    """Parameters that have a lower half become float32, and have none any more."""
    for p in module.parameters():
        if hasattr(p, LOW):
            p.grad = None
            p.data = master(p)
            delattr(p, LOW)
