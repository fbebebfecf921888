"""How much of a subject do photos tell Toyland's base, or a run of it, beside the prompt?

    python -m benchmarks.image_prompts WORK [--method full] [--trained 0.5] [--count 2] [--adapter FILE]

The first `--count` development subjects of `benchmarks.subjects`, their five photos at each scale, 32 images each on Toyland's
test prompts from the same noise, judged by truth. Without --method nothing is trained; with a technique of the league the
photos are told beside the prompts of its run, after a quarter, half and all of its steps; with --trained at this scale alone,
and while it trains too. Writes image-prompts.md and image-prompts.png into WORK, their names with the method's and the scale.
`benchmarks.league` has the same images beside what trains.

error      identity error with its interval over subjects, prompts and images: 0 is the subject, 1 another of its class
adherence  images with the place, action and accessory that were asked for, over the base's
seconds    of reading photos and adapter, once a subject, or of training, as the steps were logged
change     of the error against the same run without photos, paired, with its interval
"""

import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import typer
from PIL import Image

import personalize
from benchmarks.league import train, write_photos
from benchmarks.subjects import ADHERENCE, CLASSES
from personalize.commands.compare import read_rows
from personalize.commands.session import open_base, resolve
from personalize.common import prompts
from personalize.common.files import read_jsonl, slug, write_text, writing
from personalize.common.terminal import SILENT
from personalize.core.guidance import Cond
from personalize.data.batch import Batch
from personalize.data.image_grid import grid
from personalize.data.image_prompt import read_image_prompt
from personalize.evaluation import bootstrap, image_cache, summary
from personalize.evaluation.metrics.toyland_truth import PARTS
from personalize.training.engine import Engine

STEPS = (50, 100, 200)  # of which the last are all
SCALES, SHOWN = (0.0, 0.5, 0.7, 1.0), (0.0, 0.5, 1.0)
EVALUATED = ["evaluate.class_count=8"]
SAID = ("class", "place", "action", "accessory")


def main(work: Path, count: int = 2, adapter: Path | None = None, method: str = "", trained: float = 0.0) -> None:
    header = ["steps", "scale", "error (95 %)", *PARTS, *SAID, "adherence", "seconds", "change (95 %)"]
    header = header if method else header[1:-1]
    mark = f"-trained-{trained:g}" if trained else ""
    stem = f"image-prompts{'-' * bool(method)}{slug(method)}{mark}"
    lines, sheet = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"], {}
    for k, word in enumerate(CLASSES["dev"][:count]):
        write_photos(work / "photos" / word, k)
        photos = [Image.open(path).convert("RGB") for path in sorted((work / "photos" / word).glob("*.png"))]
        blank = Image.new("RGB", photos[0].size, "white")
        sheet[word] = [photos + [blank] * (len(prompts.TOYLAND) - len(photos))]
    for steps in STEPS if method else (0,):
        plain: list[dict] = []
        for scale in (0.0, trained) if trained else SHOWN if method else SCALES:
            rows, seconds = [], 0.0
            for k, word in enumerate(CLASSES["dev"][:count]):
                told = work / "photos" / word, scale, adapter
                run = None
                if method:  # at scale 0 the plain run, to compare with
                    with beside_photos(*told) if trained and scale else nullcontext():
                        run = train(work, method, k, STEPS[-1], every=STEPS[0], mark=mark if scale else "")
                report, images, took = of_run(work, run, steps, *told) if run else of_base(work, word, *told)
                rows += [row | {"subject": k} for row in read_rows(report)]
                seconds += took / count
                if scale in SHOWN:
                    sheet[word].append(first_images(images, rows, k))
            plain = plain or rows
            cells = [f"{scale:g}", *table_cells(rows), f"{seconds:.1f}"]
            lines.append(f"| {' | '.join([str(steps), *cells, change(rows, plain)] if method else cells)} |")
            print(lines[-1], flush=True)
    write_text(work / f"{stem}.md", "\n".join(lines) + "\n")
    with writing(work / f"{stem}.png") as temporary:
        grid([image for part in sheet.values() for row in part for image in row], len(prompts.TOYLAND)).save(temporary)


