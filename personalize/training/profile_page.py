"""The page that `train --profile` writes: parts of a step, operators in words, and what of it a person should look at."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

OURS = "personalize: "  # before the names of our own marks in a trace
# Operators of the CPU and kernels of GPUs in words, by the first pattern found in their name.
KINDS = {
    "clip and optimizer": r"adam|optimizer|foreach|multi_tensor|vector_norm|accumulategrad|lerp",
    "attention": r"attention|scaleddotproduct|flash|fmha|sdpa|softmax",
    "convolution": r"conv(?!ert)|nchwtonhwc|nhwctonchw|fprop|dgrad|wgrad|im2col|col2im",
    "normalization": r"norm|welford|rowwisemoments",
    "matrix products": r"gemm|cutlass|nvjet|xmma|splitk|cublas|(?<!bi)linear|matmul|\b(add|badd)?b?mm(\b|backward)",
    "copies and views": (
        r"copy|memcpy|memset|clone|contiguous|cat\b|catarray|fill|zero|empty|view|reshape|transpose"
        r"|permute|expand|slice|select|index|gather|stride|squeeze|narrow|split|detach|resize|upsample|::to?\b|\btbackward"
    ),
    "element-wise": (
        r"[sg]elu|silu|sigmoid|tanh|mul|add|sub|div|pow|square|sqrt|exp|log|sin\b|cos\b|neg|sum|mean|max|min|elementwise"
        r"|reduce|where|clamp|abs|loss|triton"
    ),
    "other": "",
}


class Row(NamedTuple):
    """Operators of one kind: seconds and calls a step, and the name that most of the time went to."""

    kind: str
    seconds: float
    calls: float
    largest: str


@dataclass(frozen=True)
class Profile:
    """What was found. Seconds are of one step.

    wall: the median of `free` steps that nothing measured; parts: of the `clocked` ones, by name; traced: under the
    profiler, which slows; flops: of forward and backward, 0 if unknown; ceiling: FLOP/s of a large matrix product.
    """

    wall: float
    parts: Mapping[str, float]
    traced: float
    operators: Sequence[Row]
    windows: Sequence[int]  # steps: warm, traced, clocked
    free: int
    flops: int
    ceiling: float
    on_gpu: bool


def kind_of(name: str) -> str:
    """The kind of an operator or kernel."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def operators(events: Sequence, steps: int, *, on_gpu: bool) -> list[Row]:
    """Rows from the events of torch's profiler, most time first: of a GPU its kernels, else each operator's own time.

    An operator that calls others of its kind is one call.
    """
    seconds, calls, names = Counter(), Counter(), Counter()
    kinds = {name: kind_of(name) for name in {event.name for event in events}}
    for event in events:
        # Annotations hold operators, and a GPU shows them a second time among its kernels.
        if event.is_user_annotation or event.name.startswith((OURS, "Optimizer.")):
            continue
        if on_gpu == (event.device_type.name == "CPU"):
            continue
        kind, parent = kinds[event.name], event.cpu_parent
        own = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6 / steps
        seconds[kind] += own
        names[kind, event.name] += own
        calls[kind] += (parent is None or kinds[parent.name] != kind) / steps
    largest = {kind: name for (kind, name), _ in reversed(names.most_common())}
    return [Row(kind, taken, calls[kind], largest[kind]) for kind, taken in seconds.most_common()]


def words(profile: Profile, file: str) -> list[str]:
    """The parts, for the terminal."""
    total = sum(profile.parts.values())
    lines = [f"where the {1e3 * profile.wall:.1f} ms of a step go ({file}):"]
    return lines + [f"  {name:<22}{1e3 * s:8.1f} ms {s / total:5.0%}" for name, s in profile.parts.items()]


def page(profile: Profile, about: str, trace: str) -> str:
    """profile.md. about: what ran on what; trace: the trace's file."""
    warm, traced, clocked = profile.windows
    total = sum(profile.parts.values())
    waits = " The GPU is waited for at each clock, so nothing overlaps as it does else." if profile.on_gpu else ""
    lines = [
        "# Where a step goes", "", about, "",
        f"**{1e3 * profile.wall:.1f} ms a step**, the median of {profile.free} steps that nothing measured.",
        *_work(profile), "", *_heading("part", "ms", "share"),
        *(f"| {name} | {1e3 * s:.2f} | {s / total:.1%} |" for name, s in profile.parts.items()),
        f"| all | {1e3 * total:.2f} | |", "",
        f"Medians of {clocked} steps with a clock at each part's ends.{waits}", "",
        *_heading("what it computes", "ms", "share", "calls", "most of it"), *_operators(profile), "",
        f"A mean of {traced} steps after {warm} to warm up, under torch.profiler: {1e3 * profile.traced:.1f} ms a step, for it "
        f"takes time at every operator. Their order on a time line: `{trace}`, to open in https://ui.perfetto.dev.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _work(profile: Profile) -> list[str]:
    if not profile.flops:
        return []
    pace = profile.flops / profile.wall
    return [
        f"Forward and backward are {_si(profile.flops)}FLOP: {_si(pace)}FLOP/s, {pace / profile.ceiling:.0%} of the "
        f"{_si(profile.ceiling)}FLOP/s of a large matrix product here."
    ]


def _operators(profile: Profile) -> list[str]:
    rows = [
        f"| {kind} | {1e3 * seconds:.2f} | {seconds / profile.traced:.1%} | {calls:.0f} | `{largest[:60]}` |"
        for kind, seconds, calls, largest in profile.operators
    ]
    left = profile.traced - sum(row.seconds for row in profile.operators)
    between = "no kernel running" if profile.on_gpu else "Python, and the profiler itself"
    return [*rows, f"| {between} | {1e3 * left:.2f} | {left / profile.traced:.1%} | | |"]


def _heading(*titles: str) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def _si(value: float) -> str:
    power, letter = next((p, x) for p, x in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if value >= p or p == 1)
    return f"{value / power:.3g} {letter}"
