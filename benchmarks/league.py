"""Which technique learns a subject best for the same seconds?    python -m benchmarks.league WORK [TECHNIQUE …] [--steps 200]

Every technique of TECHNIQUES trains the development subjects of `benchmarks.subjects` for as long as the reference does for
`--steps`: its own steps are those by the ratio of the two in alternating short runs. No checkpoint is chosen: the last is
judged by truth, 32 images on Toyland's test prompts, every technique from the same noise. Differences to the reference are
paired by subject, prompt and number.

error      identity error: 0 is the subject, 1 another of its class; then its parts
adherence  images with the place, action and accessory that were asked for, over the base's
drift      share of the way to the subject that the error of class images moved
"""

import math
import os
import shutil
import statistics
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import typer
from filelock import FileLock
from torch import Tensor, nn

import personalize
from benchmarks.subjects import ADHERENCE, CLASSES, render_photos, seed_of
from personalize import methods
from personalize.commands.compare import read_rows
from personalize.common import run_folder
from personalize.common.files import read_json, read_jsonl, slug, write_json
from personalize.core import rng
from personalize.data import training_set
from personalize.evaluation import bootstrap, summary
from personalize.evaluation.metrics.toyland_truth import PARTS
from personalize.models import fast_unet
from personalize.models.latent_diffusion import LatentDiffusion
from personalize.training import engine

SHORT = 24  # steps of the runs that tell what a step costs
REFERENCE = "full"


@dataclass(frozen=True)
class Technique:
    """Settings on top of the shipped recipe; captions: of the photos; patch: a context in which it trains and draws."""

    settings: tuple[str, ...] = ()
    captions: bool = False
    patch: Callable = nullcontext


def timesteps(density: Callable[[Tensor], Tensor]) -> Callable:
    """Training at density(u) of T, where u (B,) is uniform in [0,1)."""

    def patch():
        at = training_set.TrainingSet.at

        def biased(self, step: int):
            batch = at(self, step)
            u = torch.rand(len(batch.t), generator=rng.generator(self.recipe.seed, "density", step))
            T = self.model.schedule.T
            batch.t = (T * density(u)).long().clamp(0, T - 1)
            return batch

        return mock.patch.object(training_set.TrainingSet, "at", biased)

    return patch


def pull_to_base(share: float) -> Callable:
    """After each step every weight goes `share` of the way back to where it began (L2 pull, decoupled)."""

    def patch():
        step = engine.Engine.step

        def pulled(self, batch, *, scale):
            if not hasattr(self, "began"):
                self.began = [p.detach().clone() for p in self.params]
            values = step(self, batch, scale=scale)
            with torch.no_grad():
                torch._foreach_lerp_(self.params, self.began, share)
            return values

        return mock.patch.object(engine.Engine, "step", pulled)

    return patch


@contextmanager
def masked_rank():
    """T-LoRA (Soboleva et al. 2507.05964): at timestep t 1 + (r - 1)(T - t)/T ranks of the U-Net's LoRA act."""
    predict, attach = LatentDiffusion.predict, methods.attach
    now = []

    def of_timestep(self, z, t, cond):
        now[:] = [t, self.schedule.T]
        return predict(self, z, t, cond)

    def mask(module, inputs, out):
        t, T = now
        rank = out.shape[-1] if isinstance(module, nn.Linear) else out.shape[1]
        kept = torch.arange(rank) <= ((rank - 1) * (T - t.float()) / T)[:, None]
        return out * (kept[:, None] if out.ndim == 3 else kept if out.ndim == 2 else kept[:, :, None, None])

    def with_masks(model, recipe, **options):
        groups = attach(model, recipe, **options)
        for name, module in model.unet.named_modules():
            if name.endswith("lora_A.default") or ".lora_A." in name:
                nn.init.orthogonal_(module.weight.flatten(1))
                module.register_forward_hook(mask)
        return groups

    with (
        mock.patch.object(LatentDiffusion, "predict", of_timestep),
        mock.patch.object(methods, "attach", with_masks),
        mock.patch.object(fast_unet, "_is_lora", lambda layer, x: False),  # by PEFT's own call, which runs the masks
    ):
        yield


def high(u: Tensor) -> Tensor:
    return u.sqrt()


def low(u: Tensor) -> Tensor:
    return 1 - (1 - u).sqrt()


def logit_normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid()


