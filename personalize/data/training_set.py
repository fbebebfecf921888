"""What training sees: cached latents of photos and class images, cached text, and the batch of every step.

A batch is a pure function of (seed, step), so resuming needs no stored generator. B images, C latent channels,
h w latent size, N photos, M class images or predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from personalize.common.image_size import Size, as_size
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT
from personalize.core import noise, rng
from personalize.core.guidance import Cond
from personalize.core.timesteps import TIMESTEPS
from personalize.data.batch import Batch
from personalize.data.crops import (
    SQUARE,
    Crop,
    Photo,
    corner,
    draw_crops,
    epoch_order,
    epochs_of,
    image_tensor,
    mask_tensor,
)
from personalize.data.cut_mix import CutMix, Pair, mixed, rows_of
from personalize.data.inpainting_masks import Masks, encode_versions, masks_needed, of_passes
from personalize.data.step_prompts import StepPrompts, encode_all, step_prompts
from personalize.data.subjects import Subject
from personalize.generation import sampling
from personalize.generation.inpainting import masked_condition
from personalize.models.devices import take_rows, to_device
from personalize.models.interface import MASKED, LatentModel

AT_ONCE = 8  # predictions of the frozen base computed together


@dataclass
class PriorSet:
    """What keeps a class what it is: M latents (M,C,h,w), and the row of each one's prompt.

    Where it is the frozen base's own predictions, each has its noise eps, timestep t (M,) and prediction target too.
    masked (M,V,1+C,h,w): of an inpainting base, MASKED of each in passes 0 to V-1.
    """

    z0: Tensor
    texts: list[int]
    eps: Tensor | None = None
    t: Tensor | None = None
    target: Tensor | None = None
    masked: Tensor | None = None


class Prompts(NamedTuple):
    """texts: of each photo, then of each class, then what `per_step` and `cut_mix` need; cond: a row for each, or None."""

    texts: list[str]
    cond: Cond | None
    per_step: StepPrompts
    cut_mix: CutMix | None


@dataclass
class TrainingSet:
    """Photos of all subjects and their prompts, and what is preserved of their classes. masked: as in a PriorSet."""

    model: LatentModel
    recipe: Recipe
    photos: list[Photo]
    prompts: list[str]  # of each photo, then of each class, then what `step_prompts` and `cut_mix` need beside
    latents: tuple[Tensor, Tensor, Tensor | None] | None  # mean, deviation (N,C,h,w) and mask (N,1,h,w); None: crops are random
    texts: Cond | None  # one row a prompt; None while a text encoder trains
    step_prompts: StepPrompts
    prior: PriorSet | None = None
    masked: Tensor | None = None  # None where the latents are, and for a base that does not inpaint
    size: int | Size = 0  # that photos and class images have, px; 0: the recipe's square
    cut_mix: CutMix | None = None

    @property
    def steps_per_batch(self) -> tuple[int, int]:
        """Photos and class images of a step."""
        train = self.recipe.train
        return train.batch, (train.prior_batch or train.batch) if self.prior else 0

    @property
    def pixels(self) -> Size:
        """Width and height of an image."""
        return as_size(self.size or self.recipe.photos.size or self.model.size)

    @property
    def prior_count(self) -> int:
        return len(self.prior.z0) if self.prior else 0

    @property
    def largest_step(self) -> int:
        """A step with the largest images."""
        return 0

    @record_function("batch")
    def at(self, step: int, visit: int | None = None) -> Batch:
        """The global batch of a step: photos first, then class images. visit: steps before it that were of these photos."""
        seed, (subjects, priors), visit = self.recipe.seed, self.steps_per_batch, step if visit is None else visit
        which = epoch_order(len(self.photos), subjects, visit, seed=seed, purpose="subject")
        g = rng.generator(seed, "step", step)
        passes, pairs = epochs_of(len(self.photos), subjects, visit), self.cut_mix.pairs(which, step) if self.cut_mix else []
        shown = which + [pair.photo for pair in pairs]
        mean, std, mask, beside = mixed(self.photo_latents(shown, step, passes + [passes[pair.place] for pair in pairs]), pairs)
        z0 = mean + std * to_device(torch.randn(mean.shape, generator=g), mean.device)
        drawn = epoch_order(len(self.prior.z0), priors, visit, seed=seed, purpose="prior") if priors else []
        if priors:
            z0 = torch.cat([z0, take_rows(self.prior.z0, drawn)])
            if beside:
                of_prior = of_passes(self.prior.masked, drawn, epochs_of(len(self.prior.z0), priors, visit))
                beside = {MASKED: torch.cat([beside[MASKED], of_prior])}
        eps = to_device(torch.randn(z0.shape, generator=g), z0.device)
        t = to_device(TIMESTEPS[self.recipe.train.timesteps](len(z0), self.model.schedule.T, g), z0.device)
        if offset := self.recipe.train.noise_offset:
            eps = noise.with_offset(eps, offset, g)
        added = noise.perturbed(eps, gamma, g) if (gamma := self.recipe.train.input_perturbation) else None
        target = None
        if priors and self.prior.target is not None:
            eps[subjects:], t[subjects:] = take_rows(self.prior.eps, drawn), take_rows(self.prior.t, drawn)
            target = self.model.schedule.target(z0, eps, t).clone()  # for epsilon it is eps itself
            target[subjects:] = take_rows(self.prior.target, drawn)
            if added is not None:
                added[subjects:] = eps[subjects:]  # the base answered for these inputs, and is asked for no others
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(priors, *mask.shape[1:])])
        rows = rows_of(self.step_prompts.rows(which, passes, step), pairs) + [self.prior.texts[i] for i in drawn]
        is_prior = torch.arange(len(z0)) >= subjects
        beside |= self.size_conditions(which, step, priors, pairs)

        def cond(part: slice) -> Cond:
            return self.cond(rows[part]) | {key: value[part] for key, value in beside.items()}

        prompts = None if self.texts is not None else lambda part: [self.prompts[i] for i in rows[part]]
        return Batch(z0, eps, t, is_prior, cond, target, mask, added, prompts=prompts, beside=beside)

    def release(self) -> None:
        """Frees the networks whose answers are all here."""
        self.model.release(vae=self.latents is not None, texts=self.texts is not None)

    def photo_latents(
        self, which: Sequence[int], step: int, passes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None, Cond]:
        """Mean and deviation of the latents of photos, and their masks, where the crop of this step falls; and MASKED in
        these passes over the photos, for an inpainting base.
        """
        if self.latents is not None:
            mean, std, mask = self.latents
            masked = {} if self.masked is None else {MASKED: of_passes(self.masked, which, passes)}
            return take_rows(mean, which), take_rows(std, which), None if mask is None else take_rows(mask, which), masked
        painted = self.photo_masks.of(which, passes, self.pixels) if self.model.inpaints else None
        return encode_photos(self.model, self.recipe, [self.photos[i] for i in which], step, painted, size=self.pixels)

    @property
    def photo_masks(self) -> Masks:
        return Masks(self.recipe.seed, "subject", len(self.photos))

    def size_conditions(self, which: Sequence[int], step: int, priors: int, pairs: Sequence[Pair] = ()) -> Cond:
        """The sizes that photos had and where they are cut at this step; class images and pairs were made as they are."""
        crops, size = photo_crops(self.recipe, [self.photos[i] for i in which], step, self.pixels), self.pixels
        sizes = [(crop.photo.size, corner(crop, size)) for crop in crops]
        for pair in pairs:
            sizes[pair.place] = size, (0, 0)
        originals, corners = zip(*sizes)
        return self.model.size_conditions([*originals, *[size] * priors], [*corners, *[(0, 0)] * priors], size)

    def cond(self, rows: list[int]) -> Cond:
        if self.texts is None:
            return sampling.encode_texts(self.model, [self.prompts[i] for i in rows])
        return {key: take_rows(value, rows) for key, value in self.texts.items()}


def build_training_set(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], *, priors: Mapping[str, Tensor], text_trains: bool,
    class_pixels: Callable[[str, int], Tensor] | None = None, encode: Callable = encode_versions, progress=SILENT.progress,
    size: int | Size = 0, said: Prompts | None = None,
) -> TrainingSet:  # fmt: skip
    """Encodes photos and prompts once, where they do not change from step to step.

    priors: class images (M,C,h,w) by class word; empty where there are none. class_pixels: class word, number -> (1,3,H,W)
    of such an image, for an inpainting base, whose masked images `encode` encodes. size: of all images, as in a TrainingSet;
    said: of `read_prompts`, where that was called already. UserError names an unknown placeholder.
    """
    photos = [photo for subject in subjects for photo in subject.photos]
    classes, said = class_words(subjects), said or read_prompts(model, recipe, subjects, text_trains=text_trains)
    model.release(texts=said.cond is not None)  # before the VAE, which takes most where photos are large
    latents = None
    if recipe.photos.crop != "random" and not recipe.photos.flip:
        means, stds, masks, _ = zip(*(encode_photos(model, recipe, [photo], 0, size=size) for photo in photos))
        latents = torch.cat(means), torch.cat(stds), None if masks[0] is None else torch.cat(masks)
    data = TrainingSet(model, recipe, photos, said.texts, latents, said.cond, said.per_step, size=size, cut_mix=said.cut_mix)
    if priors:
        rows = [len(photos) + i for i, word in enumerate(classes) for _ in priors[word]]
        data.prior = PriorSet(torch.cat([priors[word] for word in classes]).to(model.device), rows)
    if model.inpaints:
        numbers = [(word, i) for word in classes for i in range(len(priors[word]))] if priors else []
        _encode_masked(data, lambda k: class_pixels(*numbers[k]), encode, progress)
    if not priors and recipe.prior.kind == "predictions" and recipe.prior.count and recipe.train.prior_weight:
        owners = [classes.index(s.class_word) for s in subjects for _ in s.photos]
        data.prior = base_predictions(data, [len(photos) + i for i in owners])
    return data


def _encode_masked(data: TrainingSet, class_pixels: Callable[[int], Tensor], encode: Callable, progress: Callable) -> None:
    """Fills `masked` of photos whose latents are here, and of class images, which are numbered through all classes."""
    model, recipe, (subjects, priors) = data.model, data.recipe, data.steps_per_batch
    steps, jobs = recipe.train.steps, []
    if data.latents is not None:
        crops = photo_crops(recipe, data.photos, 0, data.pixels)
        jobs.append((data, lambda i: image_tensor([crops[i]], data.pixels), data.photo_masks, subjects))
    if data.prior:
        jobs.append((data.prior, class_pixels, Masks(recipe.seed, "prior", len(data.prior.z0)), priors))
    versions = [masks_needed(steps, batch, masks.count) for _, _, masks, batch in jobs]
    total = sum(count * masks.count for count, (_, _, masks, _) in zip(versions, jobs, strict=True))
    with progress("masked images", total, unit="images") as advance:
        for count, (owner, pixels, masks, _) in zip(versions, jobs, strict=True):
            owner.masked = encode(model, pixels, masks, count, advance)


def class_words(subjects: list[Subject]) -> list[str]:
    return list(dict.fromkeys(subject.class_word for subject in subjects))


def read_prompts(model: LatentModel, recipe: Recipe, subjects: list[Subject], *, text_trains: bool) -> Prompts:
    """What is said of photos and classes, encoded where no text encoder trains. UserError names an unknown placeholder."""
    prompts = [s.prompt(photo.caption or recipe.train.prompt) for s in subjects for photo in s.photos]
    prompts += [fill(recipe.prior.prompt, "", word) for word in class_words(subjects)]
    per_step, more = step_prompts(model, recipe, prompts, [s.token for s in subjects for _ in s.photos])
    mix = CutMix.of(recipe, subjects, first=len(prompts) + len(more))
    more += mix.prompts if mix else []
    with torch.no_grad():
        cond = None if text_trains else encode_all(model, prompts, more)
    return Prompts(prompts + more, cond, per_step, mix)


def photo_crops(recipe: Recipe, photos: list[Photo], step: int, shape: int | Size = SQUARE) -> list[Crop]:
    """Where photos are cut at a step; the same step gives the same crops."""
    generator = rng.generator(recipe.seed, "crop", step)
    return draw_crops(photos, recipe.photos.crop, flip=recipe.photos.flip, generator=generator, shape=shape)


def encode_photos(
    model: LatentModel, recipe: Recipe, photos: list[Photo], step: int, painted: Tensor | None = None,
    *, size: int | Size = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Cond]:  # fmt: skip
    """Photos -> mean and deviation of their latents (B,C,h,w), and mask (B,1,h,w) in [background, 1] or none.

    painted (B,1,H,W): masks of the crops -> MASKED too; {} without. size: as in a TrainingSet.
    """
    settings, size = recipe.photos, size or recipe.photos.size or model.size
    crops = photo_crops(recipe, photos, step, size)
    pixels = image_tensor(crops, size)
    mean, std = model.encode_images(pixels)
    masked = {} if painted is None else {MASKED: masked_condition(model, pixels, painted)}
    if settings.background == 1:
        return mean, std, None, masked
    subject = mask_tensor(crops, (mean.shape[-1], mean.shape[-2]))
    return mean, std, (settings.background + (1 - settings.background) * subject).to(mean.device), masked


def base_predictions(data: TrainingSet, texts: list[int]) -> PriorSet:
    """`prior.count` predictions of the base as it is now, for noisy photos and the class prompt.

    Prior preservation without class images: the loss asks the tuned model to say what the frozen base says. texts:
    the row of the class prompt of each photo. Call it before anything has trained; a fresh adapter changes nothing.
    """
    model, recipe, N = data.model, data.recipe, len(data.photos)
    parts = []
    for start in range(0, recipe.prior.count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, recipe.prior.count))
        which = [i % N for i in numbers]
        mean, std, _, masked = data.photo_latents(which, start, [i // N for i in numbers])
        g = rng.generator(recipe.seed, "predictions", start)
        of_latents, eps = (torch.randn(mean.shape, generator=g).to(mean.device) for _ in range(2))
        t = TIMESTEPS[recipe.train.timesteps](len(which), model.schedule.T, g).to(mean.device)
        if offset := recipe.train.noise_offset:
            eps = noise.with_offset(eps, offset, g)
        z0 = mean + std * of_latents
        with torch.no_grad(), torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            target = model.predict(model.schedule.add_noise(z0, eps, t), t, data.cond([texts[i] for i in which]) | masked)
        parts.append((z0, eps, t, target.float(), *(value[:, None] for value in masked.values())))
    z0, eps, t, target, *masked = (torch.cat(part) for part in zip(*parts))
    return PriorSet(z0, [texts[i % N] for i in range(recipe.prior.count)], eps, t, target, *masked)
