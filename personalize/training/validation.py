"""What is looked at while a run trains: sample pictures, and checkpoints scored on the dev split.

The frozen base draws the dev split's pictures before anything is trained, from the same noise.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from personalize.common import run_folder
from personalize.common.recipe import Recipe, SamplingConfig
from personalize.common.terminal import SILENT
from personalize.data.image_grid import grid
from personalize.data.subjects import Subject
from personalize.evaluation import checkpoint_selection, encoders, image_cache, protocols, scoring
from personalize.evaluation.checkpoint_selection import ScoredCheckpoint
from personalize.evaluation.protocols import Protocol
from personalize.evaluation.summary import keyed, of_kind
from personalize.generation import sampling
from personalize.models.interface import LatentModel

BASE_PICTURES = "base-pictures"  # beside the runs, which share them


def sampling_config(recipe: Recipe, steps: int = 0) -> SamplingConfig:
    """How a recipe draws, with other sampling steps where they are given."""
    return dataclasses.replace(recipe.draw, steps=steps or recipe.draw.steps)


def base_cache_name(model: LatentModel) -> str:
    """What the base is called among kept pictures."""
    return f"base-{model.fingerprint[:12]}"


@contextmanager
def eval_mode(model: LatentModel, params: list[Tensor] = (), average: list[Tensor] = ()) -> Iterator[None]:
    """Inside, a model that trains draws: in evaluation mode, in its own type, with the averaged weights if there are any."""
    training = {module: module.training for module in model.networks.values()}
    own = [p.detach().clone() for p in params] if average else []
    for module in training:
        module.eval()
    for p, mean in zip(params, average):
        p.data.copy_(mean)
    try:
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            yield
    finally:
        for p, mine in zip(params, own):
            p.data.copy_(mine)
        for module, was in training.items():
            module.train(was)


def draw_samples(model: LatentModel, recipe: Recipe, prompts: list[str], path: Path) -> None:
    """Eight pictures of prompts with the weights as they are, as one grid."""
    z0 = sampling.sample_latents(
        model, prompts, sampling.image_generators(recipe.seed, range(8), "sample"), sampling_config(recipe)
    )
    path.parent.mkdir(exist_ok=True)
    with run_folder.writing(path) as temporary:
        grid(sampling.to_pil(model.decode_latents(z0)), 4).save(temporary)


@dataclass
class DevSplit:
    """The subjects' judges, and what the base draws for the same prompts. `scored` grows with each checkpoint."""

    model: LatentModel
    recipe: Recipe
    folder: Path
    known: list[Subject]
    judges: list[scoring.Reference]
    progress: Callable
    base: list[list[dict]] = field(default_factory=list)
    scored: list[ScoredCheckpoint] = field(default_factory=list)

    @classmethod
    def of(cls, model: LatentModel, recipe: Recipe, known: list[Subject], folder: Path, *, progress: Callable) -> "DevSplit":
        """Draws by the base, which nothing is attached to yet, and looks at the photos."""
        judge = encoders.load_encoders(model.folder, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)
        size, crop = recipe.photos.size or model.size, recipe.photos.crop
        judges = [scoring.make_reference(judge, s.photos, (), size=size, crop=crop, class_word=s.class_word) for s in known]
        self = cls(model, recipe, folder, known, judges, progress)
        root = folder.parent / BASE_PICTURES
        self.base = [self._rows(k, "", root, base_cache_name(model)) for k in range(len(known))]
        return self

    def score(self, step: int) -> ScoredCheckpoint:
        """Draws with the weights as they are -> the checkpoint's scores, also written to the run."""
        parts = []
        for k, subject in enumerate(self.known):
            rows = self._rows(k, subject.token, self.folder / "choosing", f"step-{step:06d}")
            parts.append(_scored(step, rows, self.base[k], top=self.judges[k].ceilings["dino"], token=subject.token))
        scored = _joined(parts)
        self.scored.append(scored)
        run_folder.append_jsonl(self.folder / checkpoint_selection.FILE, scored.row())
        return scored

    def _rows(self, k: int, token: str, root: Path, name: str) -> list[dict]:
        """Rows of a subject's pictures and of its class's, by the model as it is; token "": by the base."""
        ask, seed, how = self.recipe.choose, self.recipe.seed, sampling_config(self.recipe, self.recipe.choose.steps)
        asked = Protocol("dev", protocols.dev_templates(ask.prompts, self.model.has_world), ask.count, ask.class_count)
        place = image_cache.cache_folder(root, name, self.model, seed=seed, purpose="choose", how=how)
        sat = image_cache.image_set(
            asked, place, class_prompt=self.recipe.prior.prompt, token=token, word=self.known[k].class_word
        )
        progress = SILENT.progress if token else self.progress
        image_cache.generate_missing(
            self.model, sat, seed=seed, purpose="choose", how=how, progress=progress, what="dev split by the base"
        )
        pictures, bad = image_cache.load_images(sat)
        with torch.autocast(self.model.device.type, enabled=False):  # half precision is for drawing
            return scoring.score_images(self.judges[k], sat, pictures, bad)


def _scored(step: int, rows: list[dict], base: list[dict], *, top: float | None, token: str) -> ScoredCheckpoint:
    def table(of: list[dict], kind: str, name: str) -> dict:
        return {(token, *key): value for key, value in keyed(of_kind(of, kind), name).items()}

    mine = of_kind(rows, "subject")
    return ScoredCheckpoint(
        step,
        identity=table(rows, "subject", "dino"),
        obeys=table(rows, "subject", "clip_t"),
        base_obeys=table(base, "base", "clip_t"),
        pres=table(rows, "class", "dino"),
        base_pres=table(base, "base class", "dino"),
        ceiling=top,
        copied=sum(bool(row.get("copied")) for row in mine) / len(mine),
    )


def _joined(parts: list[ScoredCheckpoint]) -> ScoredCheckpoint:
    """Several subjects of a run as one: their pictures together, their ceilings and copies as means."""
    tables = ("identity", "obeys", "base_obeys", "pres", "base_pres")
    together = {name: {k: v for part in parts for k, v in getattr(part, name).items()} for name in tables}
    tops = [part.ceiling for part in parts if part.ceiling is not None]
    top = sum(tops) / len(tops) if tops else None
    return ScoredCheckpoint(parts[0].step, ceiling=top, copied=sum(p.copied for p in parts) / len(parts), **together)
