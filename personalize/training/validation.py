"""Validation while a run trains: sample images, and checkpoints scored on the dev split.

The frozen base generates the dev split's images before anything is trained, from the same noise.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from personalize.common import distributed
from personalize.common.files import append_jsonl, writing
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.terminal import SILENT
from personalize.data.image_grid import grid
from personalize.data.subjects import Subject
from personalize.evaluation import bleed, checkpoint_selection, encoders, image_cache, protocols, scoring
from personalize.evaluation.checkpoint_selection import ScoredCheckpoint
from personalize.evaluation.metrics import METRICS
from personalize.evaluation.metrics.inputs import Reference
from personalize.evaluation.protocols import Protocol
from personalize.evaluation.summary import keyed, of_kind
from personalize.generation import sampling
from personalize.models.interface import LatentModel
from personalize.training import load_run

SAMPLES = 8  # images of a grid
BASE_IMAGES = "base-pictures"  # beside the runs, which share them


def sampling_config(recipe: Recipe, steps: int = 0) -> SamplingConfig:
    """The recipe's sampling settings, with another number of steps if one is given."""
    return dataclasses.replace(recipe.draw, steps=steps or recipe.draw.steps)


def base_cache_name(model: LatentModel) -> str:
    """The base's name in the image cache."""
    return f"base-{model.fingerprint[:12]}"


@contextmanager
def eval_mode(model: LatentModel, params: list[Tensor] = (), ema: list[Tensor] = ()) -> Iterator[None]:
    """Inside, a model that trains generates images: in eval mode, in its own dtype, with the EMA weights if there are any."""
    training = {module: module.training for module in model.networks.values()}
    params, ema = distributed.local_shards(params), distributed.local_shards(ema)
    trained = [p.detach().to("cpu", copy=True) for p in params] if ema else []
    for module in training:
        module.eval()
    for p, mean in zip(params, ema):
        p.data.copy_(mean)
    try:
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            yield
    finally:
        for p, weight in zip(params, trained):
            p.data.copy_(weight)
        for module, was in training.items():
            module.train(was)


def draw_samples(model: LatentModel, recipe: Recipe, prompts: list[str], path: Path) -> None:
    """Eight images of the prompts by the present weights, as one grid."""
    z0 = sampling.sample_latents(
        model, prompts, sampling.image_generators(recipe.seed, range(SAMPLES), "sample"), sampling_config(recipe)
    )
    with writing(path) as temporary:
        grid(sampling.to_pil(model.decode_latents(z0)), 4).save(temporary)


@dataclass
class DevSplit:
    """A reference for each subject, and the scores of the base on the same prompts. `scored` grows with each checkpoint."""

    model: LatentModel
    recipe: Recipe
    folder: Path
    subjects: list[Subject]
    references: list[Reference]
    progress: Callable
    base: list[list[dict]] = field(default_factory=list)
    scored: list[ScoredCheckpoint] = field(default_factory=list)

    @classmethod
    def of(cls, model: LatentModel, recipe: Recipe, subjects: list[Subject], folder: Path, *, progress: Callable) -> "DevSplit":
        """Encodes the photos, and scores images of the base, to which nothing is attached yet."""
        loaded = encoders.load_encoders(model.folder, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)
        size, crop = recipe.photos.size or model.size, recipe.photos.crop
        references = [
            scoring.make_reference(loaded, s.photos, (), size=size, crop=crop, class_word=s.class_word) for s in subjects
        ]
        self = cls(model, recipe, folder, subjects, references, progress)
        root = folder.parent / BASE_IMAGES
        self.base = [self._rows(k, "", root, base_cache_name(model)) for k in range(len(subjects))]
        return self

    def score(self, step: int, strength: float = 1.0) -> ScoredCheckpoint:
        """Scores images by the present weights -> the checkpoint's scores, which are also written to the run."""
        parts = []
        for k, subject in enumerate(self.subjects):
            rows = self._rows(k, subject.token, self.folder / "choosing", load_run.result_name(step, strength))
            top = METRICS["dino"].ceiling(self.references[k])
            part = _scored(step, strength, rows, self.base[k], top=top, token=subject.token)
            parts.append(dataclasses.replace(part, bleed=self._bleed(k, rows)))
        scored = _pooled(parts)
        self.scored.append(scored)
        append_jsonl(self.folder / checkpoint_selection.FILE, scored.row())
        return scored

    def _bleed(self, k: int, rows: list[dict]) -> dict:
        """How far the images of subject k are on the way to the photos of each other subject."""
        bled = bleed.bleed_of_rows(rows, self.base[k], k, self.references)
        one, names = self.subjects[k].token, [subject.token for subject in self.subjects]
        return {(one, names[other], *key): value for other, values in bled.items() for key, value in values.items()}

    def _rows(self, k: int, token: str, root: Path, name: str) -> list[dict]:
        """A row of scores for each image of a subject and of its class by the present weights; token "": by the base."""
        choose, seed, sampler = self.recipe.choose, self.recipe.seed, sampling_config(self.recipe, self.recipe.choose.steps)
        templates = protocols.dev_templates(choose.prompts, self.model.has_world)
        protocol = Protocol("dev", templates, choose.count, choose.class_count)
        folder = image_cache.cache_folder(root, name, self.model, seed=seed, purpose="choose", config=sampler)
        images = image_cache.image_set(
            protocol, folder, class_prompt=self.recipe.prior.prompt, token=token, word=self.subjects[k].class_word,
            weighting=self.model.weighting,
        )  # fmt: skip
        progress = SILENT.progress if token else self.progress
        image_cache.generate_missing(
            self.model, images, seed=seed, purpose="choose", config=sampler, progress=progress, what="dev split by the base"
        )
        loaded, reasons = image_cache.load_images(images)
        with torch.autocast(self.model.device.type, enabled=False):  # half precision is for sampling
            seen = scoring.embed_images(self.references[k], images, loaded)
            return bleed.others_of(scoring.score_images(seen, reasons), seen, self.references)


def _scored(
    step: int, strength: float, rows: list[dict], base: list[dict], *, top: float | None, token: str
) -> ScoredCheckpoint:
    def table(scores: list[dict], kind: str, name: str) -> dict:
        return {(token, *key): value for key, value in keyed(of_kind(scores, kind), name).items()}

    subject_rows = of_kind(rows, "subject")
    return ScoredCheckpoint(
        step,
        identity=table(rows, "subject", "dino"),
        obeys=table(rows, "subject", "clip_t"),
        base_obeys=table(base, "base", "clip_t"),
        pres=table(rows, "class", "dino"),
        base_pres=table(base, "base class", "dino"),
        ceiling=top,
        copied=sum(bool(row.get("copied")) for row in subject_rows) / len(subject_rows),
        strength=strength,
    )


def _pooled(parts: list[ScoredCheckpoint]) -> ScoredCheckpoint:
    """Several subjects of a run as one: their images together, their ceilings and shares of copies as means."""
    tables = (*checkpoint_selection.TABLES, checkpoint_selection.BLEED)
    together = {name: {k: v for part in parts for k, v in getattr(part, name).items()} for name in tables}
    tops = [part.ceiling for part in parts if part.ceiling is not None]
    top = sum(tops) / len(tops) if tops else None
    numbers = {"ceiling": top, "copied": sum(p.copied for p in parts) / len(parts), "strength": parts[0].strength}
    return ScoredCheckpoint(parts[0].step, **numbers, **together)
