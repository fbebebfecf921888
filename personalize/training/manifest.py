"""A run's manifest as it begins: what decides its weights, and where everything came from."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from personalize.common import distributed, run_folder
from personalize.common.bases import absolute_base
from personalize.common.files import key_of
from personalize.common.recipe import Recipe, recipe_to_dict
from personalize.data import class_images
from personalize.data.buckets import ClassSet, class_sets
from personalize.data.subjects import Subject
from personalize.models.interface import LatentModel
from personalize.training import validation
from personalize.training.find_run import decisive_settings

BESIDE = ("caption", "mask_sha256")  # of a photo, in manifests that say the machine, where there is one
Folders = Mapping[str, Path]  # name of a `ClassSet` -> its class images


def make_manifest(model: LatentModel, recipe: Recipe, subjects: list[Subject], priors: Folders) -> dict:
    """What the run is. Its identity hashes all that decides its weights."""
    sets = run_class_sets(model, recipe, subjects)
    prior = {
        name: class_images.settings_in(folder, model, recipe, sets[name].word, sets[name].size)
        for name, folder in priors.items()
    }
    return {
        "kind": "run",
        "status": "running",
        "identity": identity(recipe, subjects, fingerprint=model.fingerprint, prior=prior),
        "base": absolute_base(model.name),
        "fingerprint": model.fingerprint,
        "methods": list(recipe.train.methods),
        "subjects": [
            _subject_entry(subject, recipe, [priors[k] for k in priors if sets[k].word == subject.class_word])
            for subject in subjects
        ],
        "prior": {word: wanted | {"base": absolute_base(wanted["base"])} for word, wanted in prior.items()},
        "class_folders": {name: os.path.abspath(folder) for name, folder in priors.items()},
        "recipe": _with_absolute_paths(recipe_to_dict(recipe)),
        "seed": recipe.seed,
        "versions": run_folder.library_versions(),
        "machine": machine(model),
    }


def identity(recipe: Recipe, subjects: list[Subject], *, fingerprint: str, prior: Mapping[str, dict]) -> str:
    """The hash of all that decides a run's weights. fingerprint: of the base; prior: settings of class images by word."""
    # photos in their order, which decides the batches
    photos = [[[p.sha256, p.caption, p.mask_sha256] for p in (*s.photos, *s.held_out)] for s in subjects]
    decisive = {
        "photos": photos,
        "base": fingerprint,
        "recipe": decisive_settings(recipe_to_dict(recipe)),
        "prior": dict(prior),
    }
    if recipe.choose.every:  # the scores of one run are of images drawn in one way and judged by the same encoders
        sampling = validation.sampling_config(recipe, recipe.choose.steps).decisive()
        decisive["choosing"] = [sampling, recipe.evaluate.dino, recipe.evaluate.clip]
    return key_of(decisive)


def machine(model: LatentModel) -> dict:
    """What decides how sums are rounded, besides the libraries: the same numbers on another machine may differ in bits."""
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": model.device.type, "kind": kind, "threads": torch.get_num_threads(), "processes": distributed.world_size(),
    }  # fmt: skip


def run_class_sets(model: LatentModel, recipe: Recipe, subjects: list[Subject]) -> dict[str, ClassSet]:
    """The class images of a run, by their names."""
    px = {"edge": recipe.photos.size or model.size, "step": 8 * model.downscale}
    return {one.name: one for one in class_sets(subjects, recipe, **px)}


def _subject_entry(subject: Subject, recipe: Recipe, class_folders: list[Path]) -> dict:
    photos = [(photo, False) for photo in subject.photos] + [(photo, True) for photo in subject.held_out]
    return {
        "token": subject.token,
        "class": subject.class_word,
        "prompt": subject.prompt(recipe.train.prompt),
        "photos": [
            {"path": _absolute(photo.path), "sha256": photo.sha256, "held_out": held_out}
            | {key: value for key in BESIDE if (value := getattr(photo, key))}
            for photo, held_out in photos
        ],
        "prior_folder": os.path.abspath(class_folders[0]) if class_folders else "",
    }


def _with_absolute_paths(settings: dict) -> dict:
    """A run's settings as its manifest has them: paths mean the same from any folder."""
    source, vae = (
        path and os.path.abspath(os.path.expanduser(path)) for path in (settings["train"]["init_from"], settings["base_vae"])
    )
    return settings | {
        "base": absolute_base(settings["base"]),
        "base_vae": vae,
        "train": settings["train"] | {"init_from": source},
    }


def _absolute(path: str) -> str:
    return path if path.startswith("hf:") else os.path.abspath(path)
