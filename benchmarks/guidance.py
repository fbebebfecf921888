"""What guidance beyond CFG is worth on Toyland, by truth.    python -m benchmarks.guidance WORK glide|classes|likes [--count N]

glide    GLIDE's comparison (Nichol et al. 2112.10741, section 5) in small: CFG against CLIP guidance, CLIP-T beside truth and
         KID; and truth of CFG less that of CLIP guidance where their CLIP-T is nearest, paired
classes  Guided Diffusion's experiment (Dhariwal & Nichol 2105.05233): a classifier of the twelve classes; its accuracy at
         noise, and how often it draws the class that is wanted, from an empty prompt
likes    `--like` on the bare base and on top of a DreamBooth and a LoRA run of the subjects of benchmarks.subjects' dev split:
         identity error and adherence by truth, and the paired difference to scale 0

Writes WORK/guidance-PART.md. KID is less that of rendered images of the same scenes, as benchmarks.toyland has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor

import personalize
from benchmarks import subjects, toyland
from personalize import models
from personalize.common import prompts, run_folder
from personalize.common.bases import TOYLAND
from personalize.common.files import write_text
from personalize.common.recipe import recipe_from_dict
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.terminal import SILENT
from personalize.core import rng
from personalize.core.steering import STEERING
from personalize.evaluation import bootstrap, encoders
from personalize.evaluation.metrics import toyland_truth
from personalize.generation import sampling
from personalize.toyland.world.scenes import CLASSES, HELD_OUT, sample_scene, sample_subject
from personalize.training import load_run, noisy_classifier, steering

FIRST = HELD_OUT + 9_600_000  # seeds that no other part of the project uses
CFG, CLIP = (1, 1.5, 2.2, 3, 5), (0.5, 1, 2, 5)
CLASS_SCALES, LIKE_SCALES = (0, 1, 3, 10), (0, 1, 2, 3, 10)
CLASSIFIER = {"rows": (11,) * 12, "steps": 900, "width": 64}
TIMESTEPS = (0, 200, 400, 500, 600, 800, 900)
KID_PARTS = 10
ADHERENCE = ("place", "action", "accessory")
Values = dict[tuple, float]  # (prompt, number) of an image -> its score


def generate(model, texts: Sequence[str], config: SamplingConfig, steer: Callable | None = None) -> Tensor:
    """N prompts -> (N,3,H,W) in [-1,1]; steer: numbers of images -> what `sample_latents` takes."""
    parts = []
    for rows in sampling.sampling_batches(model, len(texts), config):
        generators = sampling.image_generators(0, list(rows), "guidance")
        wrap = steer and steer(list(rows))
        z0 = sampling.sample_latents(model, [texts[k] for k in rows], generators, config, steer=wrap)
        parts.append(model.decode_latents(z0).float().cpu())
    return torch.cat(parts)


def keyed(texts: Sequence[str], values: Tensor) -> Values:
    return {(text, k): value for k, (text, value) in enumerate(zip(texts, values.tolist(), strict=True))}


def mean(values: Values) -> float:
    return bootstrap.mean(list(values.values()), [key[:-1] for key in values])


def against(name: str, a: Values, b: Values) -> str:
    change = bootstrap.paired_difference(a, b)
    return f"{name}: {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def glide(work: Path, count: int, steps: int) -> list[str]:
    model = models.load_model(str(TOYLAND), device="auto", say=print)
    bench = toyland.Bench(model, encoders.load_encoders(model.folder, model.device), toyland_truth.load_probe(), count)
    scenes = [sample_scene(FIRST + k) for k in range(count)]
    texts = [toyland.prompt(scene) for scene in scenes]

    def features(images: Tensor) -> Tensor:
        rows = bench.encoder.dino(images).token
        return rows * rows.shape[1] ** 0.5

    rendered, words = bench.render(scenes), bench.encoder.clip_text(texts)
    others = features(bench.render([sample_scene(FIRST + 10_000 + k) for k in range(4 * count)]))
    ways = [(f"CFG {w:g}", [f"draw.guidance={w}"]) for w in CFG]
    ways += [(f"CLIP {s:g}", ["draw.guidance=1", f"draw.guide_clip={s}"]) for s in CLIP]
    ways += [("CFG 2.2 + CLIP 1", ["draw.guidance=2.2", "draw.guide_clip=1"])]
    rows, scored = [], {}
    for name, settings in (("rendered", None), *ways):
        images = rendered if settings is None else guided(model, texts, [*settings, f"draw.steps={steps}"], work)
        right = toyland_truth.prompt_adherence(toyland_truth.read_images(bench.probe, images), texts)
        clip_t = (bench.encoder.clip_image(images) * words).sum(1)
        excess = toyland.excess(features(images), features(rendered), others, parts=min(KID_PARTS, count // 2))
        scored[name] = clip_t.mean().item(), keyed(texts, torch.stack(list(right.values())).nanmean(0))
        truths = [f"{right[part].nanmean():.3f}" for part in toyland_truth.SCORED]
        rows.append([name, f"{scored[name][0]:.3f}", *truths, f"{excess.value:.4f} ± {excess.error:.4f}"])
        print(*rows[-1], flush=True)
    return [*table(["", "CLIP-T", *toyland_truth.SCORED, "KID"], rows), "", *equal_clip_t(scored)]


def guided(model, texts: list[str], settings: list[str], work: Path) -> Tensor:
    recipe = personalize.resolve(settings=settings)
    steer = steering.prepare(model, recipe, None, priors=work / "priors", screen=SILENT)
    return generate(model, texts, recipe.draw, steer and (lambda rows: steer.of([texts[k] for k in rows])))


def equal_clip_t(scored: dict[str, tuple[float, Values]]) -> list[str]:
    """Name -> CLIP-T and each image's truth: what truth the CFG row of the nearest CLIP-T has more than each CLIP row."""
    lines = []
    for name, (clip_t, truth) in scored.items():
        if name.startswith("CLIP"):
            nearest = min((n for n in scored if n.startswith("CFG") and "+" not in n), key=lambda n: abs(scored[n][0] - clip_t))
            lines.append("- " + against(f"truth of {nearest} less {name}, CLIP-T {scored[nearest][0]:.3f} and {clip_t:.3f}",
                                        scored[nearest][1], truth))  # fmt: skip
    return lines


