"""Several subjects trained in one batch on one warm base, each a run of its own: see `training.together`."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from personalize.commands import train
from personalize.commands.session import PRIORS, RUNS
from personalize.commands.train import TrainResult
from personalize.common import distributed, run_folder
from personalize.common.errors import UserError
from personalize.common.files import slug
from personalize.common.recipe import Recipe, needs_class_images
from personalize.common.terminal import SILENT, Terminal
from personalize.data.subjects import Subject
from personalize.methods.stacked_lora import Stack, check_together
from personalize.models.interface import LatentModel
from personalize.training.find_run import find_named, find_run, is_run
from personalize.training.manifest import Folders, make_manifest
from personalize.training.run import disk_bytes
from personalize.training.together import Member, check_alike, ended_by_errors, train_members

Ready = tuple[Recipe, list[Subject], Folders]


def train_together(
    model: LatentModel, rows: Sequence[tuple[Recipe, Sequence]], *, names: Sequence[str] = (), runs: Path = RUNS,
    priors: Path = PRIORS, screen: Terminal = SILENT,
) -> list[TrainResult | Exception]:  # fmt: skip
    """Trains a run of each row in one batch -> its result, or the error that ended it alone, in the order of the rows.

    model: their base, bare, and so it is left. rows: of each what `session.resolve_subjects` gives; names: of their folders,
    else those of `train`. Each is the run that `train` makes of it, resumed if it is there, to rounding: its manifest says
    "together". seconds of a result: of all, over their number. UserError where they cannot train in one batch; Interrupted
    as of `train`.
    """
    if distributed.world_size() > 1:
        raise UserError("several subjects train in one batch in one process. Start one process a card, each with its own rows.")
    for recipe, _ in rows:
        check_together(model, recipe)
    check_alike([recipe for recipe, _ in rows])
    results: dict[int, TrainResult | Exception] = {}
    ready: dict[int, Ready] = {}
    for number, (recipe, sources) in enumerate(rows):
        try:
            ready[number] = _ready(model, recipe, sources, priors, screen)
        except (UserError, OSError) as error:
            results[number] = error
    stack, members = Stack(model), {}
    try:
        with ended_by_errors(members.values()):
            for number, each in ready.items():
                try:
                    begun = _begun(stack, *each, name=names[number] if names else "", runs=Path(runs), screen=screen)
                except (UserError, OSError) as error:
                    begun = error
                (members if isinstance(begun, Member) else results)[number] = begun
            for member in members.values():
                member.run.manifest["together"] = len(members)
                run_folder.write_manifest(member.run.folder, member.run.manifest)
            began = time.monotonic()
            train_members(stack, list(members.values()), screen)
    finally:
        stack.leave()
    seconds = (time.monotonic() - began) / max(1, len(members))
    results |= {k: m.error or TrainResult(m.run.folder, m.steps - m.began, seconds) for k, m in members.items()}
    return [results[number] for number in range(len(rows))]


def _ready(model: LatentModel, recipe: Recipe, sources: Sequence, priors: Path, screen: Terminal) -> Ready:
    """One row checked, with the class images that it needs."""
    recipe, subjects = train.checked(model, sources, recipe, profile=False, screen=screen)
    folders = {}
    if needs_class_images(recipe):
        folders, _ = train.class_folders(model, recipe, subjects, root=Path(priors), drawn=None, own=None, screen=screen)
    return recipe, subjects, folders


def _begun(
    stack: Stack, recipe: Recipe, subjects: list[Subject], folders: Folders, *, name: str, runs: Path, screen: Terminal
) -> Member | TrainResult:
    """The run of one row, held until it ends; or what it was, if it is finished."""
    manifest = make_manifest(stack.model, recipe, subjects, folders)
    folder, difference = (
        find_named(runs, name, manifest)
        if name
        else find_run(runs, slug("-".join(f"{s.token}-{s.class_word}" for s in subjects)), manifest)
    )
    with ExitStack() as scope:
        scope.enter_context(run_folder.lock(folder))
        if is_run(folder) and run_folder.read_manifest(folder)["status"] == "finished":
            screen.say(f"this run is finished: {folder}")
            return TrainResult(folder, 0, 0.0)
        if difference:
            screen.say(difference)
        scope.enter_context(run_folder.marked(folder))
        with stack.attaching() as attached:
            run = train.begin(stack.model, recipe, subjects, folders, folder, manifest, screen)
        run_folder.require_free_disk(folder, disk_bytes(run))
        return Member(run, attached, scope.pop_all())
