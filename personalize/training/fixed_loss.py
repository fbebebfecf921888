"""The loss on fixed noise: the same images, noise and timesteps each time, so that it moves only where the weights do.

The training loss is of other noise at each step, and says little (Voronov et al. 2302.04841). Here a few photos, class images
and photos held out keep theirs. DVAR is that paper's stop: it is enough when the photos' loss hardly varies any more.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.common.recipe import Recipe
from personalize.common.untrusted import Number, Table
from personalize.data.batch import Batch
from personalize.data.captions import add_token
from personalize.data.subjects import Subject
from personalize.data.training_set import TrainingSet, build_training_set
from personalize.models.interface import LatentModel
from personalize.training import validation
from personalize.training.checkpoint_schedule import is_scored
from personalize.training.engine import Engine
from personalize.training.log import FILE
from personalize.training.loss import per_image_loss

NAMES = ("fixed_subject", "fixed_prior", "held_out")  # in a row of the log: photos, class images, photos held out
ROWS = 8  # images of each
SEED = 1 << 62  # apart from the seed by this bit: the noise is none that is trained on
DVAR_SHARE = 0.15  # of the variance so far; the default of the authors' program, with a window of 200 steps
DVAR_LEAST = 5  # values in a window
ROW = Table({"step": Number(0, 10**9), **dict.fromkeys(NAMES, Number(0, 1e9, real=True))}, needs=("step",))


def check(recipe: Recipe) -> None:
    """UserError where the stop has nothing to go by, and for photos of several shapes, which are in no batch together."""
    train = recipe.train
    if train.held_out_every and recipe.photos.shape == "buckets":
        raise UserError(
            f"train.held_out_every = {train.held_out_every} measures images of one shape, and photos.shape is 'buckets'. Give "
            "train.held_out_every=0, or photos.shape=square."
        )
    if train.stop and not 0 < DVAR_LEAST * train.held_out_every <= train.stop_window:
        raise UserError(
            f"train.stop = {train.stop!r} needs the loss on fixed noise {DVAR_LEAST} times in train.stop_window = "
            f"{train.stop_window} steps, and train.held_out_every is {train.held_out_every}. Set it to "
            f"{max(1, train.stop_window // DVAR_LEAST // 4)}, or give a longer window."
        )


def dvar(losses: Sequence[float], window: int) -> bool:
    """Whether the last `window` losses ever varied by less than DVAR_SHARE of the variance of all until then."""
    counts = range(window, len(losses) + 1)
    return any(statistics.pvariance(losses[n - window : n]) < DVAR_SHARE * statistics.pvariance(losses[:n]) for n in counts)


@dataclass
class FixedLoss:
    """What is measured on a run's model; part: images computed at once; losses: of the photos, each time so far."""

    model: LatentModel
    recipe: Recipe
    batches: dict[str, Batch]
    part: int
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, data: TrainingSet, subjects: list[Subject]) -> "FixedLoss":
        """Photos and class images of a run, and its photos held out, which are encoded."""
        recipe, train = data.recipe, data.recipe.train
        fixed = dataclasses.replace(
            recipe,
            seed=recipe.seed ^ SEED,
            train=dataclasses.replace(
                train,
                batch=ROWS,
                prior_batch=ROWS,
                steps=1,
                warmup=0,
                timesteps="stratified",
                caption_dropout=0.0,
                input_perturbation=0.0,
                caption_shuffle=False,
            ),
            prior=dataclasses.replace(recipe.prior, count=0),
        )
        own_prompts = dataclasses.replace(data.step_prompts, dropout=0.0, orders=[[i] for i in range(len(data.photos))])
        own = dataclasses.replace(data, recipe=fixed, step_prompts=own_prompts).at(0)
        batches = {"fixed_subject": own} | ({"fixed_prior": own} if data.prior else {})
        if held_out := [_held_out(data.model, s, recipe) for s in subjects if s.held_out]:
            batches["held_out"] = build_training_set(data.model, fixed, held_out, priors={}, text_trains=data.texts is None).at(
                0
            )
        return cls(data.model, recipe, batches, part=-(-sum(data.steps_per_batch) // train.accumulate))

    def read_log(self, folder: Path) -> None:
        """The losses that a run logged until it was stopped; what the stop goes by is a function of them."""
        self.losses = [row["fixed_subject"] for row in logged(folder)]

    @torch.no_grad()
    def measure(self, step: int, engine: Engine) -> dict[str, Tensor]:
        """The mean loss () of each kind by the weights of this step, or a schedule-free average; {} where it is not due."""
        if step % self.recipe.train.held_out_every:
            return {}
        with validation.eval_mode(self.model, engine.params, engine.averaged()):
            values = {name: self._mean(batch, class_images=name == "fixed_prior") for name, batch in self.batches.items()}
        if self.recipe.train.stop:  # else nothing waits for a GPU
            self.losses.append(float(values["fixed_subject"]))
        return values

    def _mean(self, batch: Batch, *, class_images: bool) -> Tensor:
        first, last = (batch.counts[0], len(batch.z0)) if class_images else (0, batch.counts[0])
        parts = [slice(start, min(start + self.part, last)) for start in range(first, last, self.part)]
        losses = [
            per_image_loss(
                self.model, batch.z0[rows], batch.cond(rows), t=batch.t[rows], eps=batch.eps[rows],
                target=None if batch.target is None else batch.target[rows],
                mask=None if batch.mask is None else batch.mask[rows], snr_gamma=self.recipe.train.snr_gamma,
            )
            for rows in parts
        ]  # fmt: skip
        return torch.cat(losses).mean()

    def stops(self, step: int) -> bool:
        """Whether the run ends at this step by DVAR; where checkpoints are scored, it is one of theirs."""
        train, every = self.recipe.train, self.recipe.choose.every
        if not train.stop or not (is_scored(self.recipe, step) if every else step % train.held_out_every == 0):
            return False
        return distributed.broadcast_from_rank0(dvar(self.losses, train.stop_window // train.held_out_every))


def _held_out(model: LatentModel, subject: Subject, recipe: Recipe) -> Subject:
    """The photos held out of a subject, with captions as those that are trained on have them."""
    photos = subject.held_out
    if recipe.captions.add_token:
        photos, _ = add_token(model, photos, token=subject.token, word=subject.class_word)
    return dataclasses.replace(subject, photos=photos, held_out=[])


def logged(folder: Path) -> list[dict]:
    """step and each of NAMES, of the steps at which a run measured them."""
    rows = read_jsonl(folder / FILE, ROW)
    return [{name: row[name] for name in ("step", *NAMES) if name in row} for row in rows if "fixed_subject" in row]


def saved_seconds(folder: Path, steps: int) -> float:
    """What `steps` more steps would have taken, by the logged ones."""
    seconds = [row["seconds"] for row in read_jsonl(folder / FILE) if "seconds" in row]
    return steps * statistics.fmean(seconds) if seconds else 0.0
