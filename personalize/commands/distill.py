"""`personalize distill`: a student of a run or a bare base, which draws in few steps.

It is a run of its own: of a base a LoRA, of a LoRA run a LoRA with more rows, of a full run all weights, of a learned word a
LoRA beside it. It starts as the teacher, and where the base has a student of its own with as many steps, with that on top.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from personalize import methods
from personalize.commands.session import RUNS, open_base, open_run, resolve
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.files import make_folder, slug, write_text
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.recipe_text import recipe_to_toml
from personalize.common.terminal import SILENT, Terminal
from personalize.generation import students
from personalize.methods import lora
from personalize.methods.adapter_files import read_adapter
from personalize.models.interface import LatentModel
from personalize.training import load_run, student_run
from personalize.training.distillation import Lesson, teach
from personalize.training.distillation_prompts import prompt_templates
from personalize.training.engine import Engine
from personalize.training.run import TrainingRun, disk_bytes, finish, restore, step_fits
from personalize.training.student_run import KINDS, Teacher


@dataclass(frozen=True)
class DistillResult:
    """folder: the student's run; steps: those done now."""

    folder: Path
    steps: int


def distill(
    run: Path | str | None = None,
    *,
    base: str = "",
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    name: str = "",
    screen: Terminal = SILENT,
) -> DistillResult:
    """A student of a run (the newest finished one in `runs`), or of a bare base, as the settings `distill.…` say.

    The student is written as a run beside it; its manifest has its sampler, its steps, and the guidance that it has inside. The
    same command goes on where it stopped. name: of its folder. UserError names what is wrong, before any long work.
    """
    teacher = _bare_teacher(base, settings, screen) if base and not run else _run_teacher(run, base, settings, runs, screen)
    usual = resolve(None, [f"base={teacher.recipe.base}", f"train.methods={teacher.kind[-1]}"])
    recipe = student_run.student_recipe(teacher, usual.train.lr)
    own = student_run.own_student(teacher.model, recipe)
    paths = student_run.student_paths(teacher, straight=bool(own))
    if own:
        screen.say(f"it starts from the student that base {teacher.model.name!r} has")
    recipe = replace(recipe, train=replace(recipe.train, steps=recipe.distill.updates * max(1, len(paths))))
    prompts = _prompts(teacher, recipe)
    manifest = student_run.student_manifest(teacher, recipe, own, prompts)
    folder = _folder(Path(runs), name or f"{teacher.name}-{recipe.draw.steps}-steps", manifest)
    with run_folder.lock(folder):
        if (folder / "manifest.json").exists() and run_folder.read_manifest(folder)["status"] == "finished":
            screen.say(f"this student is finished: {folder}")
            return DistillResult(folder, 0)
        with run_folder.marked(folder):
            lesson, groups = _lesson(teacher, recipe, own, prompts, paths, screen)
            return _train(lesson, groups, folder, manifest, screen)


def _bare_teacher(base: str, settings: Sequence[str], screen: Terminal) -> Teacher:
    recipe = resolve(None, ["train.methods=lora", *settings, f"base={base}"])
    if recipe.train.methods not in (("lora",), ("full",)):
        raise UserError(
            f"train.methods = {list(recipe.train.methods)}: the student of a base is a lora, or full. Give one of these."
        )
    return Teacher(open_base(recipe, screen), recipe, name=slug(Path(base).name))


def _run_teacher(run: Path | str | None, base: str, settings: Sequence[str], runs: Path, screen: Terminal) -> Teacher:
    folder, model, recipe, manifest = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
    train = recipe.train
    if "student" in manifest:
        raise UserError(
            f"{folder} is a student itself. Distil its teacher, {manifest['teacher']['run'] or 'the base'}, for other steps."
        )
    if tuple(sorted(train.methods)) not in KINDS or recipe.lora.dora or train.quantize:
        what = f"a run of {', '.join(train.methods)}"
        what = "a DoRA" if recipe.lora.dora else "a run on a quantized base" if train.quantize else what
        raise UserError(f"{folder} is {what}, of which no student is made. Train it with full, lora or textual-inversion.")
    load_run.load_run(model, folder, manifest)
    return Teacher(model, recipe, folder, manifest, folder.resolve().name)


