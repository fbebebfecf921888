"""`personalize plan --many`: hours, disk and memory of a job of many subjects, before it starts.

One run of each kind is rehearsed on fake tensors; rows of one kind differ only in what changes no step's work.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.commands.session import resolve
from personalize.common.errors import UserError
from personalize.common.image_size import as_size
from personalize.common.recipe import Recipe, flat_settings, needs_class_images
from personalize.common.terminal import SILENT, Terminal
from personalize.data.manifest_rows import check_rows, read_rows, row_settings
from personalize.data.subjects import Subject, load_subjects
from personalize.evaluation.protocols import dev_templates
from personalize.models import devices
from personalize.training.memory import machine, rehearsal
from personalize.training.preflight import duration
from personalize.training.run import TrainingRun, disk_bytes

SAME_WORK = (
    "seed", "token", "class_word", "train.lr", "train.text_lr", "train.steps", "train.lr_schedule", "train.warmup",
    "train.prompt", "train.prior_weight", "train.weight_decay", "train.init_from", "prior.prompt", "embedding.init",
)  # fmt: skip
DRAWN = 0.8  # of a training step's work on one image: a step of sampling it, with guidance; LoRA 0.95, full 0.67
PNG = 1.5  # bytes of a pixel


@dataclass(frozen=True)
class PlanManyResult:
    """seconds: of all rows on one worker; disk, peak, free: bytes; peak: of the row that needs most."""

    rows: int
    workers: int
    seconds: float
    disk: int
    peak: int
    free: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.free


@dataclass(frozen=True)
class _Kind:
    """A rehearsed run: bytes on the device and on the disk, seconds of a step and of a step of sampling an image."""

    peak: int
    disk: int
    step: float
    drawn: float
    pixels: int
    has_world: bool


def plan_many(
    manifest: Path | str,
    *,
    workers: int = 1,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    screen: Terminal = SILENT,
) -> PlanManyResult:
    """What `many` with the same arguments takes on so many workers like this machine. UserError as from `many`."""
    rows = read_rows(manifest)
    recipes: dict[str, Recipe] = {}
    check_rows(rows, lambda row: recipes.update({str(row["id"]): resolve(recipe, [*settings, *row_settings(row)])}))
    every = [(row, dataclasses.replace(recipes[str(row["id"])], class_word=(row["class"],))) for row in rows]
    kinds: dict[tuple, list] = {}
    for row, resolved in every:
        kinds.setdefault(_kind_of(resolved), []).append((row, resolved))
    device = devices.choose_device(every[0][1].device)
    free, seconds, disk, peak, sets = machine.free_bytes(device), 0.0, 0, 0, {}
    for members in kinds.values():
        kind = _rehearsed(members, screen)
        each = [_row_seconds(kind, resolved) for _, resolved in members]
        seconds, disk, peak = seconds + sum(each), disk + len(each) * kind.disk, max(peak, kind.peak)
        what = ", ".join(members[0][1].train.methods)
        screen.say(
            f"{len(each)} rows of {what}: {kind.peak / 1e9:.2f} GB, about {duration(sum(each) / len(each))} and "
            f"{kind.disk / 1e6:.0f} MB of disk a row"
        )
        for _, resolved in members:
            if needs_class_images(resolved):
                sets[_set_of(resolved)] = (resolved, kind)
    drawn = [(r.prior.count * (r.prior.steps or r.draw.steps) * kind.drawn, r, kind) for r, kind in sets.values()]
    seconds += sum(each for each, _, _ in drawn)
    disk += sum(int(r.prior.count * kind.pixels * (PNG + 0.25)) for _, r, kind in drawn)  # latents: 4 channels, an 8th, float32
    if drawn:
        screen.say(f"class images: {len(drawn)} sets, each drawn once: about {duration(sum(each for each, _, _ in drawn))}")
    hours = f"about {duration(seconds)} on one worker like this one"
    shared = f", {duration(seconds / workers)} on {workers}" if workers > 1 else ""
    screen.say(f"{len(rows)} rows: {hours}{shared}, right to a factor of two; {disk / 1e9:.1f} GB of disk")
    return PlanManyResult(len(rows), workers, seconds, disk, peak, free)


def _kind_of(recipe: Recipe) -> tuple:
    return tuple((key, value) for key, value in flat_settings(recipe).items() if key not in SAME_WORK)


def _set_of(recipe: Recipe) -> tuple:
    """What the class images of a row depend on."""
    photos = (recipe.base, recipe.class_word, recipe.seed, recipe.photos.size, recipe.prompt)
    return (*photos, recipe.prior, recipe.draw.sampler, recipe.draw.steps)


def _rehearsed(members: Sequence[tuple[Mapping, Recipe]], screen: Terminal) -> _Kind:
    """Of the first row whose photos can be read. UserError where there is none."""
    subjects, recipe, why = _first_subject(members)
    if not subjects:
        raise UserError(f"no row of this kind has photos that can be read ({why}).")
    (run, counted), device = rehearsal.faked(recipe, subjects), devices.choose_device(recipe.device)
    speed = machine.measure_speed(device, devices.dtype_for(device, recipe.dtype, screen.say))
    step, images = speed.seconds(counted.phases["step"].work), sum(run.data.steps_per_batch)
    disk = disk_bytes(TrainingRun(Path(), run.data, run.engine, [], {}, False))
    width, height = as_size(recipe.photos.size or run.model.size)
    return _Kind(counted.peak, disk, step, DRAWN * step / images, width * height, run.model.has_world)


def _first_subject(members: Sequence[tuple[Mapping, Recipe]]) -> tuple[list[Subject], Recipe, str]:
    why = ""
    for row, recipe in members:
        recipe = dataclasses.replace(recipe, token=recipe.token or ("<subject>",))
        try:
            if row.get("photos"):
                return load_subjects([row["photos"]], recipe, tokens=recipe.token, size=1)[0], recipe, ""
        except UserError as error:
            why = why or str(error)
    return [], members[0][1], why or "their cells are empty"


def _row_seconds(kind: _Kind, recipe: Recipe) -> float:
    """Training, and the images by which checkpoints are chosen; those of the base are shared, and not counted."""
    choose, steps = recipe.choose, recipe.train.steps
    images = len(dev_templates(choose.prompts, kind.has_world)) * choose.count + choose.class_count
    scored = steps // choose.every if choose.every else 0
    return steps * kind.step + scored * images * (choose.steps or recipe.draw.steps) * kind.drawn
