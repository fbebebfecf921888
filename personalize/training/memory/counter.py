"""The memory estimate: memory and work of a run, counted by running it on fake tensors, which have shape, dtype and device
but no data.

A fake step is the real one: loss, backward, clipping and optimizer. So whatever changes it (a method, parts of a batch,
recomputed activations, another attention kernel) is counted, within seconds and without reading a weight.
"""

import gc
import weakref
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from personalize.models.devices import is_fake

aten = torch.ops.aten
# Bytes that a run takes beside its tensors. CPU: pages of the libraries' code and small blocks, measured 40 to 110 MB where
# malloc returns what is freed. CUDA: workspaces of cuBLAS, in torch's memory; the context, half a GB, is not included.
RUNTIME = {"cpu": 60_000_000, "cuda": 70_000_000}
_CURRENT: ContextVar["Counter"] = ContextVar("counter")
FAKE_NUMBERS = {torch.bool: True, torch.int64: 1, torch.int32: 1, torch.uint8: 1}


@dataclass(frozen=True)
class Work:
    """flops: of convolutions, products and attention, a multiply-add is 2; moved: bytes the rest reads and writes; calls."""

    flops: int = 0
    moved: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Counted:
    """One phase. peak, end: bytes alive at most and at its end; parts: what the peak is made of."""

    peak: int
    end: int
    parts: dict[str, int]
    work: Work


