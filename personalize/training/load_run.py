"""Loading a finished run, or one of its checkpoints, into its base."""

from dataclasses import replace
from pathlib import Path

from personalize import methods
from personalize.common import checkpoint
from personalize.common.errors import UserError
from personalize.common.files import content_hash
from personalize.common.recipe import Recipe, recipe_from_dict
from personalize.common.run_folder import checkpoints, read_manifest
from personalize.common.untrusted import OBJECT, Many, Number, Table, Text, require
from personalize.data.crops import Photo
from personalize.data.photos import load_photos
from personalize.generation import students
from personalize.models.interface import LatentModel

STATE = "state.safetensors"
SUBJECT = Table(
    {"token": Text(), "class": Text(), "prompt": Text(), "prior_folder": Text()}, needs=("token", "class", "prompt", "photos")
)
EXTENDED = Table({"steps": Number(1, 10**9), "step": Number(0, 10**9)}, needs=("steps", "step"))
TEACHER = Table({"run": Text()}, needs=("run",))
RUN = Table(
    {
        "base": Text(), "fingerprint": Text(most=100), "methods": Many(Text(most=100), 1, 8), "recipe": OBJECT,
        "subjects": Many(SUBJECT, 1, 10_000), "chosen": Number(0, 10**9), "strength": Number(0, 10, real=True),
        "why": Text(), "sha256": OBJECT, "student": students.STUDENT,
        "teacher": TEACHER, "class_folders": OBJECT, "extended": Many(EXTENDED, 0, 10_000),
    },
    needs=("base", "methods", "recipe"), remedy="Restore or delete the folder.",
)  # fmt: skip
RUN_NOW = replace(RUN, needs=(*RUN.needs, "fingerprint", "subjects"))
STUDENT_NOW = replace(RUN_NOW, fields={**RUN.fields, "subjects": Many(SUBJECT, 0, 0)}, needs=(*RUN_NOW.needs, "student"))


def require_run(folder: Path, *, of_base: bool = False) -> dict:
    """A run's manifest; of_base: also of a base's student. UserError for a folder that is not a run."""
    manifest = read_manifest(folder)
    if manifest.get("kind") == "student" and of_base:
        return require(manifest, STUDENT_NOW, str(folder / "manifest.json"))
    if manifest.get("kind") == "student":
        raise UserError(
            f"{folder} is a student of the base {manifest.get('base')!r}, with no subject to judge or to teach. Draw with it: "
            "personalize generate --run."
        )
    if manifest.get("kind") != "run":
        raise UserError(f"{folder} is not a training run but a {manifest.get('kind', 'strange')} folder. Name a run's folder.")
    require(manifest, RUN, str(folder / "manifest.json"))
    if "subjects" not in manifest:  # of schema 1, when a run had one subject, and fingerprints were taken otherwise
        manifest["fingerprint"] = ""
        manifest["subjects"] = [{k: manifest.get(k, "") for k in ("token", "class", "prompt", "photos", "prior_folder")}]
    return require(manifest, RUN_NOW, str(folder / "manifest.json"))


def run_subject(manifest: dict, token: str = "") -> dict:
    """A run's subject of this token, or its first: token, class, prompt, photos, prior_folder."""
    subjects = {entry["token"]: entry for entry in manifest["subjects"]}
    if not subjects:
        raise UserError(
            "this is the student of a bare base, which has no subject. Leave out what is about one, such as --like."
        )
    if token and token not in subjects:
        raise UserError(f"this run has no subject {token!r}; it has {', '.join(subjects)}.")
    return subjects[token] if token else manifest["subjects"][0]


