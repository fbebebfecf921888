"""Split bf16 master weights (see `core.bf16_split`): the optimizer sees the exact float32 weights, a chunk at a time.

N numbers of a chunk: those of some parameters one after the other, as they lie in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from personalize.core import bf16_split

CHUNK = 1 << 23  # numbers: in float32, with their gradient and temporaries, about 200 MB
SMALL = 4096  # numbers up to which bitsandbytes keeps a parameter's state in 32 bits, if the parameter is alone


class Chunk:
    """Some parameters, and the float32 master that the optimizer knows them by: empty except while the chunk is open."""

    def __init__(self, params: list[nn.Parameter]):
        self.params, self.strides = params, [p.stride() for p in params]
        self.sizes = [p.numel() for p in params]
        self.low = torch.cat([flat(getattr(p, bf16_split.LOW)) for p in params])
        for p, low in zip(params, self.low.split(self.sizes), strict=True):
            setattr(p, bf16_split.LOW, low.as_strided(p.shape, p.stride(), low.storage_offset()))
        self.master = nn.Parameter(self.low.new_empty(0, dtype=torch.float32))

    def open(self) -> None:
        """Fills the master with the float32 weights (N,) and their gradient, and frees the parameters' own gradients."""
        assert [p.stride() for p in self.params] == self.strides, "a layout changed, and the lower halves are in the old one"
        self.master.data = bf16_split.join(torch.cat([flat(p) for p in self.params]), self.low)
        self.master.grad = torch.cat([flat(torch.empty_like(p).copy_(p.grad)) for p in self.params]).float()
        for p in self.params:
            p.grad = None

    def close(self) -> None:
        """Writes the weights back into both halves and empties the master."""
        high, low = bf16_split.split(self.master.detach())
        self.low.copy_(low)
        torch._foreach_copy_([flat(p) for p in self.params], list(high.split(self.sizes)))
        self.master.data, self.master.grad = self.master.data.new_empty(0), None


class SplitWeights:
    """The chunks of parameter groups; `groups` are the same groups with masters in place of parameters, for an optimizer."""

    def __init__(self, groups: list[dict], *, small_apart: bool):
        """small_apart: small parameters are chunks of their own."""
        chunks = [list(_chunks(group["params"], small_apart)) for group in groups]
        self.chunks = [chunk for part in chunks for chunk in part]
        self.groups = [{**group, "params": [c.master for c in part]} for group, part in zip(groups, chunks, strict=True)]

    @torch.no_grad()
    def open_chunks(self) -> Iterator[None]:
        """Opens one chunk after the other: a step of the optimizer in between updates that chunk alone."""
        for chunk in self.chunks:
            if any(p.grad is not None for p in chunk.params):
                for p in chunk.params:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                chunk.open()
                yield
                chunk.close()


def _chunks(params: list[nn.Parameter], small_apart: bool) -> Iterator[Chunk]:
    members: list[nn.Parameter] = []
    for p in sorted(params, key=lambda p: p.numel() < SMALL):
        if members and (sum(q.numel() for q in members) + p.numel() > CHUNK or (small_apart and p.numel() < SMALL)):
            yield Chunk(members)
            members = []
        members.append(p)
    if members:
        yield Chunk(members)


def flat(x: Tensor) -> Tensor:
    """(...) -> (N,): its numbers as they lie in memory, not copied."""
    return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())
