"""Metrics over drawn pictures, beside their floor (the base) and ceiling (photos against photos).

N pictures, (N,3,H,W) in [-1,1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from personalize import latent
from personalize.metrics import METRICS
from personalize.metrics.encoders import Encoders
from personalize.metrics.similarity import Embedded, aggregate, ceiling, clip_t, dino, embed
from personalize.models.base import LatentModel


@dataclass(frozen=True)
class Drawn:
    """Pictures of several prompts, `count` each, prompt by prompt."""

    prompts: list[str]
    images: Tensor


def draw_prompts(model: LatentModel, prompts: list[str], count: int, *, seed: int, how: latent.Drawing, advance) -> Drawn:
    """`count` pictures of each prompt; picture i starts from the same noise for every prompt and model."""
    jobs = [(prompt, i) for prompt in prompts for i in range(count)]
    parts = []
    for part in latent.batches(model, len(jobs), how):
        texts, numbers = zip(*(jobs[k] for k in part))
        z0 = latent.draw(model, list(texts), latent.image_generators(seed, list(numbers), "evaluate"), how)
        parts.append(model.decode_latents(z0).float().cpu())
        advance(len(part))
    return Drawn([prompt for prompt, _ in jobs], torch.cat(parts))


@dataclass(frozen=True)
class Judged:
    """summary: see `score`; pictures: one row a picture."""

    summary: dict
    pictures: list[dict]


def score(encoders: Encoders, real: Embedded, *, tuned: Drawn, base: Drawn, plain: list[str]) -> Judged:
    """Photos, pictures by the tuned model and, for the same prompts without the token (`plain`), by the base -> scores.

    summary: metric -> {"score", "floor", "ceiling", "relative"}, where relative = (score - floor) / (ceiling - floor)
    and CLIP-T, which photos say nothing of, has neither ceiling nor relative; and "prompts" -> metric means of each.
    """
    seen, floor = embed(encoders, tuned.images, plain), embed(encoders, base.images, plain)
    top = ceiling(real)
    summary: dict = {}
    rows = [{"prompt": prompt} for prompt in tuned.prompts]
    for name, metric in METRICS.items():
        values = metric(seen, real)
        got, low, high = aggregate(values, tuned.prompts), aggregate(metric(floor, real), base.prompts), top.get(name)
        relative = (got - low) / (high - low) if high is not None and high > low else None
        summary[name] = {"score": got, "floor": low, "ceiling": high, "relative": relative}
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value
    summary["prompts"] = {
        p: {name: sum(r[name] for r in rows if r["prompt"] == p) / tuned.prompts.count(p) for name in METRICS}
        for p in dict.fromkeys(tuned.prompts)
    }
    return Judged(summary, rows)


def drift(encoders: Encoders, real: Embedded, *, tuned: Tensor, base: Tensor, prompt: str) -> dict:
    """Is the class still the class? PRES of the tuned model and of the base on the class prompt, and both CLIP-T.

    PRES (Ruiz et al. 2208.12242, 4.3): mean cosine of class pictures with the photos, lower is better.
    """
    both: dict[str, Embedded] = {
        name: embed(encoders, images, [prompt] * len(images)) for name, images in (("tuned", tuned), ("base", base))
    }
    found = {name: {"pres": dino(e, real).mean().item(), "clip_t": clip_t(e).mean().item()} for name, e in both.items()}
    return {**found, "excess": found["tuned"]["pres"] - found["base"]["pres"]}
