"""An optimizer for parameters in two halves (see `core.halves`): it sees the exact float32 weights, a chunk at a time.

N numbers of a chunk, which are those of some parameters one after the other, as they lie in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from personalize.core import bf16_split

CHUNK = 1 << 23  # numbers: in float32, with their gradient and what is computed on the way, about 200 MB
SMALL = 4096  # numbers up to which bitsandbytes keeps a parameter's state in 32 bits, if it has it alone


class Chunk:
    """Some parameters, and the shell that the optimizer knows them by: empty but while it is open."""

    def __init__(self, params: list[nn.Parameter]):
        self.params, self.strides = params, [p.stride() for p in params]
        self.sizes = [p.numel() for p in params]
        self.low = torch.cat([_flat(getattr(p, bf16_split.LOW)) for p in params])
        for p, low in zip(params, self.low.split(self.sizes), strict=True):
            setattr(p, bf16_split.LOW, low.as_strided(p.shape, p.stride(), low.storage_offset()))
        self.shell = nn.Parameter(self.low.new_empty(0, dtype=torch.float32))

    def open(self) -> None:
        """The shell becomes the float32 weights (N,) with their gradient, and the parameters' own gradients are freed."""
        assert [p.stride() for p in self.params] == self.strides, "a layout changed, and the lower halves are in the old one"
        self.shell.data = bf16_split.joined(torch.cat([_flat(p) for p in self.params]), self.low)
        self.shell.grad = torch.cat([_flat(torch.empty_like(p).copy_(p.grad)) for p in self.params]).float()
        for p in self.params:
            p.grad = None

    def close(self) -> None:
        """The weights go back into the halves."""
        high, low = bf16_split.split(self.shell.detach())
        self.low.copy_(low)
        torch._foreach_copy_([_flat(p) for p in self.params], list(high.split(self.sizes)))
        self.shell.data, self.shell.grad = self.shell.data.new_empty(0), None


class SplitWeights:
    """The chunks of parameter groups; `groups` are the same with shells in place of parameters, for an optimizer."""

    def __init__(self, groups: list[dict], *, apart: bool):
        """apart: small parameters are chunks of their own."""
        chunks = [list(_chunks(group["params"], apart)) for group in groups]
        self.chunks = [chunk for some in chunks for chunk in some]
        self.groups = [{**group, "params": [c.shell for c in some]} for group, some in zip(groups, chunks, strict=True)]

    @torch.no_grad()
    def opened(self) -> Iterator[None]:
        """Opens one chunk after the other: a step of the optimizer in between updates that one alone."""
        for chunk in self.chunks:
            if any(p.grad is not None for p in chunk.params):
                for p in chunk.params:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                chunk.open()
                yield
                chunk.close()


def _chunks(params: list[nn.Parameter], apart: bool) -> Iterator[Chunk]:
    some: list[nn.Parameter] = []
    for p in sorted(params, key=lambda p: p.numel() < SMALL):
        if some and (sum(q.numel() for q in some) + p.numel() > CHUNK or (apart and p.numel() < SMALL)):
            yield Chunk(some)
            some = []
        some.append(p)
    if some:
        yield Chunk(some)


def _flat(x: Tensor) -> Tensor:
    """(...) -> (N,), its numbers as they lie in memory, no copy."""
    return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())
