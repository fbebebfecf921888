"""`train --profile`: where a step goes, on one page, and a trace of a few steps.

The first steps warm up, the next few run under torch.profiler (trace, operators), the next between clocks (parts), all
others as they always do (wall time). Marks are put, from here, around what the loop calls: without --profile nothing is
there, and with it a step computes the same bits.
"""

import gzip
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, record_function

from personalize.common import distributed, run_folder
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.training import profile_page
from personalize.training.memory.counter import Counter
from personalize.training.profile_page import Profile
from personalize.training.run import TrainingRun

WARM = 7  # steps, in which a graph is recorded or a network compiled
LEAST = 4  # steps: one to warm up, one traced, one between clocks, one as it always is
LARGE = 25_000_000  # bytes, from where a trace is compressed
STEP, TEXTS = "step", "conditioning"
BATCH, FORWARD, LOSS, BACKWARD, UPDATE, WHOLE, REST = PARTS = (
    "batch: data and noise", "forward", "loss", "backward", "clip and optimizer", "the step in one piece", "rest",
)  # fmt: skip


class Mark(NamedTuple):
    """A stretch of a step, on the clock of `time.perf_counter`."""

    name: str
    began: float
    ended: float


class Windows(NamedTuple):
    """Steps that warm up, are traced and are clocked, in this order; all others run as they always do."""

    warm: int
    traced: int
    clocked: int


def windows(steps: int) -> Windows:
    """Each a quarter of the steps at most: of many, the eighth to the twelfth are traced."""
    quarter = steps // 4
    return Windows(min(WARM, quarter), min(5, quarter), min(8, quarter))


def require_steps(recipe: Recipe) -> None:
    """UserError for a run too short to profile."""
    if recipe.train.steps < LEAST:
        raise UserError(
            f"train.steps = {recipe.train.steps} is too few to profile, which takes {LEAST} at least. "
            "Give more, as in --steps 20, or leave --profile out."
        )


class Watch:
    """Follows the steps of this process: `marked` functions tell it what runs, and the end of a step moves it on."""

    def __init__(self, device: torch.device, steps: int):
        on_gpu = device.type == "cuda"
        self.sync: Callable[[], None] = _wait if on_gpu else lambda: None
        self.windows, self.done = windows(steps), 0
        # A GPU works behind the process, so it is waited for, and then rarely: as rarely as the losses are read.
        free = min(10, steps - sum(self.windows)) if on_gpu else 1
        self.lap, self.laps = 0, {"warm": 1, "traced": self.windows.traced, "clocked": 1, "free": free}
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu])
        self.marks: list[Mark] = []
        self.parts: list[dict[str, float]] = []
        self.walls: list[float] = []
        self.traced = 0.0
        self.since = time.perf_counter()

    @property
    def phase(self) -> str:
        """What the present step is for."""
        left = self.done
        for name, count in self.windows._asdict().items():
            if left < count:
                return name
            left -= count
        return "free"

    def marked(self, name: str, function: Callable) -> Callable:
        """The function, under a mark; the one of the whole step ends the step."""

        def call(*args, **kwargs):
            with self._mark(name):
                result = function(*args, **kwargs)
            if name == STEP:
                self._ended()
            return result

        return call

    def stop(self) -> None:
        """For a run that ends before its trace does."""
        if self.phase == "traced":
            self.profiler.stop()

    @contextmanager
    def _mark(self, name: str) -> Iterator[None]:
        if self.phase == "traced":
            with record_function(profile_page.OURS + name):
                yield
        elif self.phase == "clocked":
            began = self._now()
            yield
            self.marks.append(Mark(name, began, self._now()))
        else:
            yield

    def _ended(self) -> None:
        """A step is over. What lies between it and the one before, its batch too, is its own."""
        phase, size = self.phase, self.laps[self.phase]
        self.done, self.lap = self.done + 1, self.lap + 1
        if self.lap < size:
            return
        now = self._now()
        seconds = (now - self.since) / size
        if phase == "traced":
            self.profiler.stop()
            self.traced = seconds
        elif phase == "clocked":
            self.parts.append(split(self.marks, self.since, now))
            self.marks.clear()
        elif phase == "free":
            self.walls.append(seconds)
        if self.phase == "traced":
            self.profiler.start()
        self.lap, self.since = 0, self._now()

    def _now(self) -> float:
        self.sync()
        return time.perf_counter()

    def found(self, flops: int, ceiling: float) -> Profile:
        """What was seen, once a step has run as it always does."""
        medians = {part: statistics.median(step[part] for step in self.parts) for part in PARTS}
        never = {part for part in PARTS if not any(step[part] for step in self.parts)}
        on_gpu = ProfilerActivity.CUDA in self.profiler.activities
        return Profile(
            statistics.median(self.walls),
            {part: seconds for part, seconds in medians.items() if part not in never},
            self.traced,
            profile_page.operators(self.profiler.events(), self.windows.traced, on_gpu=on_gpu),
            windows=self.windows, free=len(self.walls) * self.laps["free"], flops=flops, ceiling=ceiling, on_gpu=on_gpu,
        )  # fmt: skip


