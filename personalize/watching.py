"""What is looked at while a run trains: sample pictures, and checkpoints scored on the dev split.

The frozen base draws the dev split's pictures before anything is trained, from the same noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize import choosing, gallery, latent, protocols, rundir, scoring
from personalize.choosing import Scored
from personalize.config import Recipe
from personalize.metrics import encoders
from personalize.models.base import LatentModel
from personalize.prompts import fill, without_token
from personalize.sheet import grid
from personalize.subjects import Subject
from personalize.summary import keyed, of_kind
from personalize.terminal import SILENT

BASE_PICTURES = "base-pictures"  # beside the runs, which share them


def drawing(recipe: Recipe, steps: int = 0) -> latent.Drawing:
    """How a recipe draws, with other sampling steps where they are given."""
    draw = recipe.draw
    return latent.Drawing(
        draw.sampler, steps or draw.steps, draw.guidance, draw.rescale, draw.interval, draw.negative, draw.size, draw.batch
    )


@contextmanager
def resting(model: LatentModel, params: list[Tensor] = (), average: list[Tensor] = ()) -> Iterator[None]:
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


def sample(model: LatentModel, recipe: Recipe, prompts: list[str], path: Path) -> None:
    """Eight pictures of prompts with the weights as they are, as one grid."""
    z0 = latent.draw(model, prompts, latent.image_generators(recipe.seed, range(8), "sample"), drawing(recipe))
    path.parent.mkdir(exist_ok=True)
    with rundir.writing(path) as temporary:
        grid(latent.to_pil(model.decode_latents(z0)), 4).save(temporary)


@dataclass
class DevSplit:
    """The subjects' judges, and what the base draws for the same prompts. `scored` grows with each checkpoint."""

    model: LatentModel
    recipe: Recipe
    folder: Path
    known: list[Subject]
    judges: list[scoring.Judge]
    base: list[list[dict]]
    scored: list[Scored]

    @classmethod
    def of(cls, model: LatentModel, recipe: Recipe, known: list[Subject], folder: Path, progress: Callable) -> "DevSplit":
        """Draws by the base, which nothing is attached to yet, and looks at the photos."""
        judge = encoders.load(model.name, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)
        size, crop = recipe.photos.size or model.size, recipe.photos.crop
        judges = [scoring.judge(judge, s.photos, (), size=size, crop=crop, class_word=s.class_word) for s in known]
        self = cls(model, recipe, folder, known, judges, [], [])
        root = folder.parent / BASE_PICTURES
        self.base = [self._rows(k, "base", root, f"base-{model.fingerprint[:12]}", progress) for k in range(len(known))]
        return self

    def score(self, step: int) -> Scored:
        """Draws with the weights as they are -> the checkpoint's scores, also written to the run."""
        parts = []
        for k, subject in enumerate(self.known):
            rows = self._rows(k, "subject", self.folder / "choosing", f"step-{step:06d}", SILENT.progress)
            parts.append(_scored(step, rows, self.base[k], self.judges[k], subject.token))
        scored = _joined(parts)
        self.scored.append(scored)
        rundir.append_jsonl(self.folder / choosing.FILE, scored.row())
        return scored

    def _rows(self, k: int, kind: str, root: Path, name: str, progress: Callable) -> list[dict]:
        """Rows of a subject's pictures and of its class's, by the model as it is."""
        ask, subject, base = self.recipe.choose, self.known[k], kind == "base"
        templates = protocols.dev_templates(ask.prompts, self.model.name)
        asked = [(t, "" if base else subject.token, ask.count, kind) for t in templates]
        asked.append((self.recipe.prior.prompt, "", ask.class_count, "base class" if base else "class"))
        jobs, told = [], []
        for template, token, count, what in asked:
            for number in range(count):
                jobs.append((fill(template, token, subject.class_word), number))
                told.append((template, what))
        how, seed = drawing(self.recipe, ask.steps), self.recipe.seed
        place = gallery.place(root, name, self.model, seed=seed, purpose="choose", how=how)
        if todo := gallery.missing(place, jobs):
            with progress("dev split by the base", len(todo), unit="pictures") as advance:
                gallery.draw(self.model, place, jobs, seed=seed, purpose="choose", how=how, advance=advance)
        pictures, bad = gallery.load(place, jobs)
        plain = [without_token(prompt, subject.token) for prompt, _ in jobs]
        with torch.autocast(self.model.device.type, enabled=False):  # half precision is for drawing
            rows = scoring.rows(
                self.judges[k], kind, templates=[t for t, _ in told], jobs=jobs, pictures=pictures, bad=bad, plain=plain
            )
        return [row | {"kind": what} for row, (_, what) in zip(rows, told, strict=True)]


def _scored(step: int, rows: list[dict], base: list[dict], judge: scoring.Judge, token: str) -> Scored:
    def table(of: list[dict], kind: str, name: str) -> dict:
        return {(token, *key): value for key, value in keyed(of_kind(of, kind), name).items()}

    mine = of_kind(rows, "subject")
    return Scored(
        step,
        identity=table(rows, "subject", "dino"),
        obeys=table(rows, "subject", "clip_t"),
        base_obeys=table(base, "base", "clip_t"),
        pres=table(rows, "class", "dino"),
        base_pres=table(base, "base class", "dino"),
        ceiling=judge.ceilings["dino"],
        copied=sum(bool(row.get("copied")) for row in mine) / len(mine),
    )


def _joined(parts: list[Scored]) -> Scored:
    """Several subjects of a run as one: their pictures together, their ceilings and copies as means."""
    tables = ("identity", "obeys", "base_obeys", "pres", "base_pres")
    together = {name: {k: v for part in parts for k, v in getattr(part, name).items()} for name in tables}
    tops = [part.ceiling for part in parts if part.ceiling is not None]
    top = sum(tops) / len(tops) if tops else None
    return Scored(parts[0].step, ceiling=top, copied=sum(p.copied for p in parts) / len(parts), **together)
