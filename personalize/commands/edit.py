"""`personalize edit`: an image again with other words, by Prompt-to-Prompt; of a seed, or of a photo."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from personalize.commands.image_source import bare_base, loaded_run, put_files, remarks
from personalize.commands.session import RUNS, open_run
from personalize.common.errors import UserError
from personalize.common.files import writing
from personalize.common.image_size import Size
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.crops import Crop, fixed_box, image_tensor
from personalize.data.image_grid import grid
from personalize.data.image_to_edit import read_image
from personalize.data.map_sheet import map_sheet
from personalize.generation import sampling
from personalize.generation.attention_maps import require_maps, word_maps
from personalize.generation.editing import PARTS, Edit, require_edit, sample_edits
from personalize.generation.image_files import image_row, open_folder, out_folder, write_beside, write_image
from personalize.generation.words import read_emphasis
from personalize.models.interface import LatentModel

SHEET = "sheet.png"
STRENGTH = 0.7  # of a photo: 0.6 to 0.8 keep its layout (2304.06140)


@dataclass(frozen=True)
class EditResult:
    """files: of each edit the source, the target from the same noise without control, and the edited image.

    sheet: all of them as one image, an edit a row. maps: a sheet of maps for each edited image.
    """

    files: list[Path]
    sheet: Path
    maps: list[Path] = field(default_factory=list)


def edit(
    source: str, target: str = "", *, keep: float = 0.8, keep_layout: float = 0.4, local_blend: bool = False,
    weights: Sequence[str] = (), ignore: Sequence[str] = (), maps: bool = False, image: Path | str | None = None,
    strength: float | None = None, run: Path | str | None = None, base: str = "", checkpoint: str = "",
    loras: Sequence[str] = (), embeddings: Sequence[str] = (),
    settings: Sequence[str] = (), runs: Path = RUNS, out: Path | None = None, screen: Terminal = SILENT,
) -> EditResult:  # fmt: skip
    """`draw.count` images of the prompt `source`, and each with the words of `target` (by default the same words).

    keep, keep_layout: the share of sampling in which attention to the words, and within the image, is the source's.
    weights ("hat=1.5") and ignore: words of the target that count more or less, or not at all. local_blend: where none of the
    words that change is, the image stays the source's. maps: also a sheet for each edited image: where it attends to each word.
    image: a photo that `source` describes, its middle square, in place of a drawn source; strength: the share of sampling
    that is made anew for it, by ddpm; 0.7 where not given. All else as for `generate`. UserError names what is wrong.
    """
    emphasis = read_emphasis(weights, ignore)
    if not (target or emphasis):
        raise UserError("what is to change? Give a second prompt, --weight WORD=NUMBER or --ignore WORDS.")
    if strength is not None and image is None:
        raise UserError("--strength is about a photo. Give it, as in: --image FILE")
    strength = STRENGTH if strength is None else strength
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} is not a share of the sampling steps; give a number above 0, up to 1.")
    if base and not run:
        model, recipe, prompts, origin, home = bare_base([source, target or source], base, settings, screen)
    else:
        opened = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
        model, recipe, prompts, origin, home = loaded_run([source, target or source], *opened, at=checkpoint, screen=screen)
    origin |= put_files(model, loras=loras, embeddings=embeddings, screen=screen)
    change, photo = Edit(*prompts, keep, keep_layout, emphasis, local_blend), None
    folder = out_folder(out or home.parent / "edits")
    require_edit(model, change)
    if maps or local_blend:
        require_maps(model, recipe.draw, "--maps" if maps else "--local-blend")
    if image is not None:
        recipe = replace(recipe, draw=replace(recipe.draw, sampler="ddpm"))  # the sampler whose noise an inversion finds
        photo, origin["image"] = _read_photo(model, Path(image), sampling.image_size(model, recipe.draw))
        origin["strength"] = strength
    for line in remarks(model, prompts, recipe.draw.negative, origin):
        screen.say(line)
    return _write_edits(model, recipe, change, photo, out=folder, origin=origin, maps=maps, screen=screen)


def _read_photo(model: LatentModel, path: Path, size: Size) -> tuple[Tensor, dict]:
    """A photo's middle at this size -> its z0 (1,C,h,w), and its name and hash."""
    photo = read_image(path)
    mean, _ = model.encode_images(image_tensor([Crop(photo, fixed_box(photo, "center", shape=size))], size))
    return mean, {"file": photo.name, "sha256": photo.sha256}


def _write_edits(
    model: LatentModel, recipe: Recipe, change: Edit, photo: Tensor | None, *, out: Path, origin: dict, maps: bool,
    screen: Terminal,
) -> EditResult:  # fmt: skip
    config, files, images, sheets = recipe.draw, [], [], []
    first = 0 if photo is None else config.steps - max(1, round(origin["strength"] * config.steps))
    rows_by_file = open_folder(out)
    with screen.progress("drawing", config.count, unit="edits") as advance:
        for part in sampling.sampling_batches(model, config.count, config, rows=len(PARTS)):
            generators = sampling.image_generators(recipe.seed, part)
            attention, options = [] if maps else None, {"photo": photo, "first": first}
            z0 = sample_edits(model, change, generators, config, **options, maps=attention).transpose(0, 1).flatten(0, 1)
            for k, image in enumerate(sampling.to_pil(sampling.require_images(model.decode_latents(z0), model))):
                which = {"part": PARTS[k % len(PARTS)], "index": part[k // len(PARTS)]}
                row = _row(model, recipe, change, origin=origin, size=image.size, **which)
                files.append(write_image(out, image, row, rows_by_file))
                images.append(image)
                if maps and which["part"] == "edited":
                    sheet = map_sheet(image, word_maps(model, change.target, attention[k // len(PARTS)]))
                    sheets.append(write_beside(out, sheet, row, "maps"))
            advance(len(part))
    with writing(out / SHEET) as temporary:
        grid(images, len(PARTS)).save(temporary)
    return EditResult(files, out / SHEET, sheets)


def _row(
    model: LatentModel, recipe: Recipe, change: Edit, *, origin: dict, part: str, index: int, size: tuple[int, int]
) -> dict:
    """As of `generate`, and which part of which edit it is."""
    entry = {"part": part, "source": change.source, "target": change.target, "keep": change.keep, "layout": change.layout}
    entry |= {"local_blend": True} if change.local_blend else {}
    prompt, words = (change.source, {}) if part == "source" else (change.target, change.emphasis.record)
    return image_row(model, recipe, prompt, origin=origin | words | {"edit": entry}, index=index, size=size)
