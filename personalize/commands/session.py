"""What the commands share: the resolved recipe, the base that is loaded, a run that is opened."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from personalize.common.bases import has_world
from personalize.common.errors import UserError
from personalize.common.recipe import DEFAULTS, Recipe, load_recipe
from personalize.common.recipe_sections import ADAPTERS
from personalize.common.settings import read_toml
from personalize.common.terminal import Terminal

RUNS, PRIORS = Path("runs"), Path("priors")


def resolve(recipe: Path | str | None = None, settings: Sequence[str] = ()) -> Recipe:
    """The whole recipe: defaults of the base and the method, then the TOML file `recipe`, then texts such as "train.steps=400".

    Of several methods an adapter's defaults win. UserError names what is wrong in the file or in a text.
    """
    path = Path(recipe) if recipe else None
    given = load_recipe(path, settings)
    defaults = read_toml(DEFAULTS)["toyland" if has_world(given.base) else "sd"]
    adapts = set(given.train.methods) & set(ADAPTERS)
    method = "lora" if adapts else next(iter(given.train.methods), "full")
    return load_recipe(path, settings, defaults=defaults[method])


def resolve_subjects(
    photos: Path | str | Sequence[str], class_word: str | Sequence[str], recipe: Path | str | None, settings: Sequence[str]
) -> tuple[Recipe, list]:
    """The recipe, and a source of photos for each of its subjects."""
    words = [class_word] if isinstance(class_word, str) else list(class_word)
    resolved = resolve(recipe, [*settings, f"class_word={json.dumps(words)}"] if any(words) else settings)
    if not resolved.class_word:
        raise UserError("what is the subject? Give its class, as in: personalize train PHOTOS --class dog")
    if not all(word.strip() for word in resolved.class_word):
        raise UserError("the class is empty. Give a word, as in: --class dog")
    if len(resolved.class_word) == 1:
        return resolved, [photos]
    if isinstance(photos, str | Path):
        names = ", ".join(resolved.class_word)
        raise UserError(f"{len(resolved.class_word)} subjects, {names}, need as many folders of photos.")
    return resolved, list(photos)


def open_base(recipe: Recipe, screen: Terminal, *, make_network: Callable | None = None):
    """The recipe's base on its device -> LatentModel. make_network: as of `load_model`."""
    from personalize import models
    from personalize.common.malloc import keep_freed_memory_for
    from personalize.models.out_of_memory import is_out_of_memory

    try:
        model = models.load_model(
            recipe.base, device=recipe.device, dtype=recipe.dtype, vae=recipe.vae, prediction=recipe.prediction,
            base_vae=recipe.base_vae, zero_snr=recipe.zero_snr, offload=recipe.train.offload, chunks=recipe.prompt.chunks,
            weighting=recipe.prompt.weighting, say=screen.say, make_network=make_network,
        )  # fmt: skip
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"base {recipe.base!r} does not fit in the memory of device {recipe.device!r} ({str(error).splitlines()[0]}). Free "
            "memory there, give --dtype bfloat16, or use --device cpu."
        ) from None
    return keep_freed_memory_for(model)


def open_run(
    run: Path | str | None, *, runs: Path, base: str, settings: Sequence[str], screen: Terminal, of_base: bool = False
):  # fmt: skip
    """A run, the newest finished one in `runs` without a name -> (folder, its base, its recipe with `settings`, manifest).

    of_base: it may be the student of a bare base too. UserError where a student is to draw in another way than its own.
    """
    from personalize.common.run_folder import newest_run
    from personalize.training.load_run import require_run

    folder = Path(run) if run else newest_run(Path(runs))
    manifest = require_run(folder, of_base=of_base)
    if not run:
        screen.say(f"run: {os.path.relpath(folder)} ({manifest['subjects'][0]['prompt']!r}, newest finished)")
    recipe = load_recipe(None, [*settings, *([f"base={base}"] if base else [])], defaults=manifest["recipe"])
    if student := manifest.get("student"):
        from personalize.generation.students import require_own_sampling

        require_own_sampling(recipe.draw, student, folder)
    return folder, open_base(recipe, screen), recipe, manifest
