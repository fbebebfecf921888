"""What a student is: of which teacher, with which recipe, by which steps, and its manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from personalize.common import run_folder
from personalize.common.bases import absolute_base
from personalize.common.errors import UserError
from personalize.common.files import content_hash, key_of
from personalize.common.recipe import Recipe, recipe_to_dict
from personalize.common.recipe_sections import Choose
from personalize.core import distillation
from personalize.generation import students
from personalize.methods.adapter_files import read_adapter
from personalize.models.interface import LatentModel
from personalize.training.manifest import machine

# The layers of the released LCM-LoRAs; `lora.conv` has the convolutions.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
KINDS = {  # methods of a run -> those of its student
    ("full",): ("full",), ("lora",): ("lora",), ("textual-inversion",): ("textual-inversion", "lora"),
    ("lora", "textual-inversion"): ("textual-inversion", "lora"),
}  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """What is distilled: a base, or a run in it with its folder and manifest; with its recipe."""

    model: LatentModel
    recipe: Recipe
    folder: Path | None = None
    manifest: Mapping | None = None
    name: str = ""

    @property
    def kind(self) -> tuple[str, ...]:
        """The methods of the student."""
        return KINDS[tuple(sorted(self.recipe.train.methods))] if self.manifest else self.recipe.train.methods


def student_paths(teacher: Teacher, *, straight: bool) -> list[list[list[int]]]:
    """Of each student in turn its steps; [] for lcm. UserError where halving does not lead to the student's steps.

    straight: one student alone, whose teacher makes all its steps: where it starts from one that has learned most of it.
    """
    settings, schedule = teacher.recipe.distill, teacher.model.schedule
    if settings.method == "lcm":
        return []
    quotient = settings.teacher / settings.steps
    if quotient < 2 or quotient != 2 ** (quotient.as_integer_ratio()[0].bit_length() - 1):
        raise UserError(
            f"distill.steps = {settings.steps}: halving the teacher's {settings.teacher} steps does not lead there. Give a "
            f"teacher of {2 * settings.steps}, {4 * settings.steps} or {8 * settings.steps} steps: --set distill.teacher=…"
        )
    if schedule.prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise UserError(
            f"base {teacher.model.name!r} predicts noise at zero terminal SNR, where it says nothing. Leave zero_snr out."
        )
    at_once = settings.teacher // settings.steps if straight else 2
    return distillation.student_paths(schedule, settings.teacher, settings.steps, at_once=at_once)


def student_recipe(teacher: Teacher, usual_lr: float) -> Recipe:
    """What trains, at which rate, and how it is drawn with; `train.steps` are not set yet."""
    recipe, settings, kind = teacher.recipe, teacher.recipe.distill, teacher.kind
    adapts = "lora" in (recipe.train.methods if teacher.manifest else ())
    train = replace(
        recipe.train, methods=kind, lr=settings.lr or usual_lr, lr_schedule="cosine", warmup=0, batch=settings.batch,
        init_from="", optimizer="adamw", ema=0.0, checkpoint_every=0, sample_every=0, held_out_every=0, stop="", keep=1,
        engine="eager", accumulate=1, text_encoder=recipe.train.text_encoder and bool(teacher.manifest),
    )  # fmt: skip
    if "lora" in kind:
        targets = tuple(dict.fromkeys([*recipe.lora.targets, *TARGETS]))
        rank = settings.rank + (recipe.lora.rank if adapts else 0)
        recipe = replace(
            recipe, lora=replace(recipe.lora, rank=rank, alpha=0.0, targets=targets, conv=True, rslora=False, plus_ratio=1.0)
        )
    own = {"sampler": "lcm" if settings.method == "lcm" else "ddim", "steps": settings.steps}
    return replace(recipe, train=train, draw=students.own_sampling(recipe.draw, own), choose=replace(Choose(), every=0))


def own_student(model: LatentModel, recipe: Recipe) -> Path | None:
    """The base's own student where it has as many steps and the same sampler, and fits into the rows."""
    folder = model.folder / students.FOLDER
    if not (folder / students.FILE).exists():
        return None
    student = students.read_student(folder)
    same = (student["sampler"], student["steps"]) == (recipe.draw.sampler, recipe.draw.steps)
    rank = max(part.config.r for part in read_adapter(folder, model).values()) if same else 0
    return folder if same and (rank <= recipe.distill.rank or recipe.train.methods == ("full",)) else None


def student_manifest(teacher: Teacher, recipe: Recipe, own: Path | None, prompts: list[str]) -> dict:
    model, old, draw = teacher.model, teacher.manifest or {}, teacher.recipe.draw
    taught = {"run": str(teacher.folder.resolve()) if teacher.folder else "", "sha256": old.get("sha256", {}).get("model", "")}
    student = {"sampler": recipe.draw.sampler, "steps": recipe.draw.steps, "guidance_baked": draw.guidance}
    student["teacher_draw"] = {
        key: value for key, value in recipe_to_dict(teacher.recipe)["draw"].items() if key in students.OWN
    }
    decisive = {
        "student": student, "base": model.fingerprint, "teacher": taught["sha256"] or old.get("identity", ""),
        "distill": asdict(recipe.distill), "train": asdict(recipe.train), "lora": asdict(recipe.lora), "seed": recipe.seed,
        "prompts": prompts, "own": content_hash(own) if own else "", "dtype": recipe.dtype,
    }  # fmt: skip
    return {
        "kind": "run" if old else "student", "status": "running", "identity": key_of(decisive),
        "base": absolute_base(model.name), "fingerprint": model.fingerprint, "methods": list(recipe.train.methods),
        "subjects": old.get("subjects", []), "student": student, "teacher": taught, "prior": old.get("prior", {}),
        "class_folders": old.get("class_folders", {}),
        "recipe": recipe_to_dict(recipe) | {"base": absolute_base(recipe.base)}, "seed": recipe.seed,
        "versions": run_folder.library_versions(), "machine": machine(model),
    }  # fmt: skip