def mode(u: Tensor, s: float = 1.29) -> Tensor:
    """Of Stable Diffusion 3 (Esser et al. 2403.03206, eq. 20)."""
    return 1 - u - s * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def stratified(u: Tensor) -> Tensor:
    return (torch.arange(len(u)) + u) / len(u)


TEXT, THREE = "train.text_encoder=true", ("train.batch=3", "train.prior_batch=1")
DRAW = ("draw.sampler=ddpm", "draw.guidance=2.2", "draw.steps=25")
LORA = ("train.methods=lora", "lora.rank=32", "lora.conv=true", TEXT, "train.lr=1e-3", *THREE, "train.snr_gamma=0", *DRAW)
WORD = (*THREE, "train.snr_gamma=0", *DRAW)
CUSTOM = (*WORD, "train.methods=custom-diffusion")
INVERSION = ("train.methods=textual-inversion", "train.batch=4", "prior.count=0")
TECHNIQUES = {
    REFERENCE: Technique(),
    "no prior": Technique(("prior.count=0", "train.batch=4")),
    "base's predictions": Technique(("prior.kind=predictions",)),
    "pull to base": Technique(("prior.count=0", "train.batch=4"), patch=pull_to_base(5e-3)),
    "captions": Technique(captions=True),
    "min-SNR": Technique(("train.snr_gamma=5",)),
    "high t": Technique(patch=timesteps(high)),
    "low t": Technique(patch=timesteps(low)),
    "mode t": Technique(patch=timesteps(mode)),
    "logit-normal t": Technique(patch=timesteps(logit_normal)),
    "stratified t": Technique(patch=timesteps(stratified)),
    "EMA": Technique(("train.ema=0.98",)),
    "cosine": Technique(("train.lr_schedule=cosine", "train.lr=3e-4")),
    "lr 3e-4": Technique(("train.lr=3e-4",)),
    "text rate halved": Technique(("train.text_lr=1e-4",)),
    "text encoder frozen": Technique(("train.text_encoder=false",)),
    "lora": Technique(LORA),
    "lora, linear layers only": Technique((*LORA, "lora.conv=false")),
    "lora, rank 8": Technique((*LORA, "lora.rank=8")),
    "lora, rank 64": Technique((*LORA, "lora.rank=64")),
    "lora, alpha 4 × rank": Technique((*LORA, "lora.alpha=128")),
    "lora, rsLoRA": Technique((*LORA, "lora.rslora=true")),
    "lora, text encoder frozen": Technique((*LORA, "train.text_encoder=false")),
    "lora, text encoder at 3e-4": Technique((*LORA, "train.text_lr=3e-4")),
    "lora, text encoder at 1e-4": Technique((*LORA, "train.text_lr=1e-4")),
    "lora, lr 2e-3": Technique((*LORA, "train.lr=2e-3")),
    "T-LoRA": Technique(LORA, patch=masked_rank),
    "DoRA": Technique((*LORA, "lora.dora=true")),
    "lokr": Technique((*LORA, "train.methods=lokr")),
    "lokr, lr 4e-3": Technique((*LORA, "train.methods=lokr", "train.lr=4e-3")),
    "loha": Technique((*LORA, "train.methods=loha")),
    "custom diffusion": Technique((*CUSTOM, "train.lr=3e-4", "embedding.lr=2e-3")),
    "custom diffusion, lr 2e-3": Technique((*CUSTOM, "train.lr=2e-3", "embedding.lr=2e-3")),
    "pivotal": Technique((*LORA, "train.methods=textual-inversion,lora", "embedding.vectors=2", "embedding.lr=2e-3")),
    "inversion, 4 vectors, 5e-4": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=5e-4")),
    "inversion, 4 vectors, 2e-3": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=2e-3")),
    "inversion, 4 vectors, 1e-2": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=1e-2")),
    "inversion, 1 vector, 5e-3": Technique((*WORD, *INVERSION, "embedding.vectors=1", "train.lr=5e-3")),
    "inversion, 4 vectors, 3e-2": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=3e-2")),
    "inversion, 8 vectors, 2e-2": Technique((*WORD, *INVERSION, "embedding.vectors=8", "train.lr=2e-2")),
    "custom diffusion, lr 2e-3, words 1e-2": Technique((*CUSTOM, "train.lr=2e-3", "embedding.lr=1e-2")),
    "inversion, 8 vectors, 5e-3": Technique((*WORD, *INVERSION, "embedding.vectors=8", "train.lr=5e-3")),
}  # fmt: skip


