"""Few steps on Toyland, by sampler and by student.    python -m benchmarks.few_steps WORK [--gan FOLDER] [--student FOLDER]

Each row draws the same prompts from the same noise. WORK/rows keeps what a row measured, and the same command goes on with
those that are missing; then WORK gets few-steps.md and few-steps.png. Columns:

class, place, action, accessory   images that show what the prompt asks for, as the probe reads them
KID        less that of rendered images of the same scenes, as benchmarks.toyland has it, with its standard error
DIV        patch distance of two images of a prompt, and over that of the teacher, DDIM in 8
identity   error by truth of a DreamBooth run of benchmarks.subjects' dog; 1 is another dog at random
seconds    of one core for an image, decoded

Brackets are 95 % intervals over prompts. Without a sampler's guidance a student is drawn at scale 1: it has it inside.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor

import personalize
from benchmarks import ddgan, subjects, toyland
from benchmarks.machine import machine
from personalize import models
from personalize.common import prompts, run_folder
from personalize.common.bases import TOYLAND
from personalize.common.files import read_json, write_json, write_text, writing
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.data.image_grid import grid
from personalize.evaluation import bootstrap, encoders
from personalize.evaluation.metrics import diversity, toyland_truth
from personalize.generation import sampling
from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject
from personalize.training import load_run

FIRST = HELD_OUT + 12_000_000  # seeds that no other part of the project uses
STEPS = (1, 2, 4, 8, 25)
SAMPLERS = {"DDIM": "ddim", "DPM++2M": "dpm++2m", "LCM": "lcm"}
TEACHER = "DDIM-8"
EACH = 2  # images of a prompt, whose distance is DIV
PERSONAL = 2  # images of each of Toyland's test prompts
KID_PARTS = 8
SHOWN = 8
NAME_WIDTH = 96  # px, beside a row of the sheet
SUBJECT = "dog"
# steps -> column -> what a student must reach; the second: at most
BARS = {
    2: {"accessory": (0.8, False), "KID": (0.06, True), "diversity": (0.9, False)},
    1: {"class": (0.95, False), "KID": (0.15, True), "diversity": (0.9, False)},
}
Draw = Callable[[models.interface.LatentModel, list[str], list[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Row:
    """A line of the table. draw: (model, B prompts, their generators) -> z0 (B,C,h,w) with such noise as `config` says."""

    method: str
    steps: int
    draw: Draw
    prepare: Callable[[models.interface.LatentModel], object] | None = None  # puts a student into a fresh base or run
    personal: Path | None = None  # a run whose identity is measured
    student: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.steps}"


def by_sampler(config: SamplingConfig) -> Draw:
    return lambda model, texts, generators: sampling.sample_latents(model, texts, generators, config)


def by_gan(network, steps: int) -> Draw:
    def draw(model, texts: list[str], generators: list[torch.Generator]) -> Tensor:
        noise = rng.normal(generators, sampling.latent_shape(model, model.size))
        with torch.inference_mode():
            sample = ddgan.make_sampler(network, model.encode_prompts(texts)["text"])
            return sample(None, noise, model.schedule, steps, generators=generators)

    return draw


def sampler_rows(guidance: float, personal: Path | None) -> Iterator[Row]:
    for method, sampler in SAMPLERS.items():
        for steps in STEPS:
            yield Row(method, steps, by_sampler(SamplingConfig(sampler, steps, guidance)), personal=personal)


def student_rows(folder: Path, personal: Path | None) -> Iterator[Row]:
    """The base's own student, with the steps that it has; its LoRA is put onto the personalized run too."""
    if not folder.exists():
        return
    from personalize.generation import students

    student = students.read_student(folder)
    config = students.own_sampling(SamplingConfig(), student)
    prepare = lambda model: students.put_student(model, folder, student)  # noqa: E731
    yield Row("distilled", config.steps, by_sampler(config), prepare, personal, student=True)


def gan_rows(model, folder: Path) -> Iterator[Row]:
    network = ddgan.load(model, folder)
    for steps in (2, 1):
        yield Row("DDGAN", steps, by_gan(network, steps), student=True)


