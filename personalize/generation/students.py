"""Students: weights that draw in few steps, with the guidance inside. How they are drawn with, and what else is refused."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.common.recipe_sections import SAMPLERS, SamplingConfig
from personalize.common.untrusted import Many, Number, Table, Text
from personalize.models.interface import LatentModel

FOLDER, FILE = "student", "student.json"  # of a base: its own student, a LoRA; and what it is
DRAW = Table(
    {
        "sampler": Text(SAMPLERS), "steps": Number(1, 1000), "guidance": Number(0, 1000, real=True), "negative": Text(),
        "rescale": Number(0, 1, real=True), "interval": Many(Number(0, 1, real=True), 0, 2),
    },
    needs=("sampler", "steps", "guidance", "rescale", "interval", "negative"),
)  # fmt: skip
STUDENT = Table(
    {"sampler": Text(SAMPLERS), "steps": Number(1, 1000), "guidance_baked": Number(0, 1000, real=True), "teacher_draw": DRAW},
    needs=("sampler", "steps", "guidance_baked"),
)
OWN = ("sampler", "steps", "guidance", "rescale", "interval", "negative")  # of `draw`, which a student decides


def own_sampling(draw: SamplingConfig, student: Mapping) -> SamplingConfig:
    """`draw` with the student's sampler and steps, and without guidance, which it has inside."""
    own = {"sampler": student["sampler"], "steps": student["steps"], "guidance": 1.0}
    return replace(draw, **own, rescale=0.0, interval=(), negative="")


def teacher_sampling(draw: SamplingConfig, student: Mapping) -> SamplingConfig:
    """`draw` in the way of the student's teacher, in which its base still draws."""
    teacher = {key: student["teacher_draw"][key] for key in OWN}
    return replace(draw, **teacher | {"interval": tuple(teacher["interval"])})


def require_own_sampling(draw: SamplingConfig, student: Mapping, name: Path | str) -> None:
    """UserError where a student is asked to draw in another way than its own."""
    own = own_sampling(draw, student)
    for key in OWN:
        asked, has = getattr(draw, key), getattr(own, key)
        if asked != has:
            why = f"which is inside ({student['guidance_baked']:g})" if key not in ("sampler", "steps") else "and no other"
            remedy = f"distil one for it: personalize distill --steps {asked}" if key == "steps" else "draw with its teacher"
            raise UserError(
                f"draw.{key} = {asked!r}: {name} is a student that draws with {key} {has!r}, {why}. Leave it out, or {remedy}."
            )


def base_student(model: LatentModel) -> Path:
    """The folder of the base's own student. UserError where it has none."""
    folder = model.folder / FOLDER
    if not (folder / FILE).exists():
        raise UserError(
            f"--fast: base {model.name!r} has no student of its own. Make one, personalize distill --base {model.name}, and "
            "draw with that: personalize generate --run."
        )
    return folder


def read_student(folder: Path) -> dict:
    return read_json(folder / FILE, STUDENT)


def put_student(model: LatentModel, folder: Path, student: Mapping) -> dict:
    """Merges a base's student into a model, whatever else is in it -> what the images' rows say of it."""
    from personalize.methods import lora

    lora.load_adapter(model, folder, name="student", weight=1.0)
    lora.fuse_adapters(model)
    begin_at_noise(model)
    return {"student": {"sha256": content_hash(folder), "guidance_baked": student["guidance_baked"]}}


def begin_at_noise(model: LatentModel) -> None:
    """Students begin at the last timestep, whatever the base's sampler does (2305.08891): 2 "leading" steps begin half-way."""
    model.schedule = replace(model.schedule, spacing="trailing")
