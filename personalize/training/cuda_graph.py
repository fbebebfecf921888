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

    @contextmanager
    def warm(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # it is about steps not captured
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
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

    The first call fixes the counts and the inputs' names, shapes and types; a call with others runs eagerly. Where the
    capture fails every call does, and `say` is told why.
    """

    def __init__(self, run: Callable[[Inputs, tuple], Tensor], graphs: Graphs, *, say: Callable[[str], None]):
        self.run, self.graphs, self.say = run, graphs, say
        self.warmups_left = WARM
        self.signature: tuple | None = None
        self.buffers: Inputs = {}
        self.out: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: Inputs, counts: tuple) -> Tensor:
        signature = counts, {name: (value.shape, value.dtype) for name, value in inputs.items()}
        if self.signature is None:
            self.signature, self.buffers = signature, {name: torch.empty_like(value) for name, value in inputs.items()}
        if signature != self.signature:
            return self.run(inputs, counts)
        for name, value in inputs.items():
            self.buffers[name].copy_(value)
        if self.warmups_left:
            self.warmups_left -= 1
            with self.graphs.warm():
                self.out = self.run(self.buffers, counts)
        else:
            self.replay = self.replay or self._capture()
            with record_function("captured step"):
                self.replay()
        return self.out.clone()

    def _capture(self) -> Callable[[], None]:
        def function() -> None:
            self.out.copy_(self.run(self.buffers, self.signature[0]))

        try:
            return self.graphs.capture(function)
        except RuntimeError as error:
            cause = error
            while cause.__context__:  # the end of a capture fails too, and says only that something has failed
                cause = cause.__context__
            self.say(f"steps run eagerly: this one cannot be a CUDA graph ({str(cause).splitlines()[0]})")
            return function
