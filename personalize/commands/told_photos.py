"""What `evaluate` judges where nothing is trained: a base that is told photos beside each prompt."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from personalize.commands.session import open_base, resolve
from personalize.common.errors import UserError
from personalize.common.files import key_of, slug
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe, recipe_to_dict
from personalize.common.terminal import Terminal
from personalize.data.image_prompt import read_image_prompt
from personalize.data.photos import load_photos
from personalize.evaluation import image_cache
from personalize.models.image_adapter import ImagePrompt
from personalize.models.interface import LatentModel
from personalize.training import validation

METHOD = "image-prompt"


class Told(NamedTuple):
    """As of `open_run`; the folder is where the report goes. image: None at scale 0."""

    folder: Path
    model: LatentModel
    recipe: Recipe
    manifest: dict
    image: ImagePrompt | None


def told_photos(
    photos: Path | str, class_word: str, *, base: str, scale: float | None, adapter: Path | None, settings: Sequence[str],
    runs: Path, screen: Terminal,
) -> Told:  # fmt: skip
    """Photos of a subject that a base is told -> what `evaluate` takes in place of a run. UserError for what cannot be used."""
    if not class_word.strip():
        raise UserError("what is on the photos? Give the class word too, as in: --image-prompt my_dog/ --class dog")
    recipe = resolve(None, [*settings, *([f"base={base}"] if base else [])])
    if recipe.draw.like:
        raise UserError(
            "--like is trained on the photos of a run, and nothing is trained here. Leave it out, or evaluate a run."
        )
    model = open_base(recipe, screen)
    image, record = read_image_prompt(model, photos, scale=scale, adapter=adapter)
    loaded, notices = load_photos(photos, min_size=recipe.photos.min_size or model.size)
    for line in notices:
        screen.say(line)
    paths = [photo.path if photo.path.startswith("hf:") else os.path.abspath(photo.path) for photo in loaded]
    entries = [{"path": path, "sha256": photo.sha256} for path, photo in zip(paths, loaded, strict=True)]
    subject = {"token": "", "class": class_word, "prompt": fill(recipe.train.prompt, "", class_word), "photos": entries}
    manifest = {
        "base": recipe.base, "methods": [METHOD], "recipe": recipe_to_dict(recipe), "seed": recipe.seed,
        "subjects": [subject | {"prior_folder": ""}], "untrained": f"photos at scale {record['image_prompt']['scale']:g}",
    }  # fmt: skip
    key = key_of(record | {"base": model.fingerprint, "class": class_word})[:8]
    return Told(Path(runs) / f"{METHOD}-{slug(class_word)}-{key}", model, recipe, manifest, image)


def told_sets(
    model: LatentModel, recipe: Recipe, folder: Path, image: ImagePrompt | None, by_base: image_cache.ImageSet, *,
    steer: Callable | None, screen: Terminal,
) -> list[image_cache.ImageSet]:  # fmt: skip
    """What the base draws -> its class images as "class", for nothing was trained that could change them; and the same prompts
    with the photos as "subject", drawn into `folder`.
    """
    options = {"seed": recipe.seed, "purpose": "evaluate", "config": validation.sampling_config(recipe)}
    place = image_cache.cache_folder(folder / "evaluation" / "pictures", METHOD, model, **options)
    classes = image_cache.of_kind(by_base, image_cache.LOOK_ALIKES, "class")
    subject = replace(image_cache.of_kind(by_base, "base", "subject"), place=place)
    what = "drawing with the photos"
    image_cache.generate_missing(model, subject, **options, progress=screen.progress, what=what, image=image, steer=steer)
    return [*([classes] if classes.jobs else []), subject]
