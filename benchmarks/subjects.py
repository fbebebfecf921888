"""Does DreamBooth learn Toyland's subjects?    python -m benchmarks.subjects WORK [dev|test] [KEY=VALUE …]

Recipes are searched on the four subjects of `dev` and reported, untouched, on the twelve of `test`, one of each class;
no other part of the project uses their seeds. A row is a subject, trained by `personalize train` with the settings given
and evaluated on Toyland's test prompts with fresh noise:

identity   (DINO - floor) / (ceiling - floor): 0 is the base's own class pictures, 1 the photos among each other
first      pictures that are nearer to the subject's photos than to those of any of 100 look-alikes of its class, by DINO
error      of the identity parameters as the probe reads them; 1 is another subject of the class at random; then its parts.
           A second number is the probe's own floor: the same error of rendered scenes of the subject, as the prompts say
adherence  images with what their prompt asks for (place, action, accessory), over the base's
drift      (PRES - base PRES) / (ceiling - base PRES) of class pictures
seconds    of training, with choosing the checkpoint

Exits 1 where a mean of `test` misses its bar.
"""

import shutil
import statistics
import time
from pathlib import Path

import torch
import typer
from PIL import Image

import personalize
from personalize.commands.compare import read_rows
from personalize.common import prompts, run_folder
from personalize.common.bases import TOYLAND
from personalize.common.files import key_of, slug, write_text
from personalize.evaluation import encoders, image_cache, summary
from personalize.evaluation.metrics import toyland_truth
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject

FIRST = {"dev": HELD_OUT + 6_000_000, "test": HELD_OUT + 8_500_000}
CLASSES = {"dev": ("dog", "cat", "duck", "teapot"), "test": scenes.CLASSES}
PHOTOS = ("meadow", "beach", "room", "mountains", "snow")  # the places of the five photos
LOOK_ALIKES = 100
BARS = {"identity": (0.6, True), "first": (0.5, True), "error": (0.4, False), "adherence": (0.92, True),
        "drift": (0.10, False), "seconds": (100, False), "pattern": (0.6, False),
        "body": (0.3, False), "second": (0.3, False), "detail": (0.3, False)}  # fmt: skip
COLOURS = ("body", "second", "detail")  # for these it is enough to be so near to the probe's floor
NEAR_FLOOR = 0.05
WORST_IDENTITY = 0.6  # of a single subject
COLUMNS = (*BARS, "proportions", "ear", "tail")
ADHERENCE = ("true_place", "true_action", "true_accessory")


def seed_of(split: str, k: int) -> int:
    return FIRST[split] + 10 * k


def render_photos(seed: int, word: str) -> list[Image.Image]:
    """The five photos of the subject of a seed."""
    individual = sample_subject(seed, word)
    return [draw_scene(sample_scene(seed + k, subject=individual, place=place, action="standing", accessory=None))[0]
            for k, place in enumerate(PHOTOS)]  # fmt: skip


def floor(seed: int, word: str, *, count: int = 4) -> dict[str, float]:
    """The errors of rendered scenes of the subject as the test prompts say them: what a probe misreads of a perfect run."""
    probe, individual = toyland_truth.load_probe(), sample_subject(seed, word)
    images = []
    for k, prompt in enumerate(prompts.TOYLAND):
        asked = toyland_truth.wanted(prompt)
        accessory = (asked["accessory"], asked["accessory_colour"]) if "accessory" in asked else None
        words = {"place": asked.get("place", ""), "action": asked.get("action", "standing"), "accessory": accessory}
        for n in range(count):
            images.append(draw_scene(sample_scene(seed + 500 + 10 * k + n, subject=individual, **words))[0].convert("RGB"))
    read = lambda images: toyland_truth.read_images(probe, image_cache.load_tensors(images))  # noqa: E731
    errors = toyland_truth.errors(read(images), toyland_truth.of_photos(read(render_photos(seed, word))), word)
    parts = {part: value.mean().item() for part, value in errors.items()}
    return parts | {"error": statistics.mean(parts.values())}


def train(work: Path, seed: int, word: str, settings: list[str]) -> tuple[Path, float]:
    """The run of a subject and the seconds of its training; kept for the same settings."""
    name = f"{word}-{seed - HELD_OUT}"
    run, photos = work / f"runs-{key_of({'settings': settings})[:8]}" / name, work / "photos" / name
    seconds_file = run.with_suffix(".seconds")
    if not seconds_file.exists():
        photos.mkdir(parents=True, exist_ok=True)
        for k, photo in enumerate(render_photos(seed, word)):
            photo.save(photos / f"{k:02d}.png")
        shutil.rmtree(run, ignore_errors=True)
        result = personalize.train(
            photos, class_word=word, settings=settings, runs=run.parent / f"{name}.new", priors=work / "priors"
        )
        shutil.move(result.folder, run)
        write_text(seconds_file, f"{result.seconds:.1f}")
    return run, float(seconds_file.read_text())


