"""What training sees: cached latents of photos and class pictures, cached text, and the batch of every step.

A batch is a pure function of (seed, step), so resuming needs no stored generator. B pictures, C latent channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from personalize import latent
from personalize.config import Recipe
from personalize.core import rng
from personalize.core.guidance import Cond
from personalize.crops import Photo, batch, order
from personalize.engine import Batch
from personalize.models.base import LatentModel
from personalize.prompts import fill


@dataclass
class TrainingSet:
    """photos and their prompts; moments (N,C,h,w) mean and deviation unless crops are random; prior (M,C,h,w) or none."""

    model: LatentModel
    recipe: Recipe
    photos: list[Photo]
    prompts: list[str]
    moments: tuple[Tensor, Tensor] | None
    prior: Tensor | None
    texts: Cond | None  # one row a prompt, the class prompt last; None while the text encoder trains
    steps_per_batch: tuple[int, int]  # photos and class pictures of a step

    def at(self, step: int) -> Batch:
        """The global batch of a step: photos first, then class pictures."""
        seed, (subjects, priors) = self.recipe.seed, self.steps_per_batch
        rows = order(len(self.photos), subjects, step, seed=seed, purpose="subject")
        g = rng.generator(seed, "step", step)
        mean, std = self._moments(rows, step)
        z0 = mean + std * torch.randn(mean.shape, generator=g).to(mean.device)
        which = rows
        if priors:
            drawn = order(len(self.prior), priors, step, seed=seed, purpose="prior")
            z0 = torch.cat([z0, self.prior[drawn]])
            which = rows + [len(self.prompts) - 1] * priors
        eps = torch.randn(z0.shape, generator=g).to(z0.device)
        t = torch.randint(0, self.model.schedule.T, (len(z0),), generator=g).to(z0.device)
        is_prior = torch.arange(len(z0)) >= subjects
        return Batch(z0, eps, t, is_prior, lambda part: self._cond(which[part]))

    def _moments(self, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        if self.moments is not None:
            return self.moments[0][rows], self.moments[1][rows]
        settings = self.recipe.photos
        images = batch(
            [self.photos[i] for i in rows],
            settings.size or self.model.size,
            how=settings.crop,
            flip=settings.flip,
            generator=rng.generator(self.recipe.seed, "crop", step),
        )
        return self.model.encode_images(images)

    def _cond(self, which: list[int]) -> Cond:
        if self.texts is None:
            return latent.encode(self.model, [self.prompts[i] for i in which])
        return {key: value[which] for key, value in self.texts.items()}


def build(model: LatentModel, recipe: Recipe, photos: list[Photo], *, token: str, prior: Tensor | None) -> TrainingSet:
    """Encodes photos and prompts once, where they do not change from step to step."""
    train = recipe.train
    prompts = [fill(photo.caption or train.prompt, token, recipe.class_word) for photo in photos]
    prompts.append(fill(recipe.prior.prompt, "", recipe.class_word))
    fixed = recipe.photos.crop == "center" and not recipe.photos.flip
    moments = None
    if fixed:
        size = recipe.photos.size or model.size
        parts = [model.encode_images(batch([photo], size)) for photo in photos]
        moments = (torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts]))
    with torch.no_grad():
        texts = None if train.text_encoder else latent.encode(model, prompts)
    counts = (train.batch, (train.prior_batch or train.batch) if prior is not None else 0)
    prior = prior.to(model.device) if prior is not None else None
    return TrainingSet(model, recipe, photos, prompts, moments, prior, texts, counts)