def beside_photos(photos: Path, scale: float, adapter: Path | None):
    """Photos of the subject train with the image prompt beside their text, class images without it."""
    step = Engine.step

    def told(self: Engine, batch: Batch, *, scale: float):
        if not hasattr(self, "told"):
            self.told, _ = read_image_prompt(self.model, photos, scale=image_scale, adapter=adapter)

        def cond(rows: slice) -> Cond:
            own = (~batch.is_prior[rows]).float().view(-1, 1, 1)
            return batch.cond(rows) | {name: kv * own for name, kv in self.told.rows(len(own))[0].items()}

        return step(self, replace(batch, cond=cond), scale=scale)

    image_scale = scale
    return mock.patch.object(Engine, "step", told)


def table_cells(rows: list[dict]) -> list[str]:
    subject, base = (summary.of_kind(rows, kind) for kind in ("subject", "base"))

    def mean(rows: list[dict], *names: str) -> float:
        values = [row[name] for row in rows for name in names if row[name] is not None]
        return sum(values) / max(1, len(values))

    labels = [(row["subject"], row["template"]) for row in subject]
    error = bootstrap.bootstrap_interval([row["identity_error"] for row in subject], labels)
    cells = [f"{error.mean:.2f} ({error.low:.2f} to {error.high:.2f})"]
    cells += [f"{mean(subject, f'off_{part}'):.2f}" for part in PARTS]
    cells += [f"{mean(subject, f'true_{name}'):.2f}" for name in SAID]
    return [*cells, f"{mean(subject, *ADHERENCE) / mean(base, *ADHERENCE):.2f}"]


def change(rows: list[dict], plain: list[dict]) -> str:
    """Of the error against the same run without photos."""
    keys = ("subject", "template", "index")
    pair = [
        {tuple(row[key] for key in keys): row["identity_error"] for row in summary.of_kind(each, "subject")}
        for each in (rows, plain)
    ]
    found = bootstrap.paired_difference(*pair)
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def of_base(work: Path, word: str, photos: Path, scale: float, adapter: Path | None) -> tuple[Path, Path, float]:
    """The folders of an evaluation and of the subject's images, and the seconds that the photos cost."""
    model = open_base(resolve(None, ["base=toyland"]), SILENT)
    start = time.perf_counter()
    read_image_prompt(model, photos, scale=scale, adapter=adapter)
    seconds = time.perf_counter() - start
    told = {"image_prompt": photos, "class_word": word, "image_scale": scale, "adapter": adapter, "base": "toyland"}
    report = personalize.evaluate(**told, settings=EVALUATED, runs=work / "runs").report.parent
    return report, next(report.glob("pictures/image-prompt-*")), seconds


def of_run(work: Path, run: Path, steps: int, photos: Path, scale: float, adapter: Path | None) -> tuple[Path, Path, float]:
    """The same of a run after `steps`, and the seconds of its training until then; kept."""
    told = {"image_prompt": photos, "image_scale": scale, "adapter": adapter} if scale else {}
    report = work / "evaluations" / f"{run.name}-{steps}-{scale:g}"
    if not report.exists():
        at = "" if steps == STEPS[-1] else str(steps)
        found = personalize.evaluate(run, checkpoint=at, **told, settings=EVALUATED)
        beside = f"-{found.report.parent.name}" if told else ""
        (images,) = run.glob(f"evaluation/pictures/{found.metrics['run']['model']}-????????{beside}")
        shutil.copytree(images, report / "images")
        shutil.copy(found.report.parent / "per_image.csv", report)
    return report, report / "images", sum(row["seconds"] for row in read_jsonl(run / "log.jsonl") if row["step"] <= steps)


def first_images(folder: Path, rows: list[dict], k: int) -> list[Image.Image]:
    """The first image of each prompt of a subject."""
    first = [row for row in summary.of_kind(rows, "subject") if (row["subject"], row["index"]) == (k, 0)]
    return [Image.open(image_cache.image_file(folder, (row["prompt"], 0))).convert("RGB") for row in first]


if __name__ == "__main__":
    typer.run(main)
