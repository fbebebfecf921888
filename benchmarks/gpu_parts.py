"""What `benchmarks.gpu` measures: each part a function that yields what it has measured as soon as it has."""

import functools
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bases, drawing, jobs, memory
from benchmarks.phases import PHASES, phases

RECIPES = jobs.ROOT / "recipes"
TINY = {"sd15": "tiny", "sd21": "tiny-sd21", "sdxl": "tiny-sdxl"}
ENGINES = ("eager", "graph", "compiled")
WARM = 12  # steps until a graph is captured, or the compiler is done
SHORT = ("prior.count=4", "prior.steps=4", "draw.steps=4", "choose.count=1", "choose.class_count=1", "choose.steps=4")
TITLES = {  # by the first word of a part's name
    "tests": "Tests that need a GPU",
    "step": "A training step, 1 photo + 1 class image",
    "draw": "Images: one by a running program, class images by the recipe's sampler",
    "memory": "Peak memory beside the estimate of `plan`",
    "recipe": "Recipes, 20 steps by the command line",
    "processes": "Two processes on one card",
    "peer": "Beside other programs",
}


@dataclass(frozen=True)
class Setup:
    """device: cuda or cpu; size: full or tiny; work: folder for bases and runs; peers: scripts to compare with."""

    device: str
    size: str
    work: Path
    peers: tuple[Path, ...] = ()

    @property
    def rounds(self) -> int:
        return 5 if self.size == "full" else 1

    def base(self, kind: str, *, half: bool = True) -> str:
        """A base as `--base` takes it, of half precision as released; tiny ones stand for the large."""
        folder = self.work / ("bases" if half else "bases-float32")
        return bases.base(kind if self.size == "full" else TINY.get(kind, kind), folder, half=half)

    def photos(self, base: str) -> Path:
        from personalize.models.locate import base_size

        size = base_size(base)
        return bases.photos_at(size, self.work / f"photos-{size}")

    def fresh(self) -> Path:
        """An empty folder for a part's runs."""
        shutil.rmtree(self.work / "run", ignore_errors=True)
        (self.work / "run").mkdir(parents=True)
        return self.work / "run"


def all_parts(setup: Setup) -> dict[str, Callable[[], Iterator[dict]]]:
    """Parts by name, in the order of what one wants to know first."""
    known = {f"tests/{file.stem}": (tests, file) for file in sorted((jobs.ROOT / "tests" / "gpu").glob("test_*.py"))}
    kinds = [(kind, method) for kind in TINY for method in ("lora", "full")]
    engines = ENGINES if setup.device == "cuda" else ENGINES[:2]  # a compiler takes minutes on a CPU, and says nothing
    known |= {f"step/{kind}/{method}/{how}": (step, kind, method, how) for kind, method in kinds for how in engines}
    known |= {f"draw/{kind}": (draw, kind) for kind in TINY}
    recipes = [file.relative_to(RECIPES).with_suffix("").as_posix() for file in sorted(RECIPES.rglob("*.toml"))]
    known |= {f"memory/{name}": (peak_memory, name) for name in recipes}
    known |= {f"recipe/{name}": (recipe_run, name) for name in recipes}
    known |= {"processes/sd15": (processes, "sd15")}
    for script in setup.peers:
        known |= {f"peer/{script.name}/{part}": (peer, part, script) for part in ("gate", jobs.METHODS[script.name])}
    known |= {f"peer/pipeline/{part}": (peer, part) for part in ("drawing", "picture")}
    return {name: functools.partial(function, setup, *arguments) for name, (function, *arguments) in known.items()}


