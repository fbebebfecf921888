"""What a run trains on and its engine, from the base and the photos: the same for a run and for its replay."""

from collections.abc import Callable, Mapping

import torch

from personalize import methods
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.data import class_images
from personalize.data.subjects import Subject
from personalize.data.training_set import TrainingSet, build_training_set
from personalize.models.interface import LatentModel
from personalize.training import sharding
from personalize.training.engine import Engine
from personalize.training.manifest import Folders


def class_latents(priors: Folders, wanted: Mapping[str, dict], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Latents (M,C,h,w) of the class images by class word. UserError where a folder holds others than the wanted ones."""
    for word, place in priors.items():
        class_images.check_folder(place, wanted[word])
    return {word: class_images.class_latents(place, recipe.prior.count) for word, place in priors.items()}


def prepare(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders, latents: Mapping[str, torch.Tensor], *,
    build: Callable = build_training_set, screen: Terminal,
) -> tuple[TrainingSet, Engine]:  # fmt: skip
    """Attaches the recipe's methods to a fresh base, and caches what does not change from step to step, by `build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sharding.shard(model)
        groups = methods.attach(model, recipe)
    options = {"text_trains": any(group["name"] != "unet" for group in groups), "progress": screen.progress}
    pixels = class_images.class_pixels(priors, recipe.photos.size or model.size)
    data = build(model, recipe, subjects, priors=latents, class_pixels=pixels, **options)
    return data, Engine(model, recipe, groups, say=screen.say)
