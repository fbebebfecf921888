"""How much of a subject do photos tell Toyland's base, beside the prompt and without training?

    python -m benchmarks.image_prompts WORK [--count 2] [--adapter FILE]

The first `--count` development subjects of `benchmarks.subjects`, their five photos at each scale, 32 images each on Toyland's
test prompts from the same noise, judged by truth. Writes image-prompts.md and image-prompts.png into WORK. `benchmarks.league`
has the same images beside what trains.

error      identity error with its interval over subjects, prompts and images: 0 is the subject, 1 another of its class
adherence  images with the place, action and accessory that were asked for, over the base's
seconds    of reading photos and adapter, once a subject
"""

import time
from pathlib import Path

import typer
from PIL import Image

import personalize
from benchmarks.league import write_photos
from benchmarks.subjects import ADHERENCE, CLASSES
from personalize.commands.compare import read_rows
from personalize.commands.session import open_base, resolve
from personalize.common import prompts
from personalize.common.files import write_text, writing
from personalize.common.terminal import SILENT
from personalize.data.image_grid import grid
from personalize.data.image_prompt import read_image_prompt
from personalize.evaluation import bootstrap, image_cache, summary
from personalize.evaluation.metrics.toyland_truth import PARTS

SCALES, SHOWN = (0.0, 0.5, 0.7, 1.0), (0.0, 0.5, 1.0)
SAID = ("class", "place", "action", "accessory")


def main(work: Path, count: int = 2, adapter: Path | None = None) -> None:
    header = ["scale", "error (95 %)", *PARTS, *SAID, "adherence", "seconds"]
    lines, sheet = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"], {}
    for k, word in enumerate(CLASSES["dev"][:count]):
        write_photos(work / "photos" / word, k)
        photos = [Image.open(path).convert("RGB") for path in sorted((work / "photos" / word).glob("*.png"))]
        blank = Image.new("RGB", photos[0].size, "white")
        sheet[word] = [photos + [blank] * (len(prompts.TOYLAND) - len(photos))]
    for scale in SCALES:
        rows, seconds = [], 0.0
        for k, word in enumerate(CLASSES["dev"][:count]):
            evaluation, took = evaluated(work, word, scale, adapter)
            rows += [row | {"subject": k} for row in read_rows(evaluation)]
            seconds += took / count
            if scale in SHOWN:
                sheet[word].append(first_images(evaluation, word))
        lines.append(table_row(scale, rows, seconds))
        print(lines[-1], flush=True)
    write_text(work / "image-prompts.md", "\n".join(lines) + "\n")
    with writing(work / "image-prompts.png") as temporary:
        grid([image for part in sheet.values() for row in part for image in row], len(prompts.TOYLAND)).save(temporary)


def table_row(scale: float, rows: list[dict], seconds: float) -> str:
    subject, base = (summary.of_kind(rows, kind) for kind in ("subject", "base"))

    def mean(rows: list[dict], *names: str) -> float:
        values = [row[name] for row in rows for name in names if row[name] is not None]
        return sum(values) / max(1, len(values))

    labels = [(row["subject"], row["template"]) for row in subject]
    error = bootstrap.bootstrap_interval([row["identity_error"] for row in subject], labels)
    cells = [f"{error.mean:.2f} ({error.low:.2f} to {error.high:.2f})"]
    cells += [f"{mean(subject, f'off_{part}'):.2f}" for part in PARTS]
    cells += [f"{mean(subject, f'true_{name}'):.2f}" for name in SAID]
    return f"| {scale:g} | {' | '.join(cells)} | {mean(subject, *ADHERENCE) / mean(base, *ADHERENCE):.2f} | {seconds:.1f} |"


def evaluated(work: Path, word: str, scale: float, adapter: Path | None) -> tuple[Path, float]:
    """The folder of an evaluation, and the seconds that the photos cost."""
    photos, model = work / "photos" / word, open_base(resolve(None, ["base=toyland"]), SILENT)
    start = time.perf_counter()
    read_image_prompt(model, photos, scale=scale, adapter=adapter)
    seconds = time.perf_counter() - start
    told = {"image_prompt": photos, "class_word": word, "image_scale": scale, "adapter": adapter, "base": "toyland"}
    result = personalize.evaluate(**told, settings=["evaluate.class_count=8"], runs=work / "runs")
    return result.report.parent, seconds


def first_images(evaluation: Path, word: str) -> list[Image.Image]:
    """The first image of each prompt, as it was evaluated."""
    (folder,) = evaluation.glob("pictures/image-prompt-*")
    jobs = [(prompts.fill(template, "", word), 0) for template in prompts.TOYLAND]
    return [Image.open(image_cache.image_file(folder, job)).convert("RGB") for job in jobs]


if __name__ == "__main__":
    typer.run(main)