def tests(setup: Setup, file: Path) -> Iterator[dict]:
    """A file of tests that need a GPU; without one they are only collected."""
    log = setup.fresh() / "log.txt"
    flags = ["-q", "-m", "gpu", "-p", "no:cacheprovider", *(["--collect-only"] if setup.device == "cpu" else [])]
    failed = None
    try:
        jobs.spawn([sys.executable, "-m", "pytest", *flags, str(file)], log)
    except jobs.Failed as error:
        failed = error
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines))
    told = [jobs.without_paths(line)[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"outcome": lines[-1].strip("= ") if lines else "", **({"failed": told} if told else {})}
    if failed:
        raise failed


def step(setup: Setup, kind: str, method: str, engine: str) -> Iterator[dict]:
    """Milliseconds of a step once it is warm, and its peak. Class images are zeros: none is drawn."""
    from personalize.training.engine import Engine
    from personalize.training.memory.rehearsal import Rehearsal

    settings = [f"device={setup.device}", "dtype=auto", "prior.count=8", "train.steps=1000"]
    settings += [f"train.methods={method}", f"train.engine={engine}"]
    run, notes, on_gpu = Rehearsal(*memory.case(setup.base(kind), settings)), [], setup.device == "cuda"
    for phase in (run.load, run.attach, run.cache):
        phase(None)
    stepper = Engine(run.model, run.recipe, run.groups, say=notes.append)
    memory.restart(on_gpu)
    yield {f"first {WARM}, s": steps_seconds(stepper, run.data, range(WARM), on_gpu)}
    more = range(WARM, WARM + (10 if setup.size == "full" else 2))
    rounds = [steps_seconds(stepper, run.data, more, on_gpu) / len(more) for _ in range(setup.rounds)]
    yield {
        "ms": 1e3 * statistics.median(rounds), "least ms": 1e3 * min(rounds), "most ms": 1e3 * max(rounds),
        "peak, GB": peak_bytes(on_gpu) / 1e9, "said": "; ".join(notes),
    }  # fmt: skip


def steps_seconds(stepper, data, numbers: range, on_gpu: bool) -> float:
    """Of steps that wait for the device only after the last."""
    import torch

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    began = time.monotonic()
    for k in numbers:
        stepper.step(data.at(k), scale=1.0)
    wait()
    return time.monotonic() - began


def peak_bytes(on_gpu: bool) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu else memory.status("VmHWM")


def draw(setup: Setup, kind: str) -> Iterator[dict]:
    """One image of 50 steps with guidance, then many as a recipe draws class images."""
    import personalize

    base, full = setup.base(kind), setup.size == "full"
    config = personalize.resolve(None, [f"base={base}"]).draw
    count, dtype = (200 if kind == "sd15" else 32) if full else 2, "bfloat16" if setup.device == "cuda" else "float32"
    run, batch = drawing.ours(drawing.Request("ours", base, setup.device, dtype, config.sampler, count))
    run(1, 2, 1)
    steps = 50 if full else 2
    yield {f"one, {steps} steps, s": min(drawing.timed(run, 1, steps, 1)[0] for _ in range(setup.rounds))}
    memory.restart(setup.device == "cuda")
    run(batch, 2, batch)
    steps = config.steps if full else 2
    seconds, _ = drawing.timed(run, count, steps, batch)
    yield {"images": count, "s": seconds, "s an image": seconds / count, "batch": batch, "steps": steps}
    yield {"sampler": config.sampler, "peak, GB": peak_bytes(setup.device == "cuda") / 1e9}


def token_of(recipe: str) -> str:
    """A word that the methods of a recipe take: a learned one must be new to the base."""
    import personalize

    methods = personalize.resolve(RECIPES / f"{recipe}.toml").train.methods
    return "<sks>" if {"textual-inversion", "custom-diffusion"} & set(methods) else jobs.TOKEN


def peak_memory(setup: Setup, recipe: str) -> Iterator[dict]:
    """A recipe's phases on tensors without content, then really, two steps long."""
    from personalize.training.memory.rehearsal import rehearse

    file, base = RECIPES / f"{recipe}.toml", setup.base(recipe.split("/")[0])
    settings = [f"device={setup.device}", "dtype=auto", f"token={token_of(recipe)}"]
    counted = rehearse(*memory.case(base, settings, file))
    yield {"plan, GB": counted.peak / 1e9, "plan's largest": counted.largest}
    peaks = memory.measure(base, settings, file)
    peak, largest = max(peaks.values()), max(peaks, key=peaks.get)
    by_phase = {name: [counted.phases[name].peak / 1e9, bytes_ / 1e9] for name, bytes_ in peaks.items()}
    yield {"measured, GB": peak / 1e9, "largest": largest, "plan / measured": counted.peak / peak, "phases": by_phase}


def train_command(setup: Setup, base: str, work: Path, *settings: str) -> list[str]:
    """`personalize train` of 20 steps in `work`, as little drawn as shows that it works."""
    settings = (f"base={base}", f"device={setup.device}", "train.steps=20", "train.checkpoint_every=10", *SHORT, *settings)
    folders = ["--runs", str(work / "runs"), "--priors", str(work / "priors")]
    return [
        "personalize", "train", str(setup.photos(base)), "--class", jobs.CLASS, *folders,
        *(word for text in settings for word in ("--set", text)),
    ]  # fmt: skip


def recipe_run(setup: Setup, recipe: str) -> Iterator[dict]:
    """A recipe by the command line, from the start of the process to the result."""
    work, base = setup.fresh(), setup.base(recipe.split("/")[0])
    command = train_command(setup, base, work, f"token={token_of(recipe)}")
    try:
        measured = phases(jobs.run([*command, "--recipe", str(RECIPES / f"{recipe}.toml")], work))
    finally:
        print((work / "log.txt").read_text(errors="replace"))
    yield {f"{name}, {PHASES[name]}": value for name, value in measured.items() if value is not None}


def processes(setup: Setup, kind: str) -> Iterator[dict]:
    """A LoRA of 2 + 2 images a step by one process, and by two on the same card: milliseconds, without the first ten steps."""
    from personalize.common.files import read_jsonl

    base, same = setup.base(kind), "cuda:0" if setup.device == "cuda" else "cpu"
    for count in (1, 2):
        work = setup.fresh()
        more = ("train.methods=lora", "train.batch=2", "train.prior_batch=2", f"token={jobs.TOKEN}", f"device={same}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
        try:
            jobs.spawn([*launch, *train_command(setup, base, work, *more)], work / "log.txt")
        finally:
            print((work / "log.txt").read_text(errors="replace"))
        (log,) = work.glob("runs/*/log.jsonl")
        yield {f"{count}, ms": 1e3 * statistics.median(row["seconds"] for row in read_jsonl(log)[10:])}


def peer(setup: Setup, part: str, script: Path | None = None) -> Iterator[dict]:
    """A part of `benchmarks.compare`, short: its lines."""
    from benchmarks import compare  # torch with it, which the process that starts the parts does without

    work, full = setup.fresh(), setup.size == "full"
    sizes = {"--rounds": 1, "--picture-rounds": 2, "--steps": 100 if full else 8, "--class-pictures": 24 if full else 2}
    # The gate subtracts the base's weights from trained ones, so they are whole here.
    sizes |= {"--pictures": 32 if full else 2, "--base": setup.base("sd15", half=False), "--only": part}
    flags = [*(["--peer", str(script)] if script else []), *(word for pair in sizes.items() for word in map(str, pair))]
    options = compare.parse_options([*flags, "--no-demand"])
    good, lines = compare.compare(compare.prepare_job(options, work), options, work)
    yield {"lines": [line for line in lines if "not measured" not in line], "passed": good}
