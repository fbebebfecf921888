"""Which technique learns a subject best for the same seconds?

    python -m benchmarks.league WORK [TECHNIQUE …] [--steps 200] [--count 4]

Every technique of `benchmarks.techniques` trains the first `--count` development subjects of `benchmarks.subjects` for as
long as the reference does for `--steps`: its own steps are those by the ratio of the two in alternating short runs. No
checkpoint is chosen: the last is judged by truth, 32 images on Toyland's test prompts, every technique from the same noise.
Differences to the reference are paired by subject, prompt and number.

error      identity error: 0 is the subject, 1 another of its class; then its parts
adherence  images with the place, action and accessory that were asked for, over the base's
drift      share of the way to the subject that the error of class images moved
"""

import os
import shutil
import statistics
from pathlib import Path

import torch
import typer
from filelock import FileLock

import personalize
from benchmarks.subjects import ADHERENCE, CLASSES, render_photos, seed_of
from benchmarks.techniques import REFERENCE, TECHNIQUES, varied_class_images
from personalize.commands.compare import read_rows
from personalize.common import run_folder
from personalize.common.files import read_json, read_jsonl, slug, write_json
from personalize.evaluation import bootstrap, summary
from personalize.evaluation.metrics.toyland_truth import PARTS

SHORT = 24  # steps of the runs that tell what a step costs


def train(work: Path, name: str, k: int, steps: int, *, every: int = 0, mark: str = "") -> Path:
    """The run of a technique on the development subject k; kept. every: steps between its checkpoints, 0 for the last alone;
    mark: in the name of the run, for what a caller has patched."""
    technique, word = TECHNIQUES[name], CLASSES["dev"][k]
    run = work / "runs" / f"{slug(name)}-{steps}-{k}{f'-every-{every}' if every else ''}{mark}"
    photos = work / "photos" / f"{word}{'-captions' * technique.captions}"
    if (run / "manifest.json").exists() and run_folder.read_manifest(run)["status"] == "finished":
        return run
    if technique.drawn_from:
        shutil.copytree(train(work, technique.drawn_from, k, steps), run, ignore=shutil.ignore_patterns("evaluation"))
        return run
    write_photos(photos, k, captions=technique.captions)
    settings = [*technique.settings, f"train.steps={steps}", "choose.every=0", f"train.checkpoint_every={every}"]
    settings += [f"train.keep={steps // every}"] if every else []
    with technique.patch():
        folder = personalize.train(
            photos,
            class_word=word,
            settings=settings,
            runs=work / "new" / run.name,
            priors=work / ("priors" if technique.patch is not varied_class_images else "varied priors"),
        ).folder
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    shutil.move(folder, run)
    return run


def write_photos(folder: Path, k: int, *, captions: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (photo, place) in enumerate(zip(render_photos(seed_of("dev", k), CLASSES["dev"][k]), PLACES)):
        photo.save(folder / f"{i:02d}.png")
        if captions:
            (folder / f"{i:02d}.txt").write_text(f"a photo of a {{token}} {{class}} standing {place}\n")


PLACES = ("on a meadow", "on the beach", "in a room", "in the mountains", "in the snow")


def relative_cost(work: Path, name: str) -> float:
    """Seconds of a step over the reference's, by the medians of short runs in turn."""
    technique = TECHNIQUES[name]
    name = technique.drawn_from or technique.costs_as or name
    if name == REFERENCE:
        return 1
    file = work / "costs" / f"{slug(name)}.json"
    with FileLock(work / "costs.lock"):  # of several processes one at a time
        if not file.exists():
            medians = {REFERENCE: [], name: []}
            for each in 2 * list(medians):
                run = train(work, each, 0, SHORT)
                medians[each].append(statistics.median(row["seconds"] for row in read_jsonl(run / "log.jsonl")[4:]))
                shutil.rmtree(run)
            write_json(file, {"cost": min(medians[name]) / min(medians[REFERENCE]), "seconds": medians})
    return read_json(file)["cost"]


def evaluated(work: Path, name: str, k: int, steps: int) -> list[dict]:
    """The rows of an evaluation of the development subject k."""
    technique, settings = TECHNIQUES[name], ["evaluate.class_count=8"]
    if technique.image_scale is None:
        run = train(work, name, k, steps)
        with technique.patch():
            return read_rows(personalize.evaluate(run, settings=settings).report.parent)
    photos, word = work / "photos" / CLASSES["dev"][k], CLASSES["dev"][k]
    write_photos(photos, k)
    told = {"image_prompt": photos, "class_word": word, "image_scale": technique.image_scale, "base": "toyland"}
    return read_rows(personalize.evaluate(**told, settings=settings, runs=work / "runs").report.parent)


def judged(rows: list[dict]) -> dict:
    """What the rows of an evaluation say."""
    asked = {kind: [r[name] for r in summary.of_kind(rows, kind) for name in ADHERENCE if r[name] is not None]
             for kind in ("subject", "base")}  # fmt: skip
    share = {kind: sum(values) / len(values) for kind, values in asked.items()}
    mean = lambda kind, name: i.mean if (i := summary.interval(summary.of_kind(rows, kind), name)) else None  # noqa: E731
    before, after = (mean(kind, "identity_error") for kind in ("base class", "class"))
    return {
        "error": mean("subject", "identity_error"),
        **{part: mean("subject", f"off_{part}") for part in PARTS},
        "dino": mean("subject", "dino"),
        "adherence": share["subject"] / share["base"],
        "drift": (before - after) / before,
        "images": [[*key, value] for key, value in summary.keyed(summary.of_kind(rows, "subject"), "identity_error").items()],
    }  # fmt: skip


def own_steps(work: Path, name: str, steps: int) -> int:
    """What a technique has time for; 0 where it trains nothing."""
    if TECHNIQUES[name].image_scale is not None:
        return 0
    return steps if name == REFERENCE else max(2, round(steps / relative_cost(work, name)))


def result(work: Path, name: str, steps: int, count: int) -> list[dict]:
    """A row for each of the first `count` subjects; kept."""
    file = work / "results" / f"{slug(name)}-{steps}.json"
    rows = read_json(file)["subjects"] if file.exists() else []
    for k in range(len(rows), count):
        rows.append(judged(evaluated(work, name, k, steps)))
        write_json(file, {"subjects": rows})
    return rows[:count]


def table_row(name: str, steps: int, rows: list[dict], against: list[dict]) -> str:
    mean = lambda key: statistics.mean(values) if (values := [r[key] for r in rows if r[key] is not None]) else float("nan")  # noqa: E731
    pair = [{(k, *image[:-1]): image[-1] for k, row in enumerate(each) for image in row["images"]} for each in (rows, against)]
    change = bootstrap.paired_difference(*pair)
    cells = [f"{mean(key):.2f}" for key in ("error", *PARTS, "adherence", "drift")]
    return f"| {name}, {steps} | {' | '.join(cells)} | {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}) |"


def main(work: Path, names: list[str] = typer.Argument(None), steps: int = 200, count: int = 4) -> None:  # noqa: B008
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    header = ["technique, steps", "error", *PARTS, "adherence", "drift", "error against full (95 %)"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    reference = result(work, REFERENCE, steps, count)
    for name in names or TECHNIQUES:
        own = own_steps(work, name, steps)
        print(table_row(name, own, result(work, name, own, count), reference), flush=True)


if __name__ == "__main__":
    typer.run(main)
