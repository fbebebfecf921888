"""Does DreamBooth learn Toyland's subjects?    python -m benchmarks.subjects WORK [dev|test] [KEY=VALUE …]

Recipes are searched on the four subjects of `dev` and reported, untouched, on the twelve of `test`, one of each class;
no other part of the project uses their seeds. A row is a subject, trained by `personalize train` with the settings given
and evaluated on Toyland's test prompts with fresh noise:

identity   (DINO - floor) / (ceiling - floor): 0 is the base's own class pictures, 1 the photos among each other
first      pictures that are nearer to the subject's photos than to those of any of 100 look-alikes of its class, by DINO
error      of the identity parameters as the probe reads them; 1 is another subject of the class at random
adherence  images with what their prompt asks for (place, action, accessory), over the base's
drift      (PRES - base PRES) / (ceiling - base PRES) of class pictures
seconds    of training, with choosing the checkpoint

Exits 1 where a mean of `test` misses its bar.
"""

import shutil
import time
from pathlib import Path

import torch
import typer
from PIL import Image

import personalize
from personalize.commands.compare import read_rows
from personalize.common import run_folder
from personalize.common.bases import TOYLAND
from personalize.common.files import key_of, slug, write_text
from personalize.evaluation import encoders, image_cache, summary
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject

FIRST = {"dev": HELD_OUT + 6_000_000, "test": HELD_OUT + 8_000_000}
CLASSES = {"dev": ("dog", "cat", "duck", "teapot"), "test": scenes.CLASSES}
PHOTOS = ("meadow", "beach", "room", "mountains", "snow")  # the places of the five photos
LOOK_ALIKES = 100
BARS = {"identity": (0.6, True), "first": (0.5, True), "error": (0.5, False), "adherence": (0.85, True),
        "drift": (0.15, False), "seconds": (90, False)}  # fmt: skip
ADHERENCE = ("true_place", "true_action", "true_accessory")


def seed_of(split: str, k: int) -> int:
    return FIRST[split] + 10 * k


def render_photos(seed: int, word: str) -> list[Image.Image]:
    """The five photos of the subject of a seed."""
    individual = sample_subject(seed, word)
    return [draw_scene(sample_scene(seed + k, subject=individual, place=place, action="standing", accessory=None))[0]
            for k, place in enumerate(PHOTOS)]  # fmt: skip


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
    return {
        "identity": scores["dino"]["relative"],
        "first": first(run, seed, word, token),
        "error": summary.interval(summary.of_kind(rows, "subject"), "identity_error").mean,
        "adherence": share["subject"] / share["base"],
        "drift": evaluation.metrics["class"]["share"],
        "seconds": seconds,
    }


def main(work: Path, split: str = typer.Argument("dev"), settings: list[str] = typer.Argument([])) -> None:  # noqa: B008
    lines = ["| subject | " + " | ".join(BARS) + " |", "|---|" + "---|" * len(BARS)]
    rows, start = [], time.time()
    for k, word in enumerate(CLASSES[split]):
        rows.append(row(work, seed_of(split, k), word, list(settings)))
        lines.append(f"| {word} | " + " | ".join(f"{rows[-1][name]:.2f}" for name in BARS) + " |")
        print(lines[-1], flush=True)
    means = {name: sum(r[name] for r in rows) / len(rows) for name in BARS}
    lines.append("| **mean** | " + " | ".join(f"{means[name]:.2f}" for name in BARS) + " |")
    lines.append("| bar | " + " | ".join(f"{'≥' if more else '≤'} {bar:g}" for bar, more in BARS.values()) + " |")
    text = "\n".join(
        [f"`python -m benchmarks.subjects WORK {' '.join([split, *settings])}`, {time.time() - start:.0f} s", "", *lines]
    )
    write_text(work / f"{split}-{key_of({'settings': settings})[:8]}.md", text + "\n")
    print(text)
    reached = all((means[n] >= bar) if more else (means[n] <= bar) for n, (bar, more) in BARS.items())
    if split == "test" and not reached:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
