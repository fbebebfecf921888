"""Is Toyland good enough to judge by?    python -m benchmarks.toyland [--base FOLDER] [--out DIR] [--pictures N]

Generates images of prompts that pretraining cannot have seen, and reads them with the probes, which have seen rendered images
only. Beside each share stands what the probe reads on drawn scenes of the same truth: its ceiling. Writes DIR/toyland.json
and the image DIR/toyland.png, prints the table, and exits 1 where a number is less than it must be.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import personalize
from benchmarks.machine import machine
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.files import write_json, writing
from personalize.common.recipe_sections import SamplingConfig
from personalize.data.image_grid import grid
from personalize.evaluation import encoders, image_cache
from personalize.evaluation.metrics import toyland_truth
from personalize.generation import sampling
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import (
    ACTIONS,
    CLASSES,
    HELD_OUT,
    PLACES,
    Scene,
    accessory_words,
    colour_word,
    sample_scene,
    sample_subject,
    with_article,
)

FIRST = HELD_OUT + 5_000_000  # seeds of the scenes, which no other part of the project uses
SHOWN = 40  # images on the sheet
STEPS = 25
DOGS = 64
RIVALS = 100  # subjects of a class, and captions, among which the right one is found
SETS = 5  # of RIVALS captions


@dataclass(frozen=True)
class Bar:
    """A number, what it must be and is aimed at, and what rendered images reach; `at_most`: less is better."""

    name: str
    value: float
    bound: float
    aim: float
    ceiling: float | None = None
    unit: str = ""
    at_most: bool = False

    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def row(self) -> str:
        ceiling = "" if self.ceiling is None else f"{self.ceiling:.3g}"
        sign, star = ("≤", "≥")[not self.at_most], "" if self.met() else " **missed**"
        return f"| {self.name} | {self.value:.3g}{self.unit}{star} | {sign} {self.bound:g} | {self.aim:g} | {ceiling} |"


@dataclass(frozen=True)
class Bench:
    """What is judged, and with what."""

    model: models.interface.LatentModel
    encoder: encoders.Encoders
    probe: toyland_truth.Probe
    count: int

    def scenes(self, count: int, first: int = 0) -> list[Scene]:
        return [sample_scene(FIRST + first + k) for k in range(count)]

    def generate(self, prompts: list[str], *, seed: int) -> Tensor:
        """(N,3,H,W) in [-1,1], with the base's default guidance."""
        sampling_config = SamplingConfig("ddpm", STEPS, personalize.resolve().draw.guidance)  # DDIM with eta = 1
        parts = []
        for rows in sampling.sampling_batches(self.model, len(prompts), sampling_config):
            generators = sampling.image_generators(seed, list(rows), "benchmark")
            z0 = sampling.sample_latents(self.model, [prompts[k] for k in rows], generators, sampling_config)
            parts.append(self.model.decode_latents(z0).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        parts = images.split(sampling.default_batch_size(self.model, self.model.size))
        return torch.cat([self.model.decode_latents(self.model.encode_images(part)[0]).float().cpu() for part in parts])

    def render(self, scenes: list[Scene]) -> Tensor:
        return image_cache.load_tensors([draw_scene(scene, self.model.size)[0] for scene in scenes])


def prompt(scene: Scene) -> str:
    """Everything there is to say: "a blue dog wearing a red hat, jumping on the beach"."""
    noun = with_article(f"{colour_word(scene.subject.body)} {scene.subject.class_word}")
    accessory = f" {accessory_words(scene.accessory)}," if scene.accessory else ""
    return f"{noun}{accessory} {ACTIONS[scene.action]} {PLACES[scene.place]}"


def prompt_adherence(bench: Bench, scenes: list[Scene], images: Tensor) -> dict[str, float]:
    """The share of images that show what the prompt asks for: class, place, action, accessory, and the colour words."""
    reading, prompts = toyland_truth.read_images(bench.probe, images), [prompt(scene) for scene in scenes]
    shares = {name: right.nanmean().item() for name, right in toyland_truth.prompt_adherence(reading, prompts).items()}
    colours = torch.tensor([toyland_truth.TABLES["colour"].index(colour_word(scene.subject.body)) for scene in scenes])
    with_accessory = [k for k, scene in enumerate(scenes) if scene.accessory]
    table = toyland_truth.TABLES["accessory_colour"]
    accessory_colours = torch.tensor([table.index(scenes[k].accessory.colour) for k in with_accessory])
    accessory_chances = reading.chances["accessory_colour"][with_accessory]
    return shares | {
        "colour word": (reading.chances["colour"].argmax(1) == colours).float().mean().item(),
        "accessory's colour": (accessory_chances.argmax(1) == accessory_colours).float().mean().item(),
    }


def spread(bench: Bench, images: Tensor) -> float:
    """(N,3,H,W) of dogs -> the mean difference of two of them by the probe, over that of two at random by their truth."""
    reading = toyland_truth.read_images(bench.probe, images)
    rows = [toyland_truth.Reading(*({k: v[i : i + 1] for k, v in part.items()} for part in (reading.chances, reading.values)))
            for i in range(len(images))]  # fmt: skip
    parts = (toyland_truth.errors(reading, toyland_truth.of_photos(row), "dog") for row in rows)
    differences = torch.stack([toyland_truth.identity_error(each) for each in parts])
    return (differences.sum() - differences.diagonal().sum()).item() / (len(images) * (len(images) - 1))


def kid(a: Tensor, b: Tensor) -> float:
    """(N,D), (M,D) features -> the unbiased squared MMD with the kernel (x·y/D + 1)³ (Bińkowski et al. 1801.01401)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1).pow(3)

    def within(x: Tensor) -> Tensor:
        products = kernel(x, x)
        return (products.sum() - products.diagonal().sum()) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


@dataclass(frozen=True)
class Excess:
    """KID of images less that of rendered ones of the same scenes, which is 0 but for chance; `error`: the standard error."""

    value: float
    error: float


def excess(images: Tensor, rendered: Tensor, others: Tensor, parts: int = 10) -> Excess:
    """(N,D) features of images, of rendered ones of the same scenes, and (M,D) of others."""

    def difference(rows: slice) -> float:
        return kid(images[rows], others) - kid(rendered[rows], others)

    differences = torch.tensor([difference(slice(k, None, parts)) for k in range(parts)])
    return Excess(difference(slice(None)), differences.std().item() / parts**0.5)


def realism(bench: Bench, images: Tensor, scenes: list[Scene]) -> tuple[Excess, Excess]:
    """KID of generated images and of the VAE's reconstructions, four times as many, against other rendered images.

    On the identity encoder: the CLIP tower cannot tell reconstructions from rendered images.
    """

    def features(batch: Tensor) -> Tensor:
        rows = bench.encoder.dino(batch).token
        return rows * rows.shape[1] ** 0.5  # unit lengths to unit deviations, which the kernel is made for

    others = features(bench.render(bench.scenes(4 * len(scenes), first=100_000)))
    more = bench.render(bench.scenes(4 * len(scenes), first=200_000))
    return (excess(features(images), features(bench.render(scenes)), others),
            excess(features(bench.reconstruct(more)), features(more), others))  # fmt: skip


def multiple(generated: Excess, reconstructed: Excess) -> float:
    """Infinite where the reconstructions' is within twice its error: a multiple of nothing says nothing."""
    return max(generated.value, 0.0) / reconstructed.value if reconstructed.value > 2 * reconstructed.error else float("inf")


def psnr(bench: Bench, scenes: list[Scene]) -> float:
    """dB, the mean over images, of what the VAE makes of rendered ones; their values span 2."""
    rendered = bench.render(scenes)
    return (10 * (4 / (bench.reconstruct(rendered) - rendered).square().flatten(1).mean(1)).log10()).mean().item()


def identity_accuracy(bench: Bench) -> float:
    """How often the identity encoder finds a subject first among RIVALS of its class, by one other scene; over all classes."""
    accuracies = []
    for c, word in enumerate(CLASSES):
        subjects = [sample_subject(FIRST + 1000 * c + k, word) for k in range(RIVALS)]
        views = [bench.encoder.dino(bench.render([sample_scene(FIRST + 200_000 + 1000 * c + v * RIVALS + k, subject=one)
                 for k, one in enumerate(subjects)])).token for v in range(2)]  # fmt: skip
        accuracies.append(((views[0] @ views[1].T).argmax(1) == torch.arange(RIVALS)).float().mean())
    return torch.stack(accuracies).mean().item()


def retrieval_accuracy(bench: Bench) -> float:
    """How often a caption's image comes first among RIVALS whose captions differ, and the reverse."""
    accuracies = []
    for part in range(SETS):
        scene_by_prompt = {}
        for scene in bench.scenes(3 * RIVALS, first=300_000 + part * 1000):
            scene_by_prompt.setdefault(prompt(scene), scene)
        texts = list(scene_by_prompt)[:RIVALS]
        rendered = bench.render([scene_by_prompt[t] for t in texts])
        similarities = bench.encoder.clip_text(texts) @ bench.encoder.clip_image(rendered).T
        accuracies += [(similarities.argmax(d) == torch.arange(RIVALS)).float().mean() for d in (0, 1)]
    return torch.stack(accuracies).mean().item()


def measure(bench: Bench) -> tuple[list[Bar], Tensor, list[Scene], dict[str, float]]:
    scenes = bench.scenes(bench.count)
    images = bench.generate([prompt(scene) for scene in scenes], seed=1)
    right, ceiling = prompt_adherence(bench, scenes, images), prompt_adherence(bench, scenes, bench.render(scenes))
    dogs = [sample_scene(FIRST + 400_000 + k, subject=sample_subject(FIRST + 400_000 + k, "dog")) for k in range(DOGS)]
    rendered_spread = spread(bench, bench.render(dogs))
    same_prompt = bench.generate(["a dog"] * DOGS, seed=2)
    generated, reconstructed = realism(bench, images, scenes)
    bars = [Bar("VAE, PSNR of unseen scenes", psnr(bench, scenes), 27, 32, unit=" dB")]
    bars += [Bar(f"right {name}", right[name], 0.95, 0.99, ceiling[name]) for name in ("class", "place")]
    bars += [Bar(f"right {name}", right[name], 0.85, 0.95, ceiling[name]) for name in ("action", "accessory", "colour word")]
    bars += [
        Bar("diversity of dogs, over drawn ones'", spread(bench, same_prompt) / rendered_spread, 0.7, 0.9, 1.0),
        Bar("KID, over the reconstructions'", multiple(generated, reconstructed), 6, 2, 1.0, at_most=True),
        Bar("identity encoder, first of 100", identity_accuracy(bench), 0.9, 0.98),
        Bar("text-image retrieval, first of 100", retrieval_accuracy(bench), 0.8, 0.95),
    ]
    more = {"KID": generated.value, "its error": generated.error, "KID of reconstructions": reconstructed.value,
            "error of that": reconstructed.error, "accessory's colour": right["accessory's colour"],
            "accessory's colour, drawn": ceiling["accessory's colour"]}  # fmt: skip
    return bars, images, scenes, more


def report(bars: list[Bar], more: dict[str, float]) -> str:
    lines = ["| | measured | must be | aim | drawn pictures |", "|---|---|---|---|---|", *(bar.row() for bar in bars)]
    return "\n".join([*lines, "", ", ".join(f"{name} {value:.3g}" for name, value in more.items())])


def page(bench: Bench, images: Tensor, scenes: list[Scene]):
    """Rows of the first generated images, not chosen; then unseen scenes as drawn, and through the VAE."""
    across = SHOWN // 5
    rendered = bench.render(scenes[:across])
    rows = [images[:SHOWN], rendered, bench.reconstruct(rendered)]
    return grid([image for row in rows for image in sampling.to_pil(row)], across)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=TOYLAND, help="a folder that `personalize pretrain` made")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--pictures", type=int, default=500)
    options = parser.parse_args()
    start = time.time()
    model = models.load_model(str(options.base), say=lambda line: None)
    encoder = encoders.load_encoders(options.base, model.device)
    bench = Bench(model, encoder, toyland_truth.load_probe(options.base, model.device), options.pictures)
    bars, images, scenes, more = measure(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    with writing(options.out / "toyland.png") as temporary:
        page(bench, images, scenes).save(temporary, "PNG")
    record = {"command": f"python -m benchmarks.toyland --pictures {options.pictures}", "machine": machine(),
            "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - start)}  # fmt: skip
    write_json(
        options.out / "toyland.json",
        record | {bar.name: bar.value if math.isfinite(bar.value) else None for bar in bars} | more,
    )
    print(report(bars, more), f"\n{record['seconds']} s, {record['machine']}", sep="\n")
    return not all(bar.met() for bar in bars)


if __name__ == "__main__":
    sys.exit(main())
