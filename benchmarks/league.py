"""Which technique learns a subject best for the same seconds?    python -m benchmarks.league WORK [TECHNIQUE …] [--seconds 60]

Every technique of TECHNIQUES trains the development subjects of `benchmarks.subjects` for as long as the reference does in
`seconds`: its steps are those of the reference by the ratio of the two in alternating short runs. No checkpoint is chosen:
the last one and that of half the steps are judged by truth, 32 images each on Toyland's test prompts, every technique
from the same noise. Differences to the reference are paired by subject, prompt and number.

error      identity error: 0 is the subject, 1 another of its class; then its parts
adherence  images with the place, action and accessory that were asked for, over the base's
drift      share of the way to the subject that the error of class images moved
"""

import os
import shutil
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

import personalize
from benchmarks.subjects import ADHERENCE, CLASSES, render_photos, seed_of
from personalize.commands.compare import read_rows
from personalize.common import run_folder
from personalize.common.files import read_json, read_jsonl, write_json
from personalize.evaluation import bootstrap, summary
from personalize.evaluation.metrics.toyland_truth import PARTS

SHORT = 24  # steps of the runs that tell what a step costs
REFERENCE = "full"


@dataclass(frozen=True)
class Technique:
    """Settings on top of the shipped recipe; captions: of the photos; patch: a context in which a run trains."""

    settings: tuple[str, ...] = ()
    captions: bool = False
    patch: Callable = nullcontext
    draw: tuple[str, ...] = ()


LORA = ("train.methods=lora", "lora.rank=32", "lora.conv=true", "train.text_encoder=true", "train.lr=1e-3", "train.batch=3",
        "train.prior_batch=1", "train.snr_gamma=0", "draw.sampler=ddpm", "draw.guidance=2.2", "draw.steps=25")  # fmt: skip
TECHNIQUES = {
    REFERENCE: Technique(),
    "cosine": Technique(("train.lr_schedule=cosine", "train.lr=3e-4")),
    "ema": Technique(("train.ema=0.98",)),
    "lr-3e-4": Technique(("train.lr=3e-4",)),
    "text-half": Technique(("train.text_lr=1e-4",)),
    "predictions": Technique(("prior.kind=predictions",)),
    "no-prior": Technique(("prior.count=0", "train.batch=4")),
    "captions": Technique(captions=True),
    "batch-6": Technique(("train.batch=6", "train.prior_batch=2", "train.lr=3e-4")),
    "lora": Technique(LORA),
}  # fmt: skip


def train(work: Path, name: str, k: int, steps: int) -> Path:
    """The run of a technique on the development subject k; kept."""
    technique, word = TECHNIQUES[name], CLASSES["dev"][k]
    run, photos = work / "runs" / f"{name}-{steps}-{k}", work / "photos" / f"{word}{'-captions' * technique.captions}"
    if (run / "manifest.json").exists() and run_folder.read_manifest(run)["status"] == "finished":
        return run
    photos.mkdir(parents=True, exist_ok=True)
    for i, (photo, place) in enumerate(zip(render_photos(seed_of("dev", k), word), PLACES)):
        photo.save(photos / f"{i:02d}.png")
        if technique.captions:
            (photos / f"{i:02d}.txt").write_text(f"a photo of a {{token}} {{class}} standing {place}\n")
    settings = [
        *technique.settings,
        *technique.draw,
        f"train.steps={steps}",
        "choose.every=0",
        f"train.checkpoint_every={steps // 2}",
    ]
    with technique.patch():
        folder = personalize.train(
            photos, class_word=word, settings=[*settings, "train.keep=2"], runs=work / "new" / run.name, priors=work / "priors"
        ).folder
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    shutil.move(folder, run)
    return run


PLACES = ("on a meadow", "on the beach", "in a room", "in the mountains", "in the snow")


def relative_cost(work: Path, name: str) -> float:
    """Seconds of a step over the reference's, by the medians of short runs in turn."""
    file = work / "costs" / f"{name}.json"
    if not file.exists():
        medians = {REFERENCE: [], name: []}
        for turn in range(2):
            for each in medians:
                run = train(work / f"turn-{turn}-{os.getpid()}", each, 0, SHORT)
                medians[each].append(statistics.median(row["seconds"] for row in read_jsonl(run / "log.jsonl")[4:]))
        shutil.rmtree(work / f"turn-0-{os.getpid()}"), shutil.rmtree(work / f"turn-1-{os.getpid()}")
        write_json(file, {"cost": min(medians[name]) / min(medians[REFERENCE]), "seconds": medians})
    return read_json(file)["cost"]


def judged(run: Path, checkpoint: str) -> dict:
    """The rows of an evaluation, and what they say."""
    rows = read_rows(personalize.evaluate(run, checkpoint=checkpoint).report.parent)
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


def result(work: Path, name: str, steps: int) -> dict[str, list[dict]]:
    """{"half": a row a subject, "all": …}; kept."""
    file = work / "results" / f"{name}-{steps}.json"
    if not file.exists():
        out = {"half": [], "all": []}
        for k in range(len(CLASSES["dev"])):
            run = train(work, name, k, steps)
            for key, step in (("half", steps // 2), ("all", steps)):
                out[key].append(judged(run, str(step)))
        write_json(file, out)
    return read_json(file)


def table_row(name: str, steps: int, part: str, rows: list[dict], against: list[dict]) -> str:
    mean = lambda key: statistics.mean(values) if (values := [r[key] for r in rows if r[key] is not None]) else float("nan")  # noqa: E731
    pair = [{(k, *image[:-1]): image[-1] for k, row in enumerate(each) for image in row["images"]} for each in (rows, against)]
    change = bootstrap.paired_difference(*pair)
    cells = [f"{mean(key):.2f}" for key in ("error", *PARTS, "adherence", "drift")]
    return f"| {name}, {steps} | {' | '.join(cells)} | {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}) |"


def main(work: Path, names: list[str] = typer.Argument(None), steps: int = 200) -> None:  # noqa: B008
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    header = ["technique, steps", "error", *PARTS, "adherence", "drift", "error against full (95 %)"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    reference = result(work, REFERENCE, steps)
    for name in names or TECHNIQUES:
        own = steps if name == REFERENCE else max(2, 2 * round(steps / relative_cost(work, name) / 2))
        rows = result(work, name, own)
        for part, count in (("half", own // 2), ("all", own)):
            print(table_row(name, count, part, rows[part], reference[part]), flush=True)


if __name__ == "__main__":
    typer.run(main)