def first(run: Path, seed: int, word: str, token: str) -> float:
    """The share of the evaluation's pictures of the subject that DINO holds nearer to its photos than to any look-alike's."""
    encoder = encoders.load_encoders(TOYLAND, "cpu")
    paths = sorted((run / "evaluation" / "pictures").glob(f"*/*-{slug(token)}-*.png"))
    images = encoder.dino(image_cache.load_tensors([Image.open(path).convert("RGB") for path in paths])).token
    others = [seed + 1000 * k for k in range(LOOK_ALIKES + 1)]  # the subject itself is the first
    albums = torch.stack([encoder.dino(image_cache.load_tensors(render_photos(each, word))).token for each in others])
    nearness = torch.einsum("nd,skd->nsk", images, albums).mean(2)
    return (nearness.argmax(1) == 0).float().mean().item()


def row(work: Path, seed: int, word: str, settings: list[str]) -> dict[str, float]:
    run, seconds = train(work, seed, word, settings)
    evaluation = personalize.evaluate(run)
    rows, scores = read_rows(evaluation.report.parent), evaluation.metrics["scores"]
    adherence = {kind: [r[name] for r in summary.of_kind(rows, kind) for name in ADHERENCE if r[name] is not None]
             for kind in ("subject", "base")}  # fmt: skip
    share = {kind: sum(values) / len(values) for kind, values in adherence.items()}
    token = run_folder.read_manifest(run)["subjects"][0]["token"]
    parts = {part: summary.interval(summary.of_kind(rows, "subject"), f"off_{part}") for part in toyland_truth.PARTS}
    return {part: value.mean for part, value in parts.items() if value} | {
        "identity": scores["dino"]["relative"],
        "first": first(run, seed, word, token),
        "error": summary.interval(summary.of_kind(rows, "subject"), "identity_error").mean,
        "adherence": share["subject"] / share["base"],
        "drift": evaluation.metrics["class"]["share"],
        "seconds": seconds,
    }


def main(work: Path, split: str = typer.Argument("dev"), settings: list[str] = typer.Argument([])) -> None:  # noqa: B008
    lines = [f"| subject | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    rows, floors, start = [], [], time.time()
    for k, word in enumerate(CLASSES[split]):
        rows.append(row(work, seed_of(split, k), word, list(settings)))
        floors.append(floor(seed_of(split, k), word))
        lines.append(table_line(word, rows[-1], floors[-1]))
        print(lines[-1], flush=True)
    means, least = ({name: mean_of(each, name) for name in COLUMNS} for each in (rows, floors))
    lines.append(table_line("**mean**", means, least))
    bars = {name: f"{'≥' if more else '≤'} {bar:g}" for name, (bar, more) in BARS.items()}
    lines.append(f"| bar | {' | '.join(bars.get(name, '') for name in COLUMNS)} |")
    missed = [name for name, (bar, more) in BARS.items() if not reached(name, means[name], least[name], bar, more)]
    missed += [f"identity of {word}" for word, each in zip(CLASSES[split], rows) if each["identity"] < WORST_IDENTITY]
    lines += ["", f"Missed: {', '.join(missed) or 'none'}."]
    text = "\n".join(
        [f"`python -m benchmarks.subjects WORK {' '.join([split, *settings])}`, {time.time() - start:.0f} s", "", *lines]
    )
    write_text(work / f"{split}-{key_of({'settings': settings})[:8]}.md", text + "\n")
    print(text)
    if split == "test" and missed:
        raise typer.Exit(1)


def mean_of(rows: list[dict], name: str) -> float | None:
    values = [each[name] for each in rows if each.get(name) is not None]
    return statistics.mean(values) if values else None


def reached(name: str, mean: float, floor: float | None, bar: float, more: bool) -> bool:
    near = name in COLOURS and mean <= floor + NEAR_FLOOR
    return near or (mean >= bar if more else mean <= bar)


def table_line(name: str, values: dict, floor: dict) -> str:
    cells = ["" if values.get(key) is None else f"{values[key]:.2f}" for key in COLUMNS]
    cells = [
        cell + (f" ({floor[key]:.2f})" if cell and floor.get(key) is not None else "") for key, cell in zip(COLUMNS, cells)
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