def train(work: Path, name: str, k: int, steps: int) -> Path:
    """The run of a technique on the development subject k; kept."""
    technique, word = TECHNIQUES[name], CLASSES["dev"][k]
    run, photos = work / "runs" / f"{slug(name)}-{steps}-{k}", work / "photos" / f"{word}{'-captions' * technique.captions}"
    if (run / "manifest.json").exists() and run_folder.read_manifest(run)["status"] == "finished":
        return run
    photos.mkdir(parents=True, exist_ok=True)
    for i, (photo, place) in enumerate(zip(render_photos(seed_of("dev", k), word), PLACES)):
        photo.save(photos / f"{i:02d}.png")
        if technique.captions:
            (photos / f"{i:02d}.txt").write_text(f"a photo of a {{token}} {{class}} standing {place}\n")
    settings = [*technique.settings, f"train.steps={steps}", "choose.every=0", "train.checkpoint_every=0"]
    with technique.patch():
        folder = personalize.train(
            photos, class_word=word, settings=settings, runs=work / "new" / run.name, priors=work / "priors"
        ).folder
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    shutil.move(folder, run)
    return run


PLACES = ("on a meadow", "on the beach", "in a room", "in the mountains", "in the snow")


def relative_cost(work: Path, name: str) -> float:
    """Seconds of a step over the reference's, by the medians of short runs in turn."""
    file = work / "costs" / f"{slug(name)}.json"
    with FileLock(work / "costs.lock"):  # of several processes one at a time
        if not file.exists():
            medians = {REFERENCE: [], name: []}
            for each in 2 * list(medians):
                run = train(work, each, 0, SHORT)
                medians[each].append(statistics.median(row["seconds"] for row in read_jsonl(run / "log.jsonl")[4:]))
                shutil.rmtree(run)
            write_json(file, {"cost": min(medians[name]) / min(medians[REFERENCE]), "seconds": medians})
    return read_json(file)["cost"]


def judged(run: Path, name: str) -> dict:
    """What the rows of an evaluation say."""
    with TECHNIQUES[name].patch():
        rows = read_rows(personalize.evaluate(run, settings=["evaluate.class_count=8"]).report.parent)
    asked = {kind: [r[name] for r in summary.of_kind(rows, kind) for name in ADHERENCE if r[name] is not None]
             for kind in ("subject", "base")}  # fmt: skip
    share = {kind: sum(values) / len(values) for kind, values in asked.items()}
    mean = lambda kind, name: i.mean if (i := summary.interval(summary.of_kind(rows, kind), name)) else None  # noqa: E731
    before, after = (mean(kind, "identity_error") for kind in ("base class", "class"))
    return {
        "error": mean("subject", "identity_error"),
        **{part: mean("subject", f"off_{part}") for part in PARTS},
        "dino": mean("subject", "dino"),
        "adherence": share["subject"] / share["base"],
        "drift": (before - after) / before,
        "images": [[*key, value] for key, value in summary.keyed(summary.of_kind(rows, "subject"), "identity_error").items()],
    }  # fmt: skip


def result(work: Path, name: str, steps: int) -> list[dict]:
    """A row a subject; kept."""
    file = work / "results" / f"{slug(name)}-{steps}.json"
    if not file.exists():
        write_json(file, {"subjects": [judged(train(work, name, k, steps), name) for k in range(len(CLASSES["dev"]))]})
    return read_json(file)["subjects"]


def table_row(name: str, steps: int, rows: list[dict], against: list[dict]) -> str:
    mean = lambda key: statistics.mean(values) if (values := [r[key] for r in rows if r[key] is not None]) else float("nan")  # noqa: E731
    pair = [{(k, *image[:-1]): image[-1] for k, row in enumerate(each) for image in row["images"]} for each in (rows, against)]
    change = bootstrap.paired_difference(*pair)
    cells = [f"{mean(key):.2f}" for key in ("error", *PARTS, "adherence", "drift")]
    return f"| {name}, {steps} | {' | '.join(cells)} | {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}) |"


def main(work: Path, names: list[str] = typer.Argument(None), steps: int = 200) -> None:  # noqa: B008
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    header = ["technique, steps", "error", *PARTS, "adherence", "drift", "error against full (95 %)"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    reference = result(work, REFERENCE, steps)
    for name in names or TECHNIQUES:
        own = steps if name == REFERENCE else max(2, round(steps / relative_cost(work, name)))
        print(table_row(name, own, result(work, name, own), reference), flush=True)


if __name__ == "__main__":
    typer.run(main)
