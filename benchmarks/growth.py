"""How a run's time and memory grow with steps, photos, class pictures, resolution and batch; and drawing with its own.

    python -m benchmarks.growth                                 on stdout
    python -m benchmarks.growth --write docs/benchmarks.md      also into that page

Toyland on this CPU. Each point is a training in a process of its own, without choosing; class pictures are drawn once,
before. Exit status 1 where memory grows with steps, or a step's time with steps, photos or class pictures. Linux only.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.memory import status
from personalize.common.terminal import Terminal

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- growth -->", "<!-- /growth -->")
TITLE = "Cost grows as it should"
SETTINGS = [
    "base=toyland", "class_word=dog", "device=cpu", "dtype=float32", "choose.every=0", "photos.hold_out=0",
    "train.text_encoder=false", "train.checkpoint_every=0",
]  # fmt: skip
SKIP = 3  # steps at the start that say nothing of the later ones
STEP_MORE, MEMORY_MORE = 0.15, 0.05  # by which what must not grow may seem to
LINEAR_MORE = 1.1  # and by how much over the line what may grow linearly
START_NOISE = 0.5  # s, between the starts of two processes
PEOPLE = 1_005_000  # seed of the photographed subject, among those that pretraining never uses
FRAME = 128  # px, edge of the photos


@dataclass(frozen=True)
class RunConfig:
    """One training. batch: photos in a step, and as many class pictures; twice the photos where there are none."""

    steps: int = 50
    photos: int = 5
    class_images: int = 100
    size: int = 64
    batch: int = 1


@dataclass(frozen=True)
class Measurement:
    """start: seconds from the start of the process to the first step; step: median seconds; end_memory: bytes after the last
    step, where what leaks has gathered; peak: bytes at most, which may be of another phase.
    """

    start: float
    step: float
    end_memory: float
    peak: float


SERIES: dict[str, tuple[str, Sequence[int], RunConfig]] = {  # what grows: (its field, values, the rest)
    "steps": ("steps", (50, 100, 200, 400), RunConfig()),
    "photos": ("photos", (3, 5, 20, 80), RunConfig()),
    "class images": ("class_images", (0, 25, 100), RunConfig()),
    "edge, px": ("size", (64, 96, 128), RunConfig(class_images=0)),
    "photos a step": ("batch", (1, 2, 4, 8), RunConfig()),
}
CONSTANT = ("steps", "photos", "class images")  # where a step's time and the memory must stay
DRAWN = {"images": [(1, 20), (4, 20), (16, 20), (64, 20)], "sampling steps": [(16, 10), (16, 20), (16, 50)]}


class Clock(Terminal):
    """Shows nothing, and keeps when each long piece of work began and moved on, and the memory when it last did, bytes."""

    def __init__(self):
        super().__init__(quiet=True)
        self.times: dict[str, list[float]] = {}
        self.end_memory = 0

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
        times = self.times[title] = [time.monotonic()]

        def advance(n: int = 1, note: str = "") -> None:
            times.append(time.monotonic())
            self.end_memory = status("VmRSS")

        yield advance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown page that the section goes into")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job, arguments = options.child
        print(json.dumps(JOBS[job](**json.loads(arguments))))
        return
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        good, lines = measure(Path(name))
    print("\n".join(lines))
    if options.write:
        write(options.write, lines)
    sys.exit(0 if good else 1)


def measure(work: Path) -> tuple[bool, list[str]]:
    """Whether nothing grows that must not, and the section's lines."""
    from benchmarks.machine import machine

    lines = [f"`python -m benchmarks.growth`, {time.strftime('%Y-%m-%d')}, {machine()}. Full U-Net of Toyland, float32;"]
    lines += ["what is not named is 50 steps of 1 + 1 pictures, 5 photos, 100 class pictures, 64 px."]
    configs = {
        name: [dataclasses.replace(rest, **{field: value}) for value in values]
        for name, (field, values, rest) in SERIES.items()
    }
    photograph(work / "photos", max(config.photos for series in configs.values() for config in series))
    count = max(config.class_images for series in configs.values() for config in series)
    prior_result = child("prior", {"folder": str(work / "prior"), "count": count}, work)
    lines += [
        "",
        f"Class pictures: {count} in {prior_result['seconds']:.1f} s, {count / prior_result['seconds']:.1f} a second.",
    ]
    measurements: dict[RunConfig, Measurement] = {}  # the point where the series meet is measured once
    good = True
    for name, series in configs.items():
        for config in series:
            if config not in measurements:
                arguments = {"config": dataclasses.asdict(config), "start": time.monotonic()}
                measurements[config] = Measurement(**child("train", arguments, work))
                print(f"{name}: {config} {measurements[config]}", file=sys.stderr, flush=True)
        passed, section_lines = section(name, SERIES[name][1], [measurements[config] for config in series])
        lines += ["", *section_lines]
        good = good and passed
    return good, [*lines, "", *drawing(child("draw", {"jobs": sum(DRAWN.values(), [])}, work)["seconds"])]