def _wait() -> None:
    """For the GPU, unless what it is asked for is being recorded, when nobody may wait."""
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def split(marks: list[Mark], began: float, ended: float) -> dict[str, float]:
    """Seconds of each part of a step: of what is marked, and of what lies between marks.

    A step that is replayed as one piece has no backward inside that could be marked.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    (step,) = (mark for mark in marks if mark.name == STEP)
    inner = sorted((m for m in marks if m is not step and step.began <= m.began <= step.ended), key=lambda m: m.began)
    for mark in [*inner, *(mark for mark in marks if mark.name == BATCH)]:
        seconds[FORWARD if mark.name == TEXTS else mark.name] += mark.ended - mark.began
    if seconds[BACKWARD]:
        for a, b in pairwise(inner):
            if b.name == BACKWARD:  # a compiled network is not marked, and lies in between
                seconds[FORWARD if a.name == TEXTS else LOSS] += b.began - a.ended
        seconds[UPDATE] = step.ended - inner[-1].ended
    else:
        seconds[WHOLE] = step.ended - step.began - seconds[FORWARD]
    seconds[REST] = ended - began - sum(seconds.values())
    return seconds


@contextmanager
def watching(run: TrainingRun, start: int, screen: Terminal) -> Iterator[None]:
    """Inside this the run's steps from `start` on are profiled; at its end the page is written and the parts are said."""
    left = run.recipe.train.steps - start
    if not run.writes or left < LEAST:
        if run.writes:
            screen.say(f"not profiled: {left} steps are left, and it takes {LEAST} at least")
        yield
        return
    flops, watch = _flops(run, start), Watch(run.data.model.device, left)
    marks = (
        (run.data, "at", BATCH), (run.data, "cond", TEXTS), (run.data.model, "predict", FORWARD),
        (torch.autograd, "backward", BACKWARD), (run.engine, "step", STEP),
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(watch.stop)
        for owner, name, part in marks:
            stack.enter_context(patch.object(owner, name, watch.marked(part, getattr(owner, name))))
        yield
    if not watch.walls:
        screen.say(f"not profiled: the run ended after {watch.done} steps of {left}")
        return
    profile = watch.found(flops, ceiling(run.data.model.device, run.data.model.dtype))
    _write(run, watch, profile)
    for line in profile_page.words(profile, f"{run.folder / 'profile' / 'profile.md'}"):
        screen.say(line)


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices, the best of six."""
    side, taken = 8192 if device.type == "cuda" else 1024, []
    a = torch.randn(side, side, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    for _ in range(6):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        taken.append(time.perf_counter() - began)
    return 2 * side**3 / min(taken)


def _flops(run: TrainingRun, step: int) -> int:
    """Of forward and backward of a step, a multiply-add is 2. No weight and no randomness of the run changes."""
    if distributed.world_size() > 1:  # the others would have to compute it too
        return 0
    with Counter(run.data.model.device.type) as counter:
        run.engine.backward(run.data.at(step))
        run.engine.clear()
        return counter.lap().work.flops


def _write(run: TrainingRun, watch: Watch, profile: Profile) -> None:
    """profile/: profile.md and trace.json, or trace.json.gz where that is large."""
    recipe, device = run.recipe, run.data.model.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    subjects, priors = run.data.steps_per_batch
    about = (
        f"{', '.join(recipe.train.methods)} on {run.manifest['base']}, {subjects} + {priors} pictures of "
        f"{recipe.photos.size or run.data.model.size} px a step, {str(run.data.model.dtype).removeprefix('torch.')} on {on}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    )
    with run_folder.writing(run.folder / "profile") as temporary:
        temporary.mkdir()
        trace = temporary / "trace.json"
        watch.profiler.export_chrome_trace(str(trace))
        if trace.stat().st_size > LARGE:
            run_folder.write_bytes(temporary / "trace.json.gz", gzip.compress(trace.read_bytes(), 6))
            trace.unlink()
            trace = temporary / "trace.json.gz"
        run_folder.write_text(temporary / "profile.md", profile_page.page(profile, about, trace.name))
