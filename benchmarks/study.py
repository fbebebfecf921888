"""Runs on held-out Toyland subjects that `choosing` and `paper_tables` look at: trained once, kept in a work folder.

The recipe is the shipped one; subjects have seeds that no other part of the project uses.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import personalize
from personalize.commands.compare import read_rows
from personalize.common import run_folder
from personalize.evaluation import summary
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT

FIRST = HELD_OUT + 2_000_000
CLASSES = ("dog", "cat", "duck", "teapot", "car", "robot", "dog", "cat")
PHOTOS = ("meadow", "beach", "room", "mountains")  # the places of the four photos
WRONG = {"dog": "teapot", "cat": "car", "duck": "robot", "teapot": "cat", "car": "duck", "robot": "dog"}
DEFAULT = 200  # steps of the shipped recipe; its lr is constant, so these are the first steps of a longer run, bit for bit
EVERY = ["train.checkpoint_every=100", "train.keep=1000", "choose.every=0"]

VARIANTS = {
    "long": [f"train.steps={3 * DEFAULT}"],
    "without": [f"train.steps={DEFAULT}", "prior.count=0"],
    "wrong": [f"train.steps={DEFAULT}", "prior.count=0"],
    "wrong-prior": [f"train.steps={DEFAULT}"],
    "none": [f"train.steps={DEFAULT}", "prior.count=0", "train.prompt=a {token}"],
    "inversion": ['train.methods=["textual-inversion"]'],
}


@dataclass(frozen=True)
class Study:
    """A work folder, the subjects in it, and pictures of a prompt."""

    work: Path
    subjects: int = len(CLASSES)

    def names(self) -> list[str]:
        return [f"{k}-{word}" for k, word in enumerate(CLASSES[: self.subjects])]

    def train(self, variant: str) -> list[Path]:
        """The runs of a variant, one a subject; those that are finished are not trained again."""
        return [self.run(k, variant, [*EVERY, *VARIANTS[variant]]) for k in range(self.subjects)]

    def rows(self, run: Path, checkpoint: str = "", *, templates: tuple[str, ...] = ()) -> list[dict]:
        """The rows of an evaluation by Toyland's prompts; templates for those without a class word."""
        settings = [f"evaluate.prompts={list(templates)}".replace("'", '"')] if templates else []
        return read_rows(personalize.evaluate(run, checkpoint=checkpoint, settings=settings).report.parent)

    def run(self, k: int, variant: str, settings: list[str]) -> Path:
        """The run of a subject with these settings, which `variant` names; kept."""
        name, word = self.names()[k], CLASSES[k]
        folder, photos = self.work / "runs" / f"{name}-{variant}", self.work / "photos" / name
        if (folder / "manifest.json").exists() and run_folder.read_manifest(folder)["status"] == "finished":
            return folder
        subject = scenes.sample_subject(FIRST + 1000 * k, word)
        photos.mkdir(parents=True, exist_ok=True)
        for j, place in enumerate(PHOTOS):
            scene = scenes.sample_scene(FIRST + 1000 * k + j, subject=subject, place=place, action="standing", accessory=None)
            draw_scene(scene)[0].save(photos / f"{j:02d}.png")
        class_word = WRONG[word] if variant.startswith("wrong") else word
        trained = personalize.train(
            photos, class_word=class_word, settings=settings, runs=self.work / "new", priors=self.work / "priors"
        ).folder
        folder.parent.mkdir(exist_ok=True)
        shutil.move(trained, folder)
        print(f"trained {folder.name}", flush=True)
        return folder


def values(rows: list[dict], kind: str, name: str, subject: str) -> dict:
    """(subject, template without class word, number) -> value: what variants are paired by."""
    scores = summary.keyed(summary.of_kind(rows, kind), name)
    return {(subject, template.replace(" {class}", ""), number): value for (template, number), value in scores.items()}