@dataclass(frozen=True)
class Judge:
    """The prompts, what reads an image, and rendered images to hold them against."""

    bench: toyland.Bench
    texts: list[str]
    rendered: Tensor  # (N,D) features of the prompts' own scenes
    others: Tensor  # (4N,D)

    def score(self, images: Tensor) -> dict:
        """(EACH·N,3,H,W), the prompts in order EACH times -> what is kept of a row, values image by image."""
        texts = self.texts * (len(images) // len(self.texts))
        right = toyland_truth.prompt_adherence(toyland_truth.read_images(self.bench.probe, images), texts)
        patches = self.bench.encoder.dino(images).patches
        parts = min(KID_PARTS, len(self.texts) // 2)
        kids = [toyland.excess(features(self.bench, part), self.rendered, self.others, parts)
                for part in images.split(len(self.texts))]  # fmt: skip
        kid = [sum(k.value for k in kids) / len(kids), sum(k.error for k in kids) / len(kids) ** 1.5]
        values = {name: numbers(value) for name, value in right.items()}
        return values | {"diversity": numbers(diversity.pairwise(diversity.patch_distance, patches, texts)), "KID": kid}


def numbers(values: Tensor) -> list[float | None]:
    """As JSON has them: None for what was not asked."""
    return [None if value != value else value for value in values.tolist()]


def features(bench: toyland.Bench, images: Tensor) -> Tensor:
    token = bench.encoder.dino(images).token
    return token * token.shape[1] ** 0.5


def make_judge(model, count: int) -> Judge:
    bench = toyland.Bench(model, encoders.load_encoders(TOYLAND, "cpu"), toyland_truth.load_probe(), count)
    scenes = [sample_scene(FIRST + k) for k in range(count)]
    others = features(bench, bench.render([sample_scene(FIRST + 100_000 + k) for k in range(4 * count)]))
    return Judge(bench, [toyland.prompt(scene) for scene in scenes], features(bench, bench.render(scenes)), others)


def generate(row: Row, model, texts: Sequence[str]) -> Tensor:
    """N prompts -> (N,3,H,W) in [-1,1]; noise and prompt of an image are its own in every row."""
    parts = []
    for part in sampling.sampling_batches(model, len(texts), SamplingConfig(steps=row.steps)):
        z0 = row.draw(model, [texts[k] for k in part], sampling.image_generators(0, part, "few steps"))
        parts.append(model.decode_latents(z0).float().cpu())
    return torch.cat(parts)


def identity(row: Row, base: str) -> list[float]:
    """The error of each image that the personalized run draws of Toyland's test prompts."""
    model = fresh(base, row, row.personal)
    token = run_folder.read_manifest(row.personal)["subjects"][0]["token"]
    texts = [prompts.fill(template, token, SUBJECT) for template in prompts.TOYLAND for _ in range(PERSONAL)]
    reading = toyland_truth.read_images(toyland_truth.load_probe(), generate(row, model, texts))
    truth = toyland_truth.parameters(sample_subject(subjects.seed_of("dev", 0), SUBJECT))
    return toyland_truth.identity_error(toyland_truth.errors(reading, truth, SUBJECT)).tolist()


def fresh(base: str, row: Row, run: Path | None = None):
    """The base, with a run's weights if there is one, and the row's student."""
    model = models.load_model(base, device="cpu", say=lambda line: None)
    if run:
        load_run.load_run(model, run, load_run.require_run(run))
    if row.prepare:
        row.prepare(model)
    return model


def measure(row: Row, judge: Judge, work: Path) -> dict:
    """What a row measured, kept in WORK/rows for the same prompts."""
    path, asked = work / "rows" / f"{row.name}.json", {"prompts": len(judge.texts), "each": EACH}
    if path.exists() and read_json(path)["asked"] == asked:
        return read_json(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    base = str(judge.bench.model.folder)
    model = fresh(base, row) if row.prepare else judge.bench.model
    began = time.process_time()
    images = generate(row, model, judge.texts * EACH)
    seconds = (time.process_time() - began) / len(images)
    with writing(path.with_suffix(".png")) as temporary:
        grid(sampling.to_pil(images[:SHOWN]), SHOWN).save(temporary, "PNG")
    kept = {"asked": asked, "seconds": seconds, "student": row.student, "steps": row.steps, "method": row.method}
    kept |= judge.score(images) | ({"identity": identity(row, base)} if row.personal else {})
    write_json(path, kept)
    print(f"{row.name}: {seconds:.3f} s an image", flush=True)
    return kept


def shares(row: dict, clusters: Sequence[tuple], teacher: float | None) -> dict[str, float]:
    """What the bars are about."""
    values = {column: bootstrap.mean(plain(row[column]), clusters) for column in ("class", "accessory")} | {
        "KID": row["KID"][0]
    }
    return values | ({"diversity": bootstrap.mean(row["diversity"], clusters) / teacher} if teacher else {})


def report(kept: dict[str, dict], texts: Sequence[str]) -> list[str]:
    """Row's name -> what `measure` gave -> the table, by steps, and what each student with bars misses."""
    clusters, templates = ([(text,) for text in many] * times for many, times in ((texts, EACH), (prompts.TOYLAND, 1)))
    teacher = bootstrap.mean(kept[TEACHER]["diversity"], clusters) if TEACHER in kept else None
    columns = [*toyland_truth.SCORED, "KID", "DIV", "of the teacher's", "identity", "seconds"]
    lines, verdicts = [f"| steps | | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"], []
    for name, row in sorted(kept.items(), key=lambda item: item[1]["steps"]):
        means = shares(row, clusters, teacher)
        cells = [cell(row[column], clusters) for column in toyland_truth.SCORED]
        cells += [f"{row['KID'][0]:.3f} ± {row['KID'][1]:.3f}", cell(row["diversity"], clusters, digits=3)]
        cells += [f"{means['diversity']:.2f}" if teacher else ""]
        cells += [cell(row.get("identity", []), [each for each in templates for _ in range(PERSONAL)]), f"{row['seconds']:.3f}"]
        lines.append(f"| {row['steps']} | {row['method']} | {' | '.join(cells)} |")
        bars = BARS.get(row["steps"], {}) if row["student"] else {}
        missed = [
            f"{column} {means[column]:.3f}, which must be {'≤' if most else '≥'} {bar:g}"
            for column, (bar, most) in bars.items()
            if column in means and not reached(means[column], bar, most)
        ]
        if bars:
            verdicts.append(f"- {name}: {'misses ' + '; '.join(missed) if missed else 'reaches every bar'}.")
    return [*lines, "", *verdicts]


def cell(values: Sequence[float | None], clusters: Sequence[tuple], digits: int = 2) -> str:
    each = bootstrap.bootstrap_interval(plain(values), clusters) if values else None
    return "" if each is None else f"{each.mean:.{digits}f} ({each.low:.{digits}f} to {each.high:.{digits}f})"


def plain(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def reached(value: float, bar: float, most: bool) -> bool:
    return value <= bar if most else value >= bar


def sheet(kept: dict[str, dict], work: Path) -> Image.Image:
    """The first images of each row, its name on their left."""
    strips = []
    for name, _ in sorted(kept.items(), key=lambda item: item[1]["steps"]):
        images = Image.open(work / "rows" / f"{name}.png")
        strip = Image.new("RGB", (images.width + NAME_WIDTH, images.height), "white")
        ImageDraw.Draw(strip).text((4, images.height // 2 - 6), name, fill="black")
        strip.paste(images, (NAME_WIDTH, 0))
        strips.append(strip)
    return grid(strips, 1)


def run(work: Path, rows: Sequence[Row], judge: Judge, command: str) -> None:
    kept = {row.name: measure(row, judge, work) for row in rows}
    lines = [f"`{command}`, {machine()}", "", *report(kept, judge.texts)]
    write_text(work / "few-steps.md", "\n".join(lines) + "\n")
    with writing(work / "few-steps.png") as temporary:
        sheet(kept, work).save(temporary, "PNG")
    print("\n".join(lines))


def main(
    work: Path,
    prompts: int = 32,
    gan: Path = typer.Option(None, help="a folder of benchmarks.ddgan_training"),  # noqa: B008
    student: Path = typer.Option(TOYLAND / "student", help="a student of the base, by pretrain --part student"),  # noqa: B008
) -> None:
    torch.set_num_threads(1)
    judge = make_judge(models.load_model(str(TOYLAND), device="cpu", say=print), prompts)
    personal, _ = subjects.train(work / "subject", subjects.seed_of("dev", 0), SUBJECT, ["train.methods=full"])
    rows = list(sampler_rows(personalize.resolve().draw.guidance, personal))
    rows += student_rows(student, personal)
    rows += gan_rows(judge.bench.model, gan) if gan else []
    rows.sort(key=lambda row: row.steps)
    options = " --gan GAN" * bool(gan) + " --student STUDENT" * student.exists()
    run(work, rows, judge, f"python -m benchmarks.few_steps WORK --prompts {prompts}{options}")


if __name__ == "__main__":
    typer.run(main)