@dataclass(frozen=True)
class MemoryEstimate:
    """A run on one device, by its phases in their order; "step" is a step whose optimizer has its state."""

    device: str
    phases: dict[str, Counted]

    @property
    def peak(self) -> int:
        """Bytes on the device at most, above the memory after imports (CPU) or the context (CUDA)."""
        return self.phases[self.largest].peak + RUNTIME.get(self.device, 0)

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    def words(self) -> str:
        """The peak, the phase it is in and what it is made of, largest first, in GB."""
        parts = {**self.phases[self.largest].parts, "libraries": RUNTIME.get(self.device, 0)}
        shown = [f"{name} {size / 1e9:.2f}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 5e6]
        return f"{self.peak / 1e9:.2f} GB ({self.largest}): {', '.join(shown)}"


def estimate_memory(phases: Mapping[str, Callable[["Counter"], object]], *, device: str = "cpu") -> MemoryEstimate:
    """Runs the phases in their order on fake tensors; each leaves its results for the next.

    What "load" and "attach" make is called weights, the rest activations; see `Counter.watch` for the optimizer. Networks
    are made by `fake_networks`. Real tensors that were there before are taken as inputs and not counted.
    """
    with counting(device) as counter, _old_objects_aside():
        counted = {}
        for name, run in phases.items():
            counter.label = "weights" if name in ("load", "attach") else "activations"
            run(counter)
            gc.collect()  # modules are in reference cycles
            counted[name] = counter.lap()
    return MemoryEstimate(device, counted)


@contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Inside this the collector passes over what was there before: of the imported libraries alone it takes 0.3 s each time."""
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # else someone else wants it so
            gc.unfreeze()


@contextmanager
def counting(device: str = "cpu") -> Iterator["Counter"]:
    """Inside this, new tensors are fake, and those on "cpu" or "cuda" are counted. No random generator moves on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    original, nn.Module._apply = nn.Module._apply, _apply  # `to` and `float`; nothing public lets them convert fakes
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Counter(device) as counter:
            before = _CURRENT.set(counter)
            try:
                yield counter
            finally:
                _CURRENT.reset(before)
    finally:
        nn.Module._apply = original


def current_counter() -> "Counter":
    """The counter of the `counting` that this runs in."""
    return _CURRENT.get()


class Counter(TorchDispatchMode):
    """Follows each storage made under it on `device`, real or fake, until it is freed; and the work. Views count once.

    When a fake number is read (`item`, `bool`), the answer lets the step continue: True, 1, or 0.0 for the count of
    infinite gradients.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.label = device, "weights"
        self.now, self.peak, self.work = Tally(), Tally(), Tally()
        self._live: dict[int, tuple[str, int]] = {}
        self._unread: set[int] = set()
        self._mapping = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # what each `.device` of a fake tensor asks
            return func(*args, **kwargs)
        if func is aten.randperm.generator:  # an order of images is read as numbers, and must name those that there are
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and is_fake(args[0]):
            return FAKE_NUMBERS.get(args[0].dtype, 0.0)
        moves = not (func.is_view or func is aten._unsafe_view.default)
        used = _tensors((args, kwargs)) if moves else []
        self._read(used)
        before = self.now.copy()
        out = func(*args, **kwargs)
        made = _tensors(out)
        self.see(made)
        scratch = SCRATCH.get(func._schema.name)
        if scratch and self.device == used[0].device.type == "cpu":
            self._reach(before, scratch(made, *args))
        if moves:
            self.work["calls"] += 1
            if count := FLOPS.get(func._overloadpacket):
                self.work["flops"] += count(*args, **kwargs, out_val=out)
            else:
                self.work["moved"] += sum(t.nbytes for t in used + made)
        return out

    def watch(self, optimizer: Optimizer, params: Iterable[Tensor] = ()) -> None:
        """Labels this optimizer's state "optimizer", and the gradients of its or these parameters "gradients"."""

        def before_step(*_) -> None:
            self.label = "optimizer"

        def after_step(*_) -> None:
            self.label = "activations"

        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(after_step)
        for p in params or [p for group in optimizer.param_groups for p in group["params"]]:
            p.register_post_accumulate_grad_hook(lambda p: self.rename(p.grad, "gradients"))

    def lap(self) -> Counted:
        """What was counted since the last lap."""
        counted = Counted(self.peak.total(), self.now.total(), dict(+self.peak), Work(**self.work))
        self.peak, self.work = self.now.copy(), Tally()
        return counted

    @contextmanager
    def mapping(self) -> Iterator[None]:
        """Tensors made inside are in a mapped file: each takes memory from when it is first used."""
        self._mapping = True
        try:
            yield
        finally:
            self._mapping = False

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Counts these tensors from now on, under the present label."""
        for tensor in tensors:
            if tensor.device.type != self.device or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._live[key] = self.label, storage.nbytes()
                weakref.finalize(storage, self._free, key)
                self._unread.add(key)
                if not self._mapping:
                    self._read([tensor])

    def _read(self, tensors: list[Tensor]) -> None:
        if self._mapping or not self._unread:
            return
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
            if key in self._unread:
                self._unread.remove(key)
                label, size = self._live[key]
                self.now[label] += size
                self._reach(self.now, 0)

    def _reach(self, held: Tally, more: int) -> None:
        if held.total() + more > self.peak.total():
            self.peak = held + Tally(kernels=more)

    def _free(self, key: int) -> None:
        label, size = self._live.pop(key)
        if key in self._unread:
            self._unread.remove(key)
        else:
            self.now[label] -= size

    def rename(self, tensor: Tensor, label: str) -> None:
        """Counts a tensor under another label from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            old, size = self._live[key]
            self._live[key] = label, size
            if key not in self._unread:
                self.now[old] -= size
                self.now[label] += size


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS = flop_registry | {  # torch's own table lacks the CPU's kernels
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _convolution(made: list[Tensor], x: Tensor, weight: Tensor, *_) -> int:
    """Bytes that oneDNN holds at once, results included: input and weight in its own layout, and the output."""
    return x.nbytes + weight.nbytes + made[0].nbytes


def _convolution_backward(made: list[Tensor], grad: Tensor, x: Tensor, weight: Tensor, *rest) -> int:
    """The gradient of the input is computed first and stays; then that of the weight, in oneDNN's layout, then in torch's."""
    of_input, of_weight, _ = rest[-1]
    kept = x.nbytes if of_input else 0
    first = kept + grad.nbytes + weight.nbytes if of_input else 0
    second = kept + max(x.nbytes + grad.nbytes + weight.nbytes, 2 * weight.nbytes) if of_weight else 0
    return max(first, second)


def _adam8bit(made: list[Tensor], name: str, grad: Tensor, *_) -> int:
    """bitsandbytes on a CPU unpacks both moments, and computes with four copies more."""
    return 6 * 4 * grad.numel()


# What the CPU's kernels hold beside their arguments; oneDNN's measured at seven shapes of Stable Diffusion, AVX-512.
SCRATCH = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "bitsandbytes::optimizer_update_8bit_blockwise": _adam8bit,
}


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of nn.Module's own (`to`, `float`, …), which refuses fake parameters that have a weak reference."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for p in module._parameters.values():
        if p is not None:
            p.data = fn(p.data)
    module._buffers.update({name: None if b is None else fn(b) for name, b in module._buffers.items()})
    return module