def classes(work: Path, count: int, steps: int) -> list[str]:
    model = models.load_model(str(TOYLAND), device="auto", say=print)
    groups = [class_latents(model, k, 25 * count // len(CLASSES) + 1) for k in range(len(CLASSES))]
    network = noisy_classifier.train_classifier(groups, model.schedule, seed=0, advance=lambda: None, **CLASSIFIER)
    unseen = torch.cat([class_latents(model, k, count // len(CLASSES) + 1, first=500_000)[0] for k in range(len(CLASSES))])
    wanted = torch.arange(len(CLASSES), device=model.device).repeat_interleave(len(unseen) // len(CLASSES))
    eps = rng.normal(sampling.image_generators(0, range(len(unseen)), "classes"), unseen.shape[1:]).to(model.device)
    shares = []
    for t in TIMESTEPS:
        z_t = model.schedule.add_noise(unseen, eps, t)
        with torch.no_grad():
            read = network(z_t, torch.full((len(z_t),), t, device=model.device)).argmax(1)
        shares.append(f"{(read == wanted).float().mean():.2f}")
    lines, probe = [*table(["t", *map(str, TIMESTEPS)], [["accuracy", *shares]]), ""], toyland_truth.load_probe()
    aims, rows = torch.arange(count) % len(CLASSES), []
    for scale in CLASS_SCALES:

        def steer(numbers: list[int], scale=scale):
            own = aims[numbers].to(model.device)
            gradient = lambda part: noisy_classifier.class_gradient(network, own[part])  # noqa: E731
            return lambda guided, part: STEERING["classified"](guided, model.schedule, gradient(part), scale)

        images = generate(model, [""] * count, SamplingConfig("ddpm", steps, 1.0), steer)
        seen = toyland_truth.read_images(probe, images).chances["class"].argmax(1)
        meant = torch.tensor([toyland_truth.TABLES["class"].index(CLASSES[k]) for k in aims.tolist()])
        rows.append([f"{scale:g}", f"{(seen == meant).float().mean():.2f}"])
        print(*rows[-1], flush=True)
    return lines + table(["scale", "the class that is wanted"], rows)


def class_latents(model, k: int, count: int, first: int = 100_000) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations (N,C,h,w) of rendered scenes of a class."""
    seeds = [FIRST + first + 10_000 * k + i for i in range(count)]
    scenes = [sample_scene(seed, subject=sample_subject(seed, CLASSES[k])) for seed in seeds]
    images = toyland.Bench(model, None, None, 0).render(scenes)
    mean, std = zip(*(model.encode_images(part) for part in images.split(64)))
    return torch.cat(mean), torch.cat(std)


def likes(work: Path, count: int, steps: int) -> list[str]:
    probe, rows, lines = toyland_truth.load_probe(), [], []
    for source, methods in (("base", "full"), ("DreamBooth", "full"), ("LoRA", "lora")):
        scores: dict[float, tuple[Values, Values]] = {scale: ({}, {}) for scale in LIKE_SCALES}
        for k, word in enumerate(subjects.CLASSES["dev"]):
            seed = subjects.seed_of("dev", k)
            run, _ = subjects.train(work, seed, word, [f"train.methods={methods}"])
            for scale in LIKE_SCALES:
                error, right = liked(work, run, seed, word, probe, scale=scale, count=count, steps=steps, base=source == "base")
                scores[scale][0].update({(word, *key): value for key, value in error.items()})
                scores[scale][1].update({(word, *key): value for key, value in right.items()})
        for scale, (error, right) in scores.items():
            rows.append([source, f"{scale:g}", f"{mean(error):.3f}", f"{mean(right):.3f}"])
            print(*rows[-1], flush=True)
            if scale:
                what = f"{source}, --like {scale:g} less without"
                lines.append(f"- {against(f'{what}: error', error, scores[0][0])}; {against('adherence', right, scores[0][1])}")
    return [*table(["on", "--like", "identity error", "adherence"], rows), "", *lines]


def liked(work: Path, run: Path, seed: int, word: str, probe, *, scale: float, count: int, steps: int, base: bool):
    """`count` images of each of Toyland's test prompts by a run or its bare base -> identity error and adherence by truth."""
    manifest = load_run.require_run(run)
    recipe = recipe_from_dict(manifest["recipe"], str(run))
    recipe = replace(recipe, draw=replace(recipe.draw, like=scale, steps=steps))
    model = models.load_model(recipe.base, device="auto", say=lambda line: None)
    steer = steering.prepare(model, recipe, steering.of_run(run, manifest), priors=work / "priors", screen=SILENT)
    token = run_folder.read_manifest(run)["subjects"][0]["token"]
    if not base:
        load_run.load_run(model, run, manifest)
    texts = [prompts.fill(template, "" if base else token, word) for template in prompts.TOYLAND for _ in range(count)]
    images = generate(model, texts, recipe.draw, steer and (lambda rows: steer.of([texts[k] for k in rows])))
    reading = toyland_truth.read_images(probe, images)
    error = toyland_truth.errors(reading, toyland_truth.parameters(sample_subject(seed, word)), word)
    right = toyland_truth.prompt_adherence(reading, texts, word)
    right = torch.stack([right[part] for part in ADHERENCE]).nanmean(0)
    return keyed(texts, toyland_truth.identity_error(error)), keyed(texts, right)


PARTS = {"glide": glide, "classes": classes, "likes": likes}


def main(work: Path, part: str, count: int = 200, steps: int = 16) -> None:
    """count: prompts of glide; images of a scale of classes, which trains on 25 times as many; images of a prompt of likes."""
    command = f"`python -m benchmarks.guidance WORK {part} --count {count} --steps {steps}`"
    lines = [command, "", *PARTS[part](work, count, steps)]
    write_text(work / f"guidance-{part}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