def _prompts(teacher: Teacher, recipe: Recipe) -> list[str]:
    """What the student learns by: of a run's subjects, and as many times of their classes without them."""
    subjects = teacher.manifest["subjects"] if teacher.manifest else []
    templates = prompt_templates(recipe, has_world=teacher.model.has_world, of_subject=bool(subjects))
    if not subjects and (named := [template for template in templates if "{" in template]):
        raise UserError(
            f"prompt {named[0]!r}: {{token}} and {{class}} stand for a run's, and this is a bare base. Write words."
        )
    if not subjects:
        return list(templates)
    named = [(subject["token"], subject["class"]) for subject in subjects]
    return [fill(template, name, word) for template in templates for token, word in named for name in (token, "")]


def _folder(runs: Path, name: str, manifest: dict) -> Path:
    """That of the same student, or the first that is free of those called `name`, `name`-2 and so on."""
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not (folder / "manifest.json").exists() or run_folder.read_manifest(folder).get("identity") == manifest["identity"]:
            return folder
    raise UserError(f"{runs} holds 10000 runs called {name}. Give another folder: --runs.")


def _lesson(
    teacher: Teacher, recipe: Recipe, own: Path | None, prompts: list[str], paths: list, screen: Terminal
) -> tuple[Lesson, list[dict]]:
    """The student beside its teacher, and what of it trains: the U-Net's share."""
    student, base = open_base(recipe, screen), teacher.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        groups = methods.attach(student, recipe)
    _inherit(student, recipe, teacher, own)
    groups = [group for group in groups if group["name"] == "unet"]
    for network in (*student.networks.values(), *base.networks.values()):
        network.requires_grad_(False).eval()
    for p in (p for group in groups for p in group["params"]):
        p.requires_grad_(True)
    for model in (student, base):
        students.begin_at_noise(model)
    lora.fuse_adapters(base)
    return Lesson(student, recipe, base, teacher.recipe.draw, prompts, paths), groups


def _inherit(student: LatentModel, recipe: Recipe, teacher: Teacher, own: Path | None) -> None:
    """Fills what was attached with what the teacher has learned, and with the LoRA of the base's own student."""
    state, settings, rows = methods.state(student, recipe), teacher.recipe.lora, 0
    known = methods.state(teacher.model, teacher.recipe) if teacher.manifest else {}
    factors = {key: value for key, value in known.items() if key.startswith("lora:")}
    for key in known.keys() - factors.keys():
        state[key].copy_(known[key])
    if factors:
        scale = (settings.alpha or settings.rank) / (settings.rank**0.5 if settings.rslora else settings.rank)
        rows = lora.put_rows(state, factors, first=0, scale=scale)
    if own and recipe.train.methods == ("full",):
        lora.load_adapter(student, own, name="student", weight=1.0)
        lora.fuse_adapters(student)
    elif own:
        for part, adapter in read_adapter(own, student).items():
            lora.put_rows(state, {f"lora:{part}.{k}": v for k, v in adapter.tensors.items()}, first=rows, scale=1.0)


def _train(lesson: Lesson, groups: list[dict], folder: Path, manifest: dict, screen: Terminal) -> DistillResult:
    recipe = lesson.recipe
    make_folder(folder)
    if (folder / "manifest.json").exists():
        manifest |= {"sha256": run_folder.read_manifest(folder).get("sha256", {})}
    run_folder.write_manifest(folder, manifest)
    write_text(folder / "recipe.toml", recipe_to_toml(recipe, comments=True))
    run = TrainingRun(folder, lesson, Engine(lesson.model, recipe, groups, say=screen.say), [], manifest, True)
    run_folder.require_free_disk(folder, disk_bytes(run))
    with step_fits(run):
        start = restore(run, screen)
    teach(run, start, trackers=[], screen=screen)
    finish(run, screen)
    draw = recipe.draw
    screen.say(
        f"the student draws by {draw.sampler} in {draw.steps} steps: personalize generate --run {os.path.relpath(folder)}"
    )
    return DistillResult(folder, recipe.train.steps - start)