def child(job: str, arguments: dict, work: Path) -> dict:
    """`job` in a process of its own, which finds photos and class pictures in `work`."""
    command = [sys.executable, "-m", "benchmarks.growth", "--child", job, json.dumps({**arguments, "work": str(work)})]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(process.stdout.splitlines()[-1])


def photograph(folder: Path, count: int) -> None:
    """Photos of one dog, in as many scenes."""
    from personalize.toyland.world import scenes
    from personalize.toyland.world.render import draw_scene

    folder.mkdir()
    seed = scenes.HELD_OUT + PEOPLE
    subject = scenes.sample_subject(seed, "dog")
    for k in range(count):
        draw_scene(scenes.sample_scene(seed + k, subject=subject), FRAME)[0].save(folder / f"{k:03d}.png")


def prior(work: str, folder: str, count: int) -> dict:
    import personalize

    screen = Clock()
    personalize.prior("dog", settings=[*SETTINGS, f"prior.count={count}"], folder=Path(folder), screen=screen)
    times = screen.times["class images"]
    return {"seconds": times[-1] - times[0]}


def train(work: str, config: dict, start: float) -> dict:
    import personalize

    run_config, screen = RunConfig(**config), Clock()
    photos = sorted(Path(work, "photos").glob("*.png"))[: run_config.photos]
    batch = (
        run_config.batch if run_config.class_images else 2 * run_config.batch
    )  # as many images in a step as with class images
    settings = [
        *SETTINGS, f"train.steps={run_config.steps}", f"train.batch={batch}", f"prior.count={run_config.class_images}",
        f"photos.size={run_config.size}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=work) as runs:
        personalize.train(
            [str(photo) for photo in photos], settings=settings, runs=Path(runs), prior_folder=Path(work, "prior"),
            screen=screen,
        )  # fmt: skip
    times = screen.times["training"]
    steps = [end - begin for begin, end in zip(times, times[1:])]
    measurement = Measurement(times[0] - start, statistics.median(steps[SKIP:]), screen.end_memory, status("VmHWM"))
    return dataclasses.asdict(measurement)


def draw(work: str, jobs: list[tuple[int, int]]) -> dict:
    """Seconds for each (pictures, sampling steps), with the base in memory, until the files are written."""
    import personalize
    from personalize import models

    model = models.load_model("toyland", device="cpu", dtype="float32", say=lambda line: None)
    models.load_model, seconds = lambda base, **options: model, []
    for count, steps in [(1, 2), *jobs]:  # the first one warms up
        settings = [*SETTINGS, f"draw.count={count}", f"draw.steps={steps}"]
        start = time.monotonic()
        personalize.generate(["a dog"], base="toyland", settings=settings, out=Path(work, "images"))
        seconds.append(time.monotonic() - start)
    return {"seconds": seconds[1:]}


JOBS = {"prior": prior, "train": train, "draw": draw}


def section(name: str, values: Sequence[int], measurements: Sequence[Measurement]) -> tuple[bool, list[str]]:
    """Whether all that is demanded of a series holds; its table, slopes, and what it is checked for."""
    titles = (name, "to the first step, s", "ms/step", "after the last step, MB", "peak, MB")
    lines = [f"**{name.capitalize()}**", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for x, f in zip(values, measurements, strict=True):
        lines.append(f"| {x} | {f.start:.2f} | {1e3 * f.step:.1f} | {f.end_memory / 1e6:.0f} | {f.peak / 1e6:.0f} |")
    causes = [x * x / 1e3 for x in values] if name == "edge, px" else values
    start, step, peak = (slope(causes, [getattr(f, part) for f in measurements]) for part in ("start", "step", "peak"))
    unit = {"edge, px": "1000 pixels", "photos a step": "photo a step"}.get(name, name.removesuffix("s"))
    if name == "photos a step":
        unit += " and its class picture"
    lines += ["", f"For each {unit}: start {1e3 * start:+.2f} ms, step {1e3 * step:+.3f} ms, peak {peak / 1e6:+.3f} MB."]
    steps, end_memory, peaks, starts = (
        [getattr(f, part) for f in measurements] for part in ("step", "end_memory", "peak", "start")
    )
    if name in CONSTANT:
        checks = [
            grown("ms/step", steps, STEP_MORE, gate=True),
            grown("memory after the last step", end_memory, MEMORY_MORE, gate=name == "steps"),
            grown("peak memory", peaks, MEMORY_MORE, gate=name == "steps"),
            ("start: linear or better", bends(causes, starts, START_NOISE) <= 1.5, False),
        ]
    else:
        checks = [line("ms/step", causes, steps), line("peak memory", causes, peaks)]
    lines += [f"- {text}: {'yes' if holds else '**no**'}" for text, holds, _ in checks]
    return all(holds for _, holds, gate in checks if gate), lines


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def grown(name: str, y: Sequence[float], limit: float, *, gate: bool) -> tuple[str, bool, bool]:
    """(what must be, whether it holds, whether it is demanded) of a measure that must stay."""
    growth = y[-1] / y[0] - 1
    return f"{name} stays within {limit:.0%}, from first to last {growth:+.1%}", growth <= limit, gate


def line(name: str, x: Sequence[float], y: Sequence[float]) -> tuple[str, bool, bool]:
    """The same of a measure that may grow as its cause does."""
    text = f"{name} grows linearly or less: × {y[-1] / y[0]:.2f} for × {x[-1] / x[0]:.2f}"
    return text, y[-1] / y[0] <= LINEAR_MORE * x[-1] / x[0], False


def bends(x: Sequence[float], y: Sequence[float], noise: float) -> float:
    """The rise to the last point over what the points before it foretell; what is below the noise counts as noise."""
    predicted = max(y[-2] - y[0], noise) * max(1.0, (x[-1] - x[0]) / (x[-2] - x[0]))
    return (y[-1] - y[0]) / predicted


def drawing(seconds: Sequence[float]) -> list[str]:
    """The tables of drawing."""
    lines, seconds = ["**Drawing**, the base in memory, guidance on", ""], list(seconds)
    lines += ["| pictures | sampling steps | s | ms a picture and step |", "|---|---|---|---|"]
    for jobs in DRAWN.values():
        for count, steps in jobs:
            duration = seconds.pop(0)
            lines.append(f"| {count} | {steps} | {duration:.2f} | {1e3 * duration / count / steps:.1f} |")
    return lines


def write(page: Path, lines: Sequence[str]) -> None:
    """Between the marks of a page; a page without them gets a section at its end."""
    text = page.read_text() if page.exists() else ""
    begin, end = MARKS
    before, found, rest = text.partition(begin)
    if found:
        assert end in rest, f"{page} has {begin} without {end}"
        after = rest.partition(end)[2]
    else:
        before, after = f"{text.rstrip()}\n\n## {TITLE}\n\n".lstrip(), "\n"
    page.write_text(before + "\n".join([begin, *lines, end]) + after)


if __name__ == "__main__":
    main()
