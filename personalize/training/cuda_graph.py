"""A step that is recorded once and replayed: one launch in place of thousands, on a CUDA device.

The first steps of a run warm up, as ordinary steps on a stream of their own. Then the step is recorded, which computes
nothing, and replayed. So step k is step k, and results are those of the eager step.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

WARM = 3  # steps, in which the optimizer makes its state and libraries choose their algorithms
Inputs = dict[str, Tensor]


class Recorder(Protocol):
    """How steps are warmed up and recorded. `CudaGraphs`, or in tests what only calls the function."""

    def warm(self):
        """A context in which the steps before the recording run."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records what the function does on the device, without doing it -> does it. RuntimeError where it cannot."""


class CudaGraphs:
    """torch's CUDA graphs, as its notes on their use ask: the same stream for all of the warm-up."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def warm(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # said of steps that are not recorded
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay


class CapturedStep:
    """`run(inputs, counts)` -> (n,) numbers, on buffers that each call's inputs are copied into.

    counts, like the inputs' names, shapes and types, are fixed by the first call; a call with others runs by itself, not
    recorded. Where recording fails all do, and `say` is told why.
    """

    def __init__(self, run: Callable[[Inputs, tuple], Tensor], recorder: Recorder, *, say: Callable[[str], None]):
        self.run, self.recorder, self.say = run, recorder, say
        self.left = WARM
        self.kind: tuple | None = None
        self.buffers: Inputs = {}
        self.out: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, given: Inputs, counts: tuple) -> Tensor:
        kind = counts, {name: (value.shape, value.dtype) for name, value in given.items()}
        if self.kind is None:
            self.kind, self.buffers = kind, {name: torch.empty_like(value) for name, value in given.items()}
        if kind != self.kind:
            return self.run(given, counts)
        for name, value in given.items():
            self.buffers[name].copy_(value)
        if self.left:
            self.left -= 1
            with self.recorder.warm():
                self.out = self.run(self.buffers, counts)
        else:
            self.replay = self.replay or self._recorded()
            with record_function("captured step"):
                self.replay()
        return self.out.clone()

    def _recorded(self) -> Callable[[], None]:
        def function() -> None:
            self.out.copy_(self.run(self.buffers, self.kind[0]))

        try:
            return self.recorder.record(function)
        except RuntimeError as error:
            self.say(f"steps run eagerly: this one cannot be a CUDA graph ({str(error).splitlines()[0]})")
            return function
