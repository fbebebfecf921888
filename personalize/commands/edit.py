"""`personalize edit`: an image again with other words, by Prompt-to-Prompt; of a seed, or of a photo."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from personalize.commands.generate import image_row, open_folder, open_source, out_folder, remarks, said, write_image
from personalize.commands.session import RUNS
from personalize.common.errors import UserError
from personalize.common.files import writing
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.image_grid import grid
from personalize.generation.editing import PARTS, Edit, require_edit, sample_edits
from personalize.generation.sampling import (
    default_batch_size,
    image_generators,
    image_size,
    require_images,
    sampling_batches,
    to_pil,
)
from personalize.generation.words import read_emphasis
from personalize.models.interface import LatentModel

SHEET = "sheet.png"


@dataclass(frozen=True)
class EditResult:
    """files: of each edit the source, the target from the same noise without control, and the edited image; sheet: all of them,
    an edit a row."""

    files: list[Path]
    sheet: Path


def edit(
    source: str,
    target: str = "",
    *,
    keep: float = 0.8,
    keep_layout: float = 0.4,
    weights: Sequence[str] = (),
    ignore: Sequence[str] = (),
    image: Path | str | None = None,
    strength: float = 0.7,
    run: Path | str | None = None,
    base: str = "",
    checkpoint: str = "",
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    out: Path | None = None,
    screen: Terminal = SILENT,
) -> EditResult:
    """`draw.count` images of the prompt `source`, and each with the words of `target` (by default the same words).

    keep, keep_layout: the share of sampling in which attention to the words, and within the image, is the source's.
    weights ("hat=1.5") and ignore: words of the target that count more or less, or not at all.
    image: a photo that `source` describes, its middle square, in place of a drawn source; strength: the share of sampling that
    is made anew for it. All else as for `generate`. UserError names what is wrong.
    """
    emphasis = read_emphasis(weights, ignore)
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} is not a share of the sampling steps; give a number above 0, up to 1.")
    given = {"run": run, "base": base, "checkpoint": checkpoint, "loras": loras, "embeddings": embeddings}
    prompts = [source, target or source]
    model, recipe, prompts, origin, home = open_source(prompts, **given, settings=settings, runs=runs, screen=screen)
    change = Edit(*prompts, keep, keep_layout, emphasis)
    folder = out_folder(out or home / "edits")
    require_edit(model, change)
    photo, first = None, 0
    if image is not None:
        recipe = replace(recipe, draw=replace(recipe.draw, sampler="ddpm"))  # the one whose noise an inversion knows
        photo, origin["image"] = _read_photo(model, Path(image), image_size(model, recipe.draw))
        first = recipe.draw.steps - max(1, round(recipe.draw.steps * strength))
        origin["first"] = first
    for line in remarks(model, prompts, recipe.draw.negative, origin):
        screen.say(line)
    return _write_edits(model, recipe, change, photo, first, out=folder, origin=origin, screen=screen)


def _write_edits(
    model: LatentModel, recipe: Recipe, change: Edit, photo, first: int, *, out: Path, origin: dict, screen: Terminal
) -> EditResult:
    config, files, images = recipe.draw, [], []
    at_once = max(1, (config.batch or default_batch_size(model, image_size(model, config))) // len(PARTS))
    rows_by_file = open_folder(out)
    with screen.progress("drawing", config.count, unit="edits") as advance:
        for part in sampling_batches(model, config.count, replace(config, batch=at_once)):
            z0 = sample_edits(model, change, image_generators(recipe.seed, part), config, photo=photo, first=first)
            decoded = to_pil(require_images(model.decode_latents(z0.transpose(0, 1).flatten(0, 1)), model))
            for k, image in enumerate(decoded):
                index, name = part[k // len(PARTS)], PARTS[k % len(PARTS)]
                row = _row(model, recipe, change, origin=origin, part=name, index=index, size=image.size)
                files.append(write_image(out, image, row, rows_by_file))
                images.append(image)
            advance(len(part))
    with writing(out / SHEET) as temporary:
        grid(images, len(PARTS)).save(temporary)
    return EditResult(files, out / SHEET)


def _row(
    model: LatentModel, recipe: Recipe, change: Edit, *, origin: dict, part: str, index: int, size: tuple[int, int]
) -> dict:
    """As of `generate`, and which part of which edit it is."""
    entry = {"part": part, "source": change.source, "target": change.target, "keep": change.keep, "layout": change.layout}
    words = {} if part == "source" else said(change.emphasis)
    prompt = change.source if part == "source" else change.target
    return image_row(model, recipe, prompt, origin=origin | words | {"edit": entry}, index=index, size=size)


def _read_photo(model: LatentModel, path: Path, size: int):
    """A photo's middle square at `size` px -> its z0 (1,C,h,w), and its name and hash."""
    from personalize.data.crops import Crop, image_tensor, largest_box
    from personalize.data.photos import read_photo

    photo = read_photo(path)
    mean, _ = model.encode_images(image_tensor([Crop(photo, largest_box(photo))], size))
    return mean, {"file": photo.name, "sha256": photo.sha256}
