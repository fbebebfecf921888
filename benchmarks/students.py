"""Does Toyland's student draw as its teacher does?    python -m benchmarks.students OUT [--base FOLDER] [--prompts N]

The default sampler, plain DDIM and the student draw the same prompts from the same noise, twice each. OUT gets students.md
and the sheet students.png: the default, the student and plain DDIM of as many steps. Columns:

class, accessory   images that show what the prompt asks for, as the probe reads them
KID                less that of rendered images of the same scenes, as benchmarks.toyland has it, with its standard error
diversity          patch distance of the two images of a prompt, over that of the teacher, DDIM in 8
seconds            of one core for an image, with its decoding
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor

import personalize
from benchmarks import toyland
from benchmarks.machine import machine
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.files import write_text, writing
from personalize.common.recipe_sections import SamplingConfig
from personalize.data.image_grid import grid
from personalize.evaluation import encoders
from personalize.evaluation.metrics import diversity, toyland_truth
from personalize.generation import sampling, students
from personalize.toyland.world.scenes import HELD_OUT, sample_scene

FIRST = HELD_OUT + 13_000_000  # seeds that no other part of the project uses
EACH, SHOWN = 2, 10


def generate(model, config: SamplingConfig, texts: list[str]) -> tuple[Tensor, float]:
    """N prompts -> (N,3,H,W) in [-1,1] and seconds of one core for each."""
    parts, began = [], time.process_time()
    for part in sampling.sampling_batches(model, len(texts), config):
        generators = sampling.image_generators(0, list(part), "students")
        z0 = sampling.sample_latents(model, [texts[k] for k in part], generators, config)
        parts.append(model.decode_latents(z0).float().cpu())
    return torch.cat(parts), (time.process_time() - began) / len(texts)


def score(bench: toyland.Bench, images: Tensor, texts: list[str], rendered: Tensor, others: Tensor) -> dict[str, float]:
    right = toyland_truth.prompt_adherence(toyland_truth.read_images(bench.probe, images), texts)
    seen = bench.encoder.dino(images)
    features = seen.token * seen.token.shape[1] ** 0.5
    kids = [toyland.excess(part, rendered, others, 8) for part in features.split(len(rendered))]
    distances = diversity.pairwise(diversity.patch_distance, seen.patches, texts)
    return {name: right[name].nanmean().item() for name in ("class", "accessory")} | {
        "KID": sum(k.value for k in kids) / EACH,
        "error": sum(k.error for k in kids) / EACH**1.5,
        "diversity": distances.nanmean().item(),
    }


def main(out: Path, base: Path = TOYLAND, prompts: int = 96) -> None:
    torch.set_num_threads(1)
    model = models.load_model(str(base), device="cpu", say=print)
    bench = toyland.Bench(model, encoders.load_encoders(TOYLAND, "cpu"), toyland_truth.load_probe(), prompts)
    scenes = [sample_scene(FIRST + k) for k in range(prompts)]
    texts = [toyland.prompt(scene) for scene in scenes] * EACH

    def features(images: Tensor) -> Tensor:
        token = bench.encoder.dino(images).token
        return token * token.shape[1] ** 0.5

    rendered = features(bench.render(scenes))
    others = features(bench.render([sample_scene(FIRST + 100_000 + k) for k in range(4 * prompts)]))
    usual, folder = personalize.resolve().draw, students.base_student(model)
    student = students.read_student(folder)
    plain = replace(usual, sampler="ddim")
    first, own = f"default, {usual.sampler} {usual.steps}", f"student {student['steps']}"
    rows = {first: usual} | {f"DDIM {n}": replace(plain, steps=n) for n in (8, 4, 2, 1)}
    rows[own] = students.own_sampling(usual, student)
    kept, images = {}, {}
    for name, config in rows.items():
        if name == own:
            students.put_student(model, folder, student)
        images[name], seconds = generate(model, config, texts)
        kept[name] = score(bench, images[name], texts, rendered, others) | {"seconds": seconds}
        print(name, kept[name], flush=True)
    lines = ["| | class | accessory | KID | diversity | seconds |", "|---|---|---|---|---|---|"]
    for name, row in kept.items():
        share = row["diversity"] / kept["DDIM 8"]["diversity"]
        kid = f"{row['KID']:.3f} ± {row['error']:.3f}"
        lines.append(f"| {name} | {row['class']:.2f} | {row['accessory']:.2f} | {kid} | {share:.2f} | {row['seconds']:.3f} |")
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.students OUT --prompts {prompts}"
    write_text(out / "students.md", "\n".join([*lines, "", f"`{command}`, {machine()}"]) + "\n")
    with writing(out / "students.png") as temporary:
        shown = (first, own, f"DDIM {student['steps']}")
        grid([image for name in shown for image in sampling.to_pil(images[name][:SHOWN])], SHOWN).save(temporary, "PNG")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
