"""Is Toyland good enough to judge by?    python -m benchmarks.toyland [--base FOLDER] [--out DIR] [--pictures N]

Draws pictures of prompts that pretraining cannot have seen, and reads them with the probes, which have seen drawn pictures
only. Beside each share stands what the probe reads on drawn scenes of the same truth: its ceiling. Writes DIR/toyland.json
and the picture DIR/toyland.png, prints the table, and exits 1 where a number is less than it must be.
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
from personalize.common.recipe import SamplingConfig
from personalize.data.image_grid import grid
from personalize.evaluation import encoders, image_cache
from personalize.evaluation.metrics import toyland_truth
from personalize.generation import sampling
from personalize.toyland.world import scenes as world
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import (
    ACTIONS,
    CLASSES,
    HELD_OUT,
    PLACES,
    Scene,
    accessory_words,
    colour_word,
    sample_subject,
    with_article,
)

FIRST = HELD_OUT + 5_000_000  # seeds of the scenes, which no other part of the project uses
SHOWN = 40  # pictures on the sheet
STEPS = 25
DOGS = 64
RIVALS = 100  # subjects of a class, and captions, among which the right one is found
SETS = 5  # of RIVALS captions


@dataclass(frozen=True)
class Bar:
    """A number, what it must be and is aimed at, and what is reached by drawn pictures; `most`: less is better."""

    name: str
    value: float
    least: float
    aim: float
    ceiling: float | None = None
    unit: str = ""
    most: bool = False

    def met(self) -> bool:
        return self.value <= self.least if self.most else self.value >= self.least

    def row(self) -> str:
        ceiling = "" if self.ceiling is None else f"{self.ceiling:.3g}"
        sign, star = ("≤", "≥")[not self.most], "" if self.met() else " **missed**"
        return f"| {self.name} | {self.value:.3g}{self.unit}{star} | {sign} {self.least:g} | {self.aim:g} | {ceiling} |"


@dataclass(frozen=True)
class Bench:
    """What is judged, and with what."""

    model: models.interface.LatentModel
    seen: encoders.Encoders
    probe: toyland_truth.Probe
    pictures: int

    def scenes(self, count: int, first: int = 0) -> list[Scene]:
        return [world.sample_scene(FIRST + first + k) for k in range(count)]

    def generated(self, prompts: list[str], *, seed: int) -> Tensor:
        """(N,3,H,W) in [-1,1], with the base's default guidance."""
        how = SamplingConfig("ddpm", STEPS, personalize.resolve().draw.guidance)  # DDIM with eta = 1
        parts = []
        for rows in sampling.sampling_batches(self.model, len(prompts), how):
            generators = sampling.image_generators(seed, list(rows), "benchmark")
            z0 = sampling.sample_latents(self.model, [prompts[k] for k in rows], generators, how)
            parts.append(self.model.decode_latents(z0).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def reconstructed(self, drawn: Tensor) -> Tensor:
        parts = drawn.split(sampling.default_batch_size(self.model, self.model.size))
        return torch.cat([self.model.decode_latents(self.model.encode_images(part)[0]).float().cpu() for part in parts])

    def drawn(self, scenes: list[Scene]) -> Tensor:
        return image_cache.load_tensors([draw_scene(scene, self.model.size)[0] for scene in scenes])


def prompt(of: Scene) -> str:
    """Everything there is to say: "a blue dog wearing a red hat, jumping on the beach"."""
    noun = with_article(f"{colour_word(of.subject.body)} {of.subject.class_word}")
    worn = f" {accessory_words(of.accessory)}," if of.accessory else ""
    return f"{noun}{worn} {ACTIONS[of.action]} {PLACES[of.place]}"


def obedience(bench: Bench, scenes: list[Scene], images: Tensor) -> dict[str, float]:
    """The share of pictures that show what was asked: class, place, action, accessory, and the colour words."""
    reading, prompts = toyland_truth.read_images(bench.probe, images), [prompt(scene) for scene in scenes]
    shares = {name: right.nanmean().item() for name, right in toyland_truth.prompt_adherence(reading, prompts).items()}
    asked = torch.tensor([toyland_truth.TABLES["colour"].index(colour_word(scene.subject.body)) for scene in scenes])
    worn = [k for k, scene in enumerate(scenes) if scene.accessory]
    told = torch.tensor([toyland_truth.TABLES["accessory_colour"].index(scenes[k].accessory.colour) for k in worn])
    return shares | {
        "colour word": (reading.chances["colour"].argmax(1) == asked).float().mean().item(),
        "accessory's colour": (reading.chances["accessory_colour"][worn].argmax(1) == told).float().mean().item(),
    }


def spread(bench: Bench, images: Tensor) -> float:
    """(N,3,H,W) of dogs -> the mean difference of two of them by the probe, over that of two at random by their truth."""
    reading = toyland_truth.read_images(bench.probe, images)
    rows = [toyland_truth.Reading(*({k: v[i : i + 1] for k, v in part.items()} for part in (reading.chances, reading.values)))
            for i in range(len(images))]  # fmt: skip
    apart = torch.stack([toyland_truth.identity_error(reading, toyland_truth.of_photos(row), "dog") for row in rows])
    return (apart.sum() - apart.diagonal().sum()).item() / (len(images) * (len(images) - 1))


def kid(a: Tensor, b: Tensor) -> float:
    """(N,D), (M,D) features -> the unbiased squared MMD with the kernel (x·y/D + 1)³ (Bińkowski et al. 1801.01401)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1).pow(3)

    def within(x: Tensor) -> Tensor:
        found = kernel(x, x)
        return (found.sum() - found.diagonal().sum()) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


@dataclass(frozen=True)
class Excess:
    """KID of pictures less that of drawn ones of the same scenes, which is 0 but for chance; `error`: the standard error."""

    value: float
    error: float


def excess(images: Tensor, drawn: Tensor, others: Tensor, parts: int = 10) -> Excess:
    """(N,D) features of pictures, of drawn ones of the same scenes, and (M,D) of others."""

    def less(rows: slice) -> float:
        return kid(images[rows], others) - kid(drawn[rows], others)

    found = torch.tensor([less(slice(k, None, parts)) for k in range(parts)])
    return Excess(less(slice(None)), found.std().item() / parts**0.5)


def realism(bench: Bench, images: Tensor, scenes: list[Scene]) -> tuple[Excess, Excess]:
    """KID of generated pictures and of the VAE's reconstructions, four times as many, against other drawn pictures.

    On the identity encoder: the CLIP tower cannot tell reconstructions from drawn pictures.
    """

    def features(pictures: Tensor) -> Tensor:
        rows = bench.seen.dino(pictures).token
        return rows * rows.shape[1] ** 0.5  # unit lengths to unit deviations, which the kernel is made for

    others = features(bench.drawn(bench.scenes(4 * len(scenes), first=100_000)))
    more = bench.drawn(bench.scenes(4 * len(scenes), first=200_000))
    return (excess(features(images), features(bench.drawn(scenes)), others),
            excess(features(bench.reconstructed(more)), features(more), others))  # fmt: skip


def multiple(generated: Excess, rebuilt: Excess) -> float:
    """Infinite where the reconstructions' is within twice its error: a multiple of nothing says nothing."""
    return max(generated.value, 0.0) / rebuilt.value if rebuilt.value > 2 * rebuilt.error else float("inf")


def psnr(bench: Bench, scenes: list[Scene]) -> float:
    """dB, the mean over pictures, of what the VAE makes of drawn ones; their values span 2."""
    drawn = bench.drawn(scenes)
    return (10 * (4 / (bench.reconstructed(drawn) - drawn).square().flatten(1).mean(1)).log10()).mean().item()


def recognised(bench: Bench) -> float:
    """How often the identity encoder finds a subject first among RIVALS of its class, by one other scene; over all classes."""
    found = []
    for c, word in enumerate(CLASSES):
        who = [sample_subject(FIRST + 1000 * c + k, word) for k in range(RIVALS)]
        views = [bench.seen.dino(bench.drawn([world.sample_scene(FIRST + 200_000 + 1000 * c + v * RIVALS + k, subject=each)
                 for k, each in enumerate(who)])).token for v in range(2)]  # fmt: skip
        found.append(((views[0] @ views[1].T).argmax(1) == torch.arange(RIVALS)).float().mean())
    return torch.stack(found).mean().item()


def retrieved(bench: Bench) -> float:
    """How often a caption's picture comes first among RIVALS whose captions differ, and the reverse."""
    found = []
    for part in range(SETS):
        different = {}
        for scene in bench.scenes(3 * RIVALS, first=300_000 + part * 1000):
            different.setdefault(prompt(scene), scene)
        texts = list(different)[:RIVALS]
        chances = bench.seen.clip_text(texts) @ bench.seen.clip_image(bench.drawn([different[t] for t in texts])).T
        found += [(chances.argmax(d) == torch.arange(RIVALS)).float().mean() for d in (0, 1)]
    return torch.stack(found).mean().item()


def measured(bench: Bench) -> tuple[list[Bar], Tensor, list[Scene], dict[str, float]]:
    scenes = bench.scenes(bench.pictures)
    images = bench.generated([prompt(scene) for scene in scenes], seed=1)
    right, ceiling = obedience(bench, scenes, images), obedience(bench, scenes, bench.drawn(scenes))
    dogs = [world.sample_scene(FIRST + 400_000 + k, subject=sample_subject(FIRST + 400_000 + k, "dog")) for k in range(DOGS)]
    drawn = spread(bench, bench.drawn(dogs))
    alike = bench.generated(["a dog"] * DOGS, seed=2)
    generated, rebuilt = realism(bench, images, scenes)
    bars = [Bar("VAE, PSNR of unseen scenes", psnr(bench, scenes), 27, 32, unit=" dB")]
    bars += [Bar(f"right {name}", right[name], 0.95, 0.99, ceiling[name]) for name in ("class", "place")]
    bars += [Bar(f"right {name}", right[name], 0.85, 0.95, ceiling[name]) for name in ("action", "accessory", "colour word")]
    bars += [
        Bar("diversity of dogs, over drawn ones'", spread(bench, alike) / drawn, 0.7, 0.9, 1.0),
        Bar("KID, over the reconstructions'", multiple(generated, rebuilt), 6, 2, 1.0, most=True),
        Bar("identity encoder, first of 100", recognised(bench), 0.9, 0.98),
        Bar("text-image retrieval, first of 100", retrieved(bench), 0.8, 0.95),
    ]
    more = {"KID": generated.value, "its error": generated.error, "KID of reconstructions": rebuilt.value,
            "error of that": rebuilt.error, "accessory's colour": right["accessory's colour"],
            "accessory's colour, drawn": ceiling["accessory's colour"]}  # fmt: skip
    return bars, images, scenes, more


def report(bars: list[Bar], more: dict[str, float]) -> str:
    lines = ["| | measured | must be | aim | drawn pictures |", "|---|---|---|---|---|", *(bar.row() for bar in bars)]
    return "\n".join([*lines, "", ", ".join(f"{name} {value:.3g}" for name, value in more.items())])


def page(bench: Bench, images: Tensor, scenes: list[Scene]):
    """Rows of the first generated images, not chosen; then unseen scenes as drawn, and through the VAE."""
    across = SHOWN // 5
    drawn = bench.drawn(scenes[:across])
    rows = [images[:SHOWN], drawn, bench.reconstructed(drawn)]
    return grid([image for row in rows for image in sampling.to_pil(row)], across)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=TOYLAND, help="a folder that `personalize pretrain` made")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--pictures", type=int, default=500)
    asked = parser.parse_args()
    began = time.time()
    model = models.load_model(str(asked.base), say=lambda line: None)
    seen = encoders.load_encoders(asked.base, model.device)
    bench = Bench(model, seen, toyland_truth.load_probe(asked.base, model.device), asked.pictures)
    bars, images, scenes, more = measured(bench)
    asked.out.mkdir(parents=True, exist_ok=True)
    with writing(asked.out / "toyland.png") as temporary:
        page(bench, images, scenes).save(temporary, "PNG")
    said = {"command": f"python -m benchmarks.toyland --pictures {asked.pictures}", "machine": machine(),
            "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began)}  # fmt: skip
    write_json(
        asked.out / "toyland.json", said | {bar.name: bar.value if math.isfinite(bar.value) else None for bar in bars} | more
    )
    print(report(bars, more), f"\n{said['seconds']} s, {said['machine']}", sep="\n")
    return not all(bar.met() for bar in bars)


if __name__ == "__main__":
    sys.exit(main())
