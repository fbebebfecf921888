"""What a run trains on and its engine, from the base and the photos: the same for a run and for its replay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from personalize import methods
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.data import class_images
from personalize.data.bucketed_set import BucketedSet, build_data
from personalize.data.subjects import Subject
from personalize.data.training_set import TrainingSet
from personalize.models.interface import LatentModel
from personalize.training import sharding
from personalize.training.engine import Engine
from personalize.training.manifest import Folders, run_class_sets


def class_latents(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders, wanted: Mapping[str, dict]
) -> dict[str, Tensor]:
    """Of each set; of one's own images all are in each. UserError for a folder of others than the wanted images."""
    sets, latents = run_class_sets(model, recipe, subjects), {}
    for name, place in priors.items():
        class_images.check_folder(place, wanted[name])
        own = wanted[name].get("images") == class_images.OWN
        latents[name] = class_images.class_latents(place, recipe.prior.count if own else sets[name].count)
    return latents


def prepare(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders, latents: Mapping[str, Tensor], *,
    screen: Terminal,
) -> tuple[TrainingSet | BucketedSet, Engine]:  # fmt: skip
    """Attaches the recipe's methods to a fresh base, and caches what does not change from step to step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sharding.shard(model)
        groups = methods.attach(model, recipe)
    options = {"text_trains": any(group["name"] != "unet" for group in groups), "progress": screen.progress}
    sizes = {name: one.size for name, one in run_class_sets(model, recipe, subjects).items()}
    pixels = class_images.class_pixels(priors, sizes)
    data = build_data(model, recipe, subjects, priors=latents, class_pixels=pixels, **options)
    return data, Engine(model, recipe, groups, say=screen.say)