def run_photos(subject: dict) -> tuple[list[Photo], list[Photo]]:
    """Those that it was trained on and those that were held out. UserError where one is gone or has changed."""
    rows = subject["photos"]
    sources = [row["path"] for row in rows]
    if sources[0].startswith("hf:"):
        photos, _ = load_photos(sources[0].rpartition("[")[0], min_size=1)
    else:
        gone = [path for path in sources if not Path(path).exists()]
        if gone:
            raise UserError(f"photo {gone[0]} of this run is no longer there. Put it back.")
        photos, _ = load_photos(sources, min_size=1)
    if len(photos) != len(rows):
        raise UserError(f"{sources[0]} and its like are {len(photos)} photos now, and this run knew {len(rows)}.")
    parts = [], []
    for photo, row in zip(photos, rows, strict=True):
        if photo.sha256 != row["sha256"]:
            raise UserError(
                f"photo {photo.path} is not the one this run was trained on: its content has changed. Bring the old one back."
            )
        parts[row.get("held_out", False)].append(photo)
    return parts


def resolve_checkpoint(model: LatentModel, folder: Path, manifest: dict, at: str = "") -> str:
    """The name of the run's result, or of its checkpoint `at` ("400", "step-000400", "last").

    UserError where the base is not the one the run was trained on, or the run has no such result.
    """
    if manifest["fingerprint"] not in ("", model.fingerprint):
        raise UserError(
            f"{folder} was trained on {manifest['base']!r} with weights {manifest['fingerprint']}, "
            f"but {model.name!r} here has {model.fingerprint}: the base has changed. Train again, or bring the old one back."
        )
    if at not in ("", "best"):
        names = [path.name for path in checkpoints(folder)]
        name = f"step-{int(at):06d}" if at.isdigit() else max(names, default=at) if at == "last" else at
        if name not in names:
            raise UserError(f"{folder} has no checkpoint {at!r}; it has {', '.join(names) or 'none'}.")
        return name
    if manifest["status"] != "finished":
        raise UserError(
            f"{folder} is {manifest['status']}, not finished. Run the same train command again, or give --checkpoint."
        )
    return result_name(manifest["chosen"], manifest.get("strength", 1.0)) if "chosen" in manifest else "model"


def result_name(step: int, strength: float) -> str:
    """The name of a checkpoint's weights at a strength, by which images of them are kept."""
    return f"step-{step:06d}" + (f"-strength-{strength:g}" if strength != 1 else "")


def load_run(model: LatentModel, folder: Path, manifest: dict, *, at: str = "") -> str:
    """Loads what `resolve_checkpoint` names into a fresh base -> its name."""
    name, recipe = resolve_checkpoint(model, folder, manifest, at), recipe_from_dict(manifest["recipe"], str(folder))
    if at not in ("", "best"):
        params = [p for group in methods.attach(model, recipe) for p in group["params"]]
        require_unchanged(folder / "checkpoints" / name, manifest)
        load_checkpoint(model, recipe, params, folder / "checkpoints" / name)
    else:
        require_unchanged(folder / "model", manifest)
        methods.load(model, folder / "model", recipe)
    for module in model.networks.values():
        module.to(model.dtype).eval().requires_grad_(False)
    if "student" in manifest:
        students.begin_at_noise(model)
    return name


def require_unchanged(path: Path, manifest: dict) -> None:
    """UserError for a checkpoint or result that is not the one that the run wrote; older manifests do not say it."""
    written = manifest.get("sha256", {}).get(path.name)
    if written and content_hash(path) != written:
        remedy = "Delete it to do without it." if path.parent.name == "checkpoints" else "Use a checkpoint: --checkpoint last."
        raise UserError(f"{path} was damaged or changed: its SHA-256 is not the one of this run's manifest. {remedy}")


def load_checkpoint(model: LatentModel, recipe: Recipe, params: list, folder: Path) -> None:
    """Loads a checkpoint's weights, or their EMA, into a model to which the recipe's methods are attached."""
    parts, _ = checkpoint.load_state(folder / STATE)
    methods.restore(model, recipe, parts["trained"])
    for i, mean in parts.get("average", {}).items():
        params[int(i)].data.copy_(mean)
