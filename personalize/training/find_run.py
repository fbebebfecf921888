"""Which folder a run has: its own, by its identity and whatever its name is now, or a new one."""

from contextlib import suppress
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS
from personalize.common.run_folder import read_manifest
from personalize.common.untrusted import read_bytes
from personalize.training.load_run import require_run

INDIFFERENT = ("device", "vae", "draw", "evaluate")  # settings and sections of the recipe that decide no weight
IN_FINGERPRINT = ("prediction", "base_vae")  # settings of the base, which its fingerprint says; older recipes lack them


def is_run(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def find_run(runs: Path, name: str, manifest: dict) -> tuple[Path, str]:
    """The run's folder in `runs`, and for a new one beside another called `name` how it differs and how to go on from that.

    Never the folder of another run. UserError where there are too many.
    """
    identity = manifest["identity"]
    for path in sorted(runs.glob("*/manifest.json")):
        with suppress(UserError):  # of a damaged one, which is another
            if identity.encode() in read_bytes(path, "JSON file") and read_manifest(path.parent).get("identity") == identity:
                return path.parent, ""
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not is_run(folder):
            return folder, _difference(runs / name, manifest) if number > 1 else ""
    raise UserError(f"{runs} holds 10000 runs called {name}. Give another folder: --runs.")


def _difference(earlier: Path, manifest: dict) -> str:
    old, new = (_decisive_settings(m["recipe"]) for m in (require_run(earlier), manifest))
    old = {key: settings.default for key, settings in SETTINGS.items() if key in IN_FINGERPRINT} | old
    changed = [f"{key} = {value!r}, there {old.get(key)!r}" for key, value in new.items() if value != old.get(key)]
    why = ", ".join(changed[:3]) or "photos, captions, base or class images"
    option = f"--base {earlier / 'model'}" if "full" in manifest["methods"] else f"--init-from {earlier}"
    return f"this is not the run in {earlier}, which stays ({why}). To go on from its result: {option}"


def _decisive_settings(recipe: dict) -> dict:
    """The settings of a manifest's recipe that decide weights, by dotted key."""
    decisive = {key: value for key, value in recipe.items() if key not in INDIFFERENT}
    sections = {key: value if isinstance(value, dict) else {"": value} for key, value in decisive.items()}
    return {f"{key}.{name}".rstrip("."): value for key, section in sections.items() for name, value in section.items()}
