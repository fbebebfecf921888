"""`train --profile`: where a step goes, as a table, and a trace of a few steps, by torch.profiler.

The first steps warm up, the next few are traced, all others run as they always do and give the wall time. A traced step
computes the same bits. The parts of a step are marked with `record_function` where they are called.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from personalize.common.errors import UserError
from personalize.common.files import write_text, writing
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.training.run import TrainingRun

WAIT, TRACED = 7, 5  # steps: a graph is captured or a network compiled in the first
LEAST = 4  # steps: one before the trace, one in which the profiler warms up, one traced, one as it always is
PARTS = ("batch", "forward and loss", "backward", "clip and optimizer", "captured step")  # as `record_function` marks them


def require_steps(recipe: Recipe) -> None:
    """UserError for a run too short to profile."""
    if recipe.train.steps < LEAST:
        raise UserError(
            f"train.steps = {recipe.train.steps} is too few to profile, which takes {LEAST} at least. "
            "Give more, as in --steps 20, or leave --profile out."
        )


class StepProfiler:
    """torch's profiler over a few of a run's `steps`, and the clock over those after them."""

    def __init__(self, device: torch.device, steps: int):
        self.on_gpu = device.type == "cuda"
        wait, self.traced = min(WAIT, steps // 4), min(TRACED, steps // 4)
        self.before, self.done = wait + 1 + self.traced, 0
        # A GPU works behind the process, so it is waited for, and rarely: as rarely as the losses are read.
        self.lap = min(10, steps - self.before) if self.on_gpu else 1
        self.ends: list[float] = []
        self.torch = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu],
            schedule=schedule(wait=wait, warmup=1, active=self.traced, repeat=1),
        )

    def step_ended(self) -> None:
        self.done += 1
        self.torch.step()
        if self.done >= self.before and (self.done - self.before) % self.lap == 0:
            if self.on_gpu:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def wall(self) -> float:
        """Seconds of a step that is not traced, the median."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:])) / self.lap

    def parts(self) -> dict[str, float]:
        """Seconds of each part of a traced step, on the host; what no mark covers is the rest."""
        total = {
            event.key: event.cpu_time_total / 1e6 / self.traced for event in self.torch.key_averages() if event.cpu_time_total
        }
        seconds = {part: total[part] for part in PARTS if part in total}
        return seconds | {"rest": total["ProfilerStep*"] - sum(seconds.values())}

    def operators(self) -> str:
        """torch's own table of the operators that take most time: on a GPU its kernels."""
        most = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        return self.torch.key_averages().table(sort_by=most, row_limit=25, max_name_column_width=50)


@contextmanager
def profiled_steps(run: TrainingRun, start: int, screen: Terminal) -> Iterator[None]:
    """Inside this the run's steps from `start` on are profiled; at its end the table is written and the parts are printed."""
    steps = run.recipe.train.steps - start
    if not run.writes or steps < LEAST:
        if run.writes:
            screen.say(f"not profiled: {steps} steps are left, and it takes {LEAST} at least")
        yield
        return
    profiler = StepProfiler(run.data.model.device, steps)
    with profiler.torch:
        run.engine.step_ended = profiler.step_ended
        yield
    if len(profiler.ends) < 2:
        screen.say(f"not profiled: the run ended after {profiler.done} steps of {steps}")
        return
    _write(run, profiler)
    screen.say(f"where the {1e3 * profiler.wall():.1f} ms of a step go ({run.folder / 'profile' / 'profile.md'}):")
    parts = profiler.parts()
    for part, seconds in parts.items():
        screen.say(f"  {part:<22}{1e3 * seconds:8.1f} ms {seconds / sum(parts.values()):5.0%}")


def _write(run: TrainingRun, profiler: StepProfiler) -> None:
    """profile/: profile.md and trace.json.gz."""
    recipe, model, parts = run.recipe, run.data.model, profiler.parts()
    device = (
        torch.cuda.get_device_name(model.device) if profiler.on_gpu else f"{model.device}, {torch.get_num_threads()} threads"
    )
    subjects, priors = run.data.steps_per_batch
    traced = sum(parts.values())
    rows = "\n".join(f"| {part} | {1e3 * s:.2f} | {s / traced:.1%} |" for part, s in parts.items())
    page = f"""# Where a step goes

{", ".join(recipe.train.methods)} on {run.manifest["base"]}, {subjects} + {priors} images of \
{recipe.photos.size or model.size} px a step, {str(model.dtype).removeprefix("torch.")} on {device}, torch {torch.__version__}.

**{1e3 * profiler.wall():.1f} ms a step**, the median of steps that are not traced; {1e3 * traced:.1f} ms under the profiler.

| part, on the host | ms | share |
|---|---|---|
{rows}

Means of {profiler.traced} traced steps; a GPU works behind the host. Their time line is `trace.json.gz`: open it in
https://ui.perfetto.dev.

```
{profiler.operators()}```
"""
    with writing(run.folder / "profile") as temporary:
        temporary.mkdir()
        profiler.torch.export_chrome_trace(str(temporary / "trace.json.gz"))
        write_text(temporary / "profile.md", page)
