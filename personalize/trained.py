"""A finished run, or one of its checkpoints, put into its base."""

from pathlib import Path

from personalize import checkpoint, config, methods
from personalize.errors import UserError
from personalize.models.base import LatentModel
from personalize.rundir import checkpoints, read_manifest

STATE = "state.safetensors"


def require(folder: Path) -> dict:
    """A run's manifest. UserError for a folder that is no run."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "run":
        raise UserError(f"{folder} is not a training run but a {manifest.get('kind', 'strange')} folder.")
    return manifest


def put_into(model: LatentModel, folder: Path, manifest: dict, *, at: str = "") -> str:
    """The run's result, or its checkpoint `at` ("400" or "step-000400"), into a fresh base; returns what it is called.

    UserError where the base is not the one the run was trained on, or the run has no such result.
    """
    if manifest["fingerprint"] != model.fingerprint:
        raise UserError(
            f"{folder} was trained on {manifest['base']!r} with weights {manifest['fingerprint']}, "
            f"but {model.name!r} here has {model.fingerprint}: the base has changed. Train again, or bring the old one back."
        )
    method = methods.the_one(tuple(manifest["methods"]))
    if at:
        found = {path.name: path for path in checkpoints(folder)}
        name = f"step-{int(at):06d}" if at.isdigit() else at
        if name not in found:
            raise UserError(f"{folder} has no checkpoint {at!r}; it has {', '.join(found) or 'none'}.")
        recipe = config.from_dict(manifest["recipe"], str(folder))
        groups = method.attach(model, recipe)
        parts, _ = checkpoint.load(found[name] / STATE)
        method.restore(model, parts["trained"])
        params = [p for group in groups for p in group["params"]]
        for i, mean in parts.get("average", {}).items():
            params[int(i)].data.copy_(mean)
    else:
        if manifest["status"] != "finished":
            raise UserError(
                f"{folder} is {manifest['status']}, not finished. Run the same train command again, or give --checkpoint."
            )
        name = "model"
        method.load(model, folder / "model")
    for module in (model.unet, model.text_encoder):
        module.to(model.dtype).eval().requires_grad_(False)
    return name
