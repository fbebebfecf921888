"""`personalize prior`: class pictures, drawn by the frozen base."""

from dataclasses import dataclass
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data import class_images
from personalize.models.interface import LatentModel


@dataclass(frozen=True)
class PriorResult:
    """folder: where the class pictures are; drawn: how many were missing; count: how many there are."""

    folder: Path
    drawn: int
    count: int


def run(
    model: LatentModel, recipe: Recipe, class_word: str, *, root: Path, folder: Path | None = None, screen: Terminal = SILENT
) -> PriorResult:
    """Draw what is missing of `recipe.prior.count` class pictures, into `folder` or the one their key names in `root`."""
    if not class_word:
        raise UserError("which class? Give one, as in: personalize prior dog")
    wanted = class_images.class_image_settings(model, recipe, class_word)
    folder = folder or class_images.folder_for(root, wanted)
    drawn = class_images.generate_missing(
        model, folder, wanted, recipe.prior.count, batch=recipe.prior.batch, progress=screen.progress
    )
    if not drawn:
        screen.say(f"{recipe.prior.count} class pictures of {wanted['prompt']!r} are there already: {folder}")
    return PriorResult(folder, drawn, recipe.prior.count)
