"""Loading a finished run, or one of its checkpoints, into its base."""

from pathlib import Path

from personalize import methods
from personalize.common import checkpoint
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe, recipe_from_dict
from personalize.common.run_folder import checkpoints, read_manifest
from personalize.models.interface import LatentModel

STATE = "state.safetensors"


def require_run(folder: Path) -> dict:
    """A run's manifest. UserError for a folder that is not a run."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "run":
        raise UserError(f"{folder} is not a training run but a {manifest.get('kind', 'strange')} folder.")
    if "subjects" not in manifest:  # of schema 1, when a run had one subject, and fingerprints were taken otherwise
        manifest["fingerprint"] = ""
        manifest["subjects"] = [{k: manifest.get(k, "") for k in ("token", "class", "prompt", "photos", "prior_folder")}]
    return manifest


def run_subject(manifest: dict, token: str = "") -> dict:
    """A run's subject of this token, or its first: token, class, prompt, photos, prior_folder."""
    subjects = {entry["token"]: entry for entry in manifest["subjects"]}
    if token and token not in subjects:
        raise UserError(f"this run has no subject {token!r}; it has {', '.join(subjects)}.")
    return subjects[token] if token else manifest["subjects"][0]


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
    return f"step-{manifest['chosen']:06d}" if "chosen" in manifest else "model"


def load_run(model: LatentModel, folder: Path, manifest: dict, *, at: str = "") -> str:
    """Loads what `resolve_checkpoint` names into a fresh base -> its name."""
    name, recipe = resolve_checkpoint(model, folder, manifest, at), recipe_from_dict(manifest["recipe"], str(folder))
    if at not in ("", "best"):
        params = [p for group in methods.attach(model, recipe) for p in group["params"]]
        load_checkpoint(model, recipe, params, folder / "checkpoints" / name)
    else:
        methods.load(model, folder / "model", recipe)
    for module in model.networks.values():
        module.to(model.dtype).eval().requires_grad_(False)
    return name


def load_checkpoint(model: LatentModel, recipe: Recipe, params: list, folder: Path) -> None:
    """Loads a checkpoint's weights, or their EMA, into a model to which the recipe's methods are attached."""
    parts, _ = checkpoint.load_state(folder / STATE)
    methods.restore(model, recipe, parts["trained"])
    for i, mean in parts.get("average", {}).items():
        params[int(i)].data.copy_(mean)
