"""Blocks of a frozen U-Net that wait in the host's memory and are on the device for their turn only.

While a block computes, its modules hold copies of their matrices on the device, and the next block's are on their way on
a second stream. So two blocks are there at most, in a pass forward and, computed again for its gradient, backward. What
trains stays on the device, and so do vectors, which are few numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from personalize.models.devices import is_fake


@dataclass(frozen=True)
class Fetched:
    """A block's copies on the device, and what says that they have arrived."""

    copies: list[nn.Parameter]
    arrived: Any = None


class Transfers(Protocol):
    """How copies are made beside the computation: `SideStream`, or `Directly`."""

    def fetch(self, waiting: list[nn.Parameter], device: torch.device) -> Fetched:
        """Begins to copy to the device, and does not wait."""

    def use(self, fetched: Fetched) -> None:
        """What is computed from here on waits for these copies; their memory is kept until it is done."""

    def mark(self) -> Any:
        """A mark behind all that was computed so far."""

    def wait(self, mark: Any) -> None:
        """Holds up the host until what is before the mark is computed, and so the memory of earlier copies is free."""


class Directly:
    """One thing after the other, on a CPU and with fake tensors."""

    def fetch(self, waiting: list[nn.Parameter], device: torch.device) -> Fetched:
        return Fetched(_copies(waiting, device))

    def use(self, fetched: Fetched) -> None:
        pass

    def mark(self) -> None:
        pass

    def wait(self, mark: None) -> None:
        pass


class SideStream:
    """A CUDA stream that copies pinned memory while the current one computes."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def fetch(self, waiting: list[nn.Parameter], device: torch.device) -> Fetched:
        with torch.cuda.stream(self.stream):
            return Fetched(_copies(waiting, device), self.stream.record_event())

    def use(self, fetched: Fetched) -> None:
        computes = torch.cuda.current_stream()
        computes.wait_event(fetched.arrived)
        for copy in fetched.copies:
            copy.record_stream(computes)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream().record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


class Offload:
    """The waiting matrices of a network's blocks, which are given in the order of a pass."""

    def __init__(self, network: nn.Module, blocks: list[nn.Module], device: torch.device):
        self.network, self.device = network, device
        plain = device.type != "cuda" or is_fake(next(network.parameters()))
        self.transfers: Transfers = Directly() if plain else SideStream()
        self.numbers = {block: i for i, block in enumerate(blocks)}
        self.waiting = [_matrices(block) for block in blocks]  # of each block: where a matrix belongs, and the matrix
        self.fetched: dict[int, Fetched] = {}  # by a block's number
        self.latest = -1  # number of the block that computed last
        for part in [] if plain else self.waiting:
            for _, _, p in part:
                p.data = p.data.pin_memory()  # only from there a copy does not hold up the host
        self.settle()

    def settle(self) -> None:
        """Moves to the device all that does not wait: also what a method has added to the blocks, or trains in them."""
        self.waiting = [[place for place in part if not place[2].requires_grad] for part in self.waiting]
        waits = {id(p) for part in self.waiting for _, _, p in part}
        for module in self.network.modules():
            for p in module._parameters.values():
                if p is not None and id(p) not in waits:
                    p.data = p.data.to(self.device)
            module._buffers.update({k: None if b is None else b.to(self.device) for k, b in module._buffers.items()})

    def call(self, function: Callable, block: nn.Module, *inputs: Any) -> Any:
        """`function(block, *inputs)` with the block's matrices on the device; the next block's are fetched meanwhile."""
        number = self.numbers[block]
        before = self.transfers.mark()
        self.fetched = {k: v for k, v in self.fetched.items() if k == number}  # another one was guessed wrong
        if number not in self.fetched:
            self.fetched[number] = self._fetch(self.waiting[number])
        following = self._following(number)
        try:
            with self._placed(self.waiting[number], self.fetched[number]):
                return function(block, *inputs)
        finally:  # recomputing a block ends with an exception as soon as all that its gradient needs is there
            self.latest = number
            # Here, where the device has this block to do, and not before: else the host would fetch far ahead of it.
            self.transfers.wait(before)
            if following is not None:
                self.fetched[following] = self._fetch(self.waiting[following])
            del self.fetched[number]

    def call_alone(self, function: Callable, part: nn.Module, *inputs: Any) -> Any:
        """`function(part, *inputs)` for a part of a block, of which only this part is fetched, and nothing ahead."""
        inside = set(part.modules())
        places = [place for block in self.waiting for place in block if place[0] in inside]
        before = self.transfers.mark()
        with self._placed(places, self._fetch(places)):
            out = function(part, *inputs)
        self.transfers.wait(before)
        return out

    def _following(self, number: int) -> int | None:
        """The block after this one: the next of a pass forward, or backward the one before; None at both ends."""
        backward = number <= self.latest and number > 0
        following = number - 1 if backward else number + 1
        ended = following == len(self.waiting) or (number == 0 and self.latest == 1)
        return None if ended else following

    def _fetch(self, places: list) -> Fetched:
        return self.transfers.fetch([p for _, _, p in places], self.device)

    @contextmanager
    def _placed(self, places: list, fetched: Fetched) -> Iterator[None]:
        self.transfers.use(fetched)
        for (module, name, _), copy in zip(places, fetched.copies, strict=True):
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, p in places:
                module._parameters[name] = p


def _matrices(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in block.modules() for name, p in m._parameters.items() if p is not None and p.ndim > 1]


def _copies(waiting: list[nn.Parameter], device: torch.device) -> list[nn.Parameter]:
    """Ordinary tensors also where images are drawn, for the next step may be the first to use them."""
    with torch.inference_mode(False), torch.no_grad():
        here: list[Tensor] = [torch.empty_like(p, device=device).copy_(p, non_blocking=True) for p in waiting]
        return [nn.Parameter(p, requires_grad=False) for p in here]
