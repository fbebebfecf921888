"""`personalize prior`: class images, drawn by the frozen base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.commands.session import PRIORS, open_base, resolve
from personalize.common.terminal import SILENT, Terminal
from personalize.data import class_images


@dataclass(frozen=True)
class PriorResult:
    """folder: where the class images are; drawn: how many were missing; count: how many there are."""

    folder: Path
    drawn: int
    count: int


def prior(
    class_word: str,
    *,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    root: Path = PRIORS,
    folder: Path | None = None,
    screen: Terminal = SILENT,
) -> PriorResult:
    """Generate what is missing of `prior.count` class images, into `folder` or the one in `root` that their key names.

    recipe: a TOML file; settings: texts such as "prior.count=50". UserError for a folder of other images.
    """
    resolved = resolve(recipe, settings)
    model = open_base(resolved, screen)
    if resolved.photos.shape == "buckets":
        screen.say(
            "these are squares: in which other shapes class images are needed, train knows by the photos, and draws them"
        )
    place, drawn = class_images.complete_set(model, resolved, class_word, root=Path(root), folder=folder, screen=screen)
    return PriorResult(place, drawn, resolved.prior.count)
