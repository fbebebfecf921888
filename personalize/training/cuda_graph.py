"""A step that is captured once as a CUDA graph and then replayed: one launch in place of thousands.

The first steps of a run are ordinary ones on a stream of their own, to warm up. Then the step is captured, which computes
nothing, and replayed. So step k is step k, and its results are those of the eager step.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

WARM = 3  # steps, in which the optimizer makes its state and libraries choose their algorithms
Inputs = dict[str, Tensor]


class Graphs(Protocol):
    """How steps are warmed up and captured. `CudaGraphs`, or in tests a class that only calls the function."""

    def warm(self):
        """A context in which the steps before the capture run."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Captures what the function does on the device, without doing it -> a function that does it.

        RuntimeError where that is not possible.
        """


class CudaGraphs:
    """torch's CUDA graphs, as its notes on their use ask: the same stream for all of the warm-up."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()  # of all graphs: no tensor of a step outlives it, and one replays at a time

    @contextmanager
    def warm(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # it is about steps not captured
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, pool = torch.cuda.CUDAGraph(), self.pool
        try:
            # torch's context leaves `self.stream` current where it fails, so another one is around it.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, stream=self.stream):
                function()
        except RuntimeError:
            # Before pytorch #180395 the allocator takes the capture for unended, and the next `empty_cache` dies of it.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        return graph.replay


class CapturedStep:
    """`run(inputs, counts)` -> (n,) numbers, on buffers into which each call's inputs are copied.

    Calls with other counts, or inputs of other names, shapes or types, are another graph: where photos keep their shape, one a
    bucket. Where a capture fails such calls run eagerly, and `say` is told why.
    """

    def __init__(self, run: Callable[[Inputs, tuple], Tensor], graphs: Graphs, *, say: Callable[[str], None]):
        self.run, self.graphs, self.say = run, graphs, say
        self.by_signature: dict[tuple, _OneGraph] = {}

    def __call__(self, inputs: Inputs, counts: tuple) -> Tensor:
        signature = counts, *((name, value.shape, value.dtype) for name, value in inputs.items())
        if signature not in self.by_signature:
            self.by_signature[signature] = _OneGraph(self, inputs, counts)
        return self.by_signature[signature](inputs)


class _OneGraph:
    """The calls of one signature: their buffers, and how they are replayed once they are captured."""

    def __init__(self, step: CapturedStep, inputs: Inputs, counts: tuple):
        self.step, self.counts = step, counts
        self.warmups_left = WARM
        self.buffers = {name: torch.empty_like(value) for name, value in inputs.items()}
        self.out: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        for name, value in inputs.items():
            self.buffers[name].copy_(value)
        if self.warmups_left:
            self.warmups_left -= 1
            with self.step.graphs.warm():
                self.out = self.step.run(self.buffers, self.counts)
        else:
            self.replay = self.replay or self._capture()
            with record_function("captured step"):
                self.replay()
        return self.out.clone()

    def _capture(self) -> Callable[[], None]:
        def function() -> None:
            self.out.copy_(self.step.run(self.buffers, self.counts))

        try:
            return self.step.graphs.capture(function)
        except RuntimeError as error:
            cause = error
            while cause.__context__:  # the end of a capture fails too, and says only that something has failed
                cause = cause.__context__
            self.step.say(f"steps run eagerly: this one cannot be a CUDA graph ({str(cause).splitlines()[0]})")
            return function
