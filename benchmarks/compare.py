"""Speed beside other programs' on the same work, in one run: diffusers' training scripts, kohya's, StableDiffusionPipeline.

    python -m benchmarks.compare --peer train_dreambooth.py --peer train_dreambooth_lora.py
    python -m benchmarks.compare --peer … --only gate --only full --rounds 1 --steps 20 --class-pictures 8     a short look

The scripts are the user's own copies, as they are. --transforms is a folder with torchvision where the installed torch
has none that fits. First the gate: where ours strays further from a float64 reference than the script does, nothing is
measured. Exit status 1 where the gate or a demanded ratio is missed. How it is kept fair: docs/benchmarks.md.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import bases, ceiling, demands, drawing, gate, jobs
from benchmarks.machine import header
from benchmarks.phases import Ratio, median, phases, ratio, table

PARTS = ("gate", "full", "lora", "drawing", "picture")
SAMPLERS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "EulerDiscreteScheduler": "euler"}
MARKS = ("<!-- compare -->", "<!-- /compare -->")
STEP = {"cpu": "step, median", "cuda": "step, mean"}  # a step that nobody waits for ends at once, and many later late
OURS, OWN = "personalize", "personalize, own drawing"
FEW = 8  # class pictures of a LoRA job: drawing them is the same work in both methods, and is measured with the first


def main() -> None:
    options = parse_options(sys.argv[1:])
    require_scripts(options.peer)
    lines = [*header(sys.argv[1:], options.peer), ""]
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        work = Path(name)
        job = prepare_job(options, work)
        good, report_lines = compare(job, options, work)
    lines += report_lines
    print("\n".join(lines))
    if options.write:
        write(options.write, lines)
    sys.exit(0 if good else 1)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a training script; may be given again")
    parser.add_argument("--transforms", type=Path, help="folder with a torchvision whose transforms are all that is used")
    parser.add_argument("--base", default="", help="toyland, sd15 (random weights) or a folder; default: by the device")
    parser.add_argument("--rounds", type=int, default=3, help="of training and of drawing")
    parser.add_argument("--picture-rounds", type=int, default=5, help="of one picture from a cold start")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--class-pictures", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=64, help="pictures drawn at a stretch")
    parser.add_argument("--batch", type=int, default=1, help="photos in a step, and as many class pictures")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given again")
    parser.add_argument("--write", type=Path, help="Markdown file to put the tables in, between its marks")
    parser.add_argument("--demand", action=argparse.BooleanOptionalAction, default=True, help="exit 1 where a bar is missed")
    options = parser.parse_args(arguments)
    if not options.peer and set(options.only or PARTS) & {"gate", "full", "lora"}:
        parser.error("which script to compare with? Give --peer, or --only drawing and --only picture.")
    return options


def require_scripts(peers: list[Path]) -> None:
    """SystemExit for a script that is not there, or whose flags nobody has told us."""
    for script in peers:
        if script.name not in jobs.METHODS:
            sys.exit(f"--peer {script} is none of {', '.join(jobs.METHODS)}: its flags are not known here.")
        if not script.is_file():
            sys.exit(f"--peer {script} is not there. Give the path of your copy of {script.name}.")


def prepare_job(options: argparse.Namespace, work: Path) -> jobs.Job:
    """The job on this machine's device; photos at the size of the base, so that nobody has to enlarge them."""
    import torch

    from personalize.models import loading, locate_base
    from personalize.models.lazy_imports import quiet_libraries

    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = options.base or ("sd15" if device == "cuda" else "toyland")
    base = bases.base(base, work) if base in bases.CONFIGS else base
    folder = locate_base(base)
    unet, vae = loading.read_configs(folder, base)
    size = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return jobs.Job(
        base, folder, bases.photos_at(size, work / "photos"), size, device, options.steps, options.class_pictures,
        options.batch, sampler=SAMPLERS[scheduler],
    )  # fmt: skip


def compare(job: jobs.Job, options: argparse.Namespace, work: Path) -> tuple[bool, list[str]]:
    """Everything that was asked for -> whether nothing is missed, and the report's lines."""
    lines, measured = [], {}
    parts = options.only or PARTS
    if "gate" in parts:
        passed, lines = _gate(job, options, work)
        if not passed:
            return False, [*lines, "", "The gate failed: nothing is measured."]
    for script in options.peer:
        if jobs.METHODS.get(script.name, "") in parts:
            lines += ["", *_training(job, script, options, work=work, measured=measured)]
    if "drawing" in parts:
        lines += ["", *_drawing(job, options, work, measured)]
    if "picture" in parts:
        theirs, ours = drawing.one(job, _fresh(work / "one"), rounds=options.picture_rounds, steps=25)
        measured["one picture cold, ratio"] = (cold_ratio := ratio(theirs, ours)).value
        lines += ["", "### One picture, from the start of a process to a PNG", "", *_pair(theirs, ours, cold_ratio)]
    verdicts, met = demands.judge(demands.DEMANDS[job.device], measured, whole=not options.only)
    lines += ["", "### Demanded", "", *(f"- {line}" for line in verdicts)]
    return met or not options.demand, lines


