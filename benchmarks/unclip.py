"""DALL·E 2 on Toyland: what of a scene comes back from its CLIP embedding, and is the prior worth its name?

    python -m benchmarks.unclip [--base FOLDER] [--out DIR] [--scenes 96] [--prompts 24]

Held-out scenes: images from the embedding of the scene itself, from the one that the prior draws of its prompt, and from the
prompt's own text embedding in its place; beside them the base told the prompt in words. The same noise in each, read by the
truth probe. Then diversity: prompts that leave most open, eight images each, by the prior and in words. Writes DIR/unclip.json
and two sheets, prints tables, and exits 1 where a bar is missed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import personalize
from benchmarks.machine import machine
from benchmarks.toyland import prompt
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.files import write_json, writing
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.data.image_grid import grid
from personalize.evaluation import bootstrap, encoders, image_cache
from personalize.evaluation.metrics import toyland_truth
from personalize.evaluation.metrics.diversity import pairwise, patch_distance
from personalize.generation import sampling
from personalize.models.unclip import Texts, hidden_states, read_unclip
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import CLASSES, HELD_OUT, PLACES, sample_scene, with_article

FIRST = HELD_OUT + 9_600_000  # seeds of the scenes, which no other part of the project uses
STEPS, SEEDS = 16, 8  # SEEDS: images of an open prompt
TRUTHS = ("class", "place", "action", "accessory")
SHOWN = 12


class Bench:
    """A base with the part, and who judges."""

    def __init__(self, base: Path):
        self.model = models.load_model(str(base), say=lambda line: None)
        self.part = read_unclip(self.model)
        self.clip, self.probe = encoders.load_clip(base, "cpu"), toyland_truth.load_probe(base)
        self.dino = encoders.load_encoders(base, "cpu").dino
        self.config = SamplingConfig("ddpm", STEPS, personalize.resolve().draw.guidance)

    def draw(self, texts: Sequence[str], noises: Sequence[int], embeddings: Tensor | None = None) -> Tensor:
        """(N,3,H,W), by words or from embeddings (N,D)."""
        model, parts = self.model, []
        for rows in sampling.sampling_batches(model, len(texts), self.config):
            states = None if embeddings is None else self.part.decoder(embeddings[rows.start : rows.stop])
            generators = sampling.image_generators(1, [noises[k] for k in rows], "benchmark")
            some = [texts[k] for k in rows]
            z0 = sampling.sample_latents(model, some, generators, self.config, encoded=states)
            parts.append(model.decode_latents(z0).float())
        return torch.cat(parts)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Texts:
        return self.part.pair.of_texts(*hidden_states(self.model, list(texts)))

    def of_prior(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.part.prior.sample(self.of_texts(texts), [rng.generator(1, "prior", k) for k in seeds])

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        pair = self.part.pair
        return torch.cat([pair.of_images(self.model, part, self.clip.image(part)) for part in images.split(64)])

    def right(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        return toyland_truth.prompt_adherence(toyland_truth.read_images(self.probe, images), list(texts))


def fidelity(bench: Bench, count: int) -> tuple[dict, dict[str, Tensor]]:
    """Shares that are right by row; the images of each row."""
    scenes = [sample_scene(FIRST + k) for k in range(count)]
    texts, numbers = [prompt(scene) for scene in scenes], list(range(count))
    images = {"rendered": image_cache.load_tensors([draw_scene(scene, bench.model.size)[0] for scene in scenes])}
    true, by_prior = bench.of_images(images["rendered"]), bench.of_prior(texts, numbers)
    text = bench.of_texts(texts).embeddings
    images["in words"] = bench.draw(texts, numbers)
    images["from its own embedding"] = bench.draw([""] * count, numbers, true)
    images["from the prior's"] = bench.draw([""] * count, numbers, by_prior)
    images["from the text's own"] = bench.draw([""] * count, numbers, text)
    right = {name: bench.right(each, texts) for name, each in images.items()}
    rows = {name: {key: value.nanmean().item() for key, value in each.items()} for name, each in right.items()}

    def gap(a: str, b: str) -> dict:
        """Of the mean of the truths of an image."""
        means = [torch.stack(list(right[name].values())).nanmean(0) for name in (a, b)]
        return interval(means[0] - means[1])

    cosines = {"the prior's": F.cosine_similarity(by_prior, true), "the text's own": F.cosine_similarity(text, true)}
    results = {name: cosine.mean().item() for name, cosine in cosines.items()}
    results["difference"] = interval(cosines["the prior's"] - cosines["the text's own"])
    gaps = {"prior's less text's own": gap("from the prior's", "from the text's own")}
    gaps["own embedding less words"] = gap("from its own embedding", "in words")
    return {"truth": rows, "differences of the mean truth": gaps, "cosine to the true embedding": results}, images


def diversity(bench: Bench, count: int) -> tuple[dict, dict[str, Tensor]]:
    """Prompts that say class and place alone: distances between images of one prompt, and how many are right."""
    g = rng.generator(0, "benchmark/open")
    pairs = [
        (CLASSES[k % len(CLASSES)], list(PLACES.values())[torch.randint(len(PLACES), (1,), generator=g)]) for k in range(count)
    ]
    texts = [f"{with_article(noun)} {place}" for noun, place in pairs for _ in range(SEEDS)]
    numbers = [k for _ in pairs for k in range(SEEDS)]
    images = {"in words": bench.draw(texts, numbers)}
    images["by the prior"] = bench.draw([""] * len(texts), numbers, bench.of_prior(texts, numbers))
    rows, values = {}, {}
    for name, each in images.items():
        right = bench.right(each, texts)
        values[name] = pairwise(patch_distance, bench.dino(each).patches, texts)
        rows[name] = {key: right[key].nanmean().item() for key in ("class", "place")} | {
            "diversity": values[name].mean().item()
        }
    difference = interval(values["by the prior"] - values["in words"], texts)
    return {"rows": rows, "difference of diversity": difference}, images


def interval(values: Tensor, clusters: Sequence[str] | None = None) -> dict:
    labels = [(k,) for k in (clusters or range(len(values)))]
    found = bootstrap.bootstrap_interval(values.tolist(), labels)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def bars(found: dict, spread: dict) -> dict[str, bool]:
    truth, cosine = found["truth"], found["cosine to the true embedding"]
    kept = {key: truth["from its own embedding"][key] / truth["rendered"][key] for key in TRUTHS[:3]}
    return {
        "the prior is nearer to the true embedding than the text is": cosine["difference"]["low"] > 0,
        "an image from its own embedding keeps class, place and action": min(kept.values()) >= 0.9,
        "the text's embedding in the prior's place is worse": found["differences of the mean truth"]["prior's less text's own"][
            "low"
        ]
        > 0,
        "the prior is more diverse than words": spread["difference of diversity"]["low"] > 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=TOYLAND)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=24, help="that say class and place alone")
    options = parser.parse_args()
    bench = Bench(options.base)
    found, images = fidelity(bench, options.scenes)
    print("| |", " | ".join(TRUTHS), "|\n|---|---|---|---|---|")
    for name, row in found["truth"].items():
        print(f"| {name} |", " | ".join(f"{row[key]:.2f}" for key in TRUTHS), "|", flush=True)
    spread, more = diversity(bench, options.prompts)
    met = bars(found, spread)
    for part in (found["differences of the mean truth"], found["cosine to the true embedding"], spread, met):
        print(part)
    with writing(options.out / "unclip.png") as temporary:
        grid([image for row in images.values() for image in sampling.to_pil(row[:SHOWN])], SHOWN).save(temporary, "PNG")
    with writing(options.out / "unclip-diversity.png") as temporary:
        shown = [row[k * SEEDS : (k + 1) * SEEDS] for k in range(4) for row in more.values()]
        grid([image for row in shown for image in sampling.to_pil(row)], SEEDS).save(temporary, "PNG")
    write_json(options.out / "unclip.json", {"machine": machine(), **found, "open prompts": spread, "bars": met})
    return not all(met.values())


if __name__ == "__main__":
    sys.exit(main())
