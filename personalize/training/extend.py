"""`train --extend`: a run goes on to more steps than it was made for, and is from then on the run of that many.

At a constant learning rate it is bit for bit the run that had them from the start, because a batch depends on the seed and the
step alone.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import remove_folder
from personalize.common.recipe import recipe_from_dict
from personalize.common.run_folder import checkpoints, write_manifest
from personalize.training.load_run import require_run


def find_shorter(runs: Path, steps: int, identity: Callable[[int], str], difference: str) -> Path:
    """The run in `runs` with the most steps of those that are this one but for fewer; identity: of this one with n steps.

    UserError where there is none, with how it differs, where it has more steps, and where it has no checkpoint.
    """
    candidates = []
    for path in sorted(runs.glob("*/manifest.json")):
        with suppress(UserError):  # of a damaged one, which is another
            manifest = require_run(path.parent)
            made_for = recipe_from_dict(manifest["recipe"], str(path)).train.steps
            if manifest.get("identity") == identity(made_for):
                candidates.append((made_for, path.parent))
    shorter = [candidate for candidate in candidates if candidate[0] < steps]
    if not candidates:
        raise UserError(f"--extend finds no run in {runs} that is this one with fewer steps: {difference or 'leave it out.'}")
    if not shorter:
        made_for, folder = min(candidates)
        raise UserError(
            f"{folder} has {made_for} steps, and --extend asks for {steps}: no run is made shorter. Give more --steps, or use "
            "one of its checkpoints: --checkpoint."
        )
    folder = max(shorter)[1]
    if not checkpoints(folder):
        raise UserError(
            f"--extend finds no checkpoint in {folder} to go on from. Leave out --extend to train all {steps} steps, or give "
            f"--init-from {folder}, which goes on from a result without the optimizer's state."
        )
    return folder


def extend(folder: Path, manifest: dict) -> None:
    """Makes a run the one of this manifest, which is as yet its own but for the steps; to be called under its lock."""
    old = require_run(folder)
    for images in (folder / "evaluation" / "pictures").glob("model-*"):  # of the result that was
        remove_folder(images)
    entry = {"steps": old["recipe"]["train"]["steps"], "step": int(checkpoints(folder)[-1].name[5:])}
    kept = {"sha256": old.get("sha256", {}), "extended": [*old.get("extended", []), entry]}
    write_manifest(folder, manifest | kept | {"status": "interrupted"})


def schedule_notice(manifest: dict) -> str:
    """What an extended run says of its learning rates; "" where they are those of a run with as many steps from the start."""
    if not manifest.get("extended"):
        return ""
    name, steps = (manifest["recipe"]["train"][key] for key in ("lr_schedule", "steps"))
    if name == "constant":
        return ""
    parts = ", ".join(f"up to step {entry['step']} those of {entry['steps']} steps" for entry in manifest["extended"])
    return (
        f"train.lr_schedule = {name!r} depends on train.steps: this run's rates are {parts}, then anew those of {steps}. "
        "A run of so many steps from the start, as in another --runs folder, has others."
    )