def _gate(job: jobs.Job, options: argparse.Namespace, work: Path) -> tuple[bool, list[str]]:
    lines, passed = ["### Gate: deviation from a float64 reference", "", "| | peer | personalize |", "|---|---|---|"], True
    for script in options.peer:
        if script.name not in gate.SCRIPTS:
            continue
        _say(f"gate: {script.name}")
        verdict = gate.run(job, script, _fresh(work / "gate"), transforms=options.transforms)
        lines += verdict.rows()
        passed = passed and verdict.passed
    return passed, lines


def _training(
    job: jobs.Job, script: Path, options: argparse.Namespace, *, work: Path, measured: dict[str, float]
) -> Iterator[str]:
    """The table of one script beside ours; what is demanded of it goes into `measured`."""
    method = jobs.METHODS[script.name]
    job = replace(job, class_images=min(job.class_images, FEW)) if method == "lora" else job
    work_done = f"{job.batch} + {job.batch} pictures a step, {job.steps} steps, {job.class_images} class pictures"
    yield from (f"### {script.name}: {method}, {work_done}", "")
    try:
        sides = _rounds(job, script, options, work)
    except jobs.Failed as error:
        if script.name in gate.SCRIPTS:
            raise
        yield f"It does not run here: {error}."
        return
    yield from table(sides)
    step = STEP[job.device]
    yield from ("", ceiling.words(job, method, {side: median([r[step] for r in rounds]) for side, rounds in sides.items()}))
    if script.name in gate.SCRIPTS:
        measured |= _measured(sides, method, job.device)


def _rounds(job: jobs.Job, script: Path, options: argparse.Namespace, work: Path) -> dict[str, list[dict]]:
    """Alternating processes, every one with fresh folders; the order turns round from one round to the next."""
    method = jobs.METHODS[script.name]
    fresh = work / "arm"
    commands = {
        script.name: lambda: jobs.theirs(job, script, fresh),
        OURS: lambda: jobs.ours(job, method, fresh),
    }
    if script.name in gate.SCRIPTS and method == "full":
        commands[OWN] = lambda: jobs.ours(job, method, fresh, own_drawing=True)
    rounds: dict[str, list[dict]] = {side: [] for side in commands}
    for k in range(options.rounds):
        for side in list(commands)[:: 1 if k % 2 == 0 else -1]:
            _fresh(fresh)
            run = jobs.run(commands[side](), fresh, transforms=options.transforms)
            rounds[side].append(phases(run))
            _say(f"{script.name}, round {k + 1}: {side} {run.end - run.start:.1f} s")
    return rounds


def _measured(sides: dict[str, list[dict]], method: str, device: str) -> dict[str, float]:
    """By the names of the demands."""
    theirs, *others = sides.values()
    mine, step = others[0], STEP[device]

    def of(phase: str, side: list[dict]) -> Ratio | None:
        return ratio([r[phase] for r in theirs], [r[phase] for r in side])

    numbers = {f"{method} step, ratio": of(step, mine), f"{method} step": median([r[step] for r in mine])}
    if method == "full":
        numbers["cold job, same sampler and steps, ratio"] = of("cold job", mine)
        numbers["cold job, same sampler and steps"] = median([r["cold job"] for r in mine])
        numbers["class pictures, same steps, ratio"] = of("prior", mine)
        numbers["cold job, own defaults, ratio"] = of("cold job", others[1])
        numbers["class pictures, own defaults"] = median([r["prior"] for r in others[1]])
    return {k: v.value if isinstance(v, Ratio) else v for k, v in numbers.items() if v is not None}


def _drawing(job: jobs.Job, options: argparse.Namespace, work: Path, measured: dict[str, float]) -> Iterator[str]:
    _say("drawing")
    timings = drawing.many(job, _fresh(work / "many"), rounds=options.rounds, count=options.pictures, steps=25)
    measured[f"drawing {options.pictures} pictures, ratio"] = timings.ratio("ours").value
    yield from (f"### Drawing {options.pictures} pictures, 25 steps, guidance {drawing.GUIDANCE}, {job.sampler}", "")
    yield from timings.rows()
    if job.device == "cuda":
        theirs, ours = drawing.single(job, rounds=options.rounds, steps=50)
        measured["one picture, 50 steps"] = median(ours)
        yield from ("", "### One picture, 50 steps, by a running program", "", *_pair(theirs, ours, ratio(theirs, ours)))


def _pair(theirs: list[float], ours: list[float], row_ratio: Ratio) -> list[str]:
    rows = [f"| StableDiffusionPipeline | {median(theirs):.2f} | |", f"| personalize | {median(ours):.2f} | {row_ratio} |"]
    return ["| | s | ratio |", "|---|---|---|", *rows]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(page: Path, lines: list[str]) -> None:
    """The lines between the marks of a page. SystemExit where it has none."""
    begin, end = MARKS
    text = page.read_text() if page.exists() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{page} has no place for tables: it needs the lines {begin} and {end}.")
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}")


if __name__ == "__main__":
    main()
