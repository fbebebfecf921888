"""Which folder a run has: its own, by its identity and whatever its name is now, or a new one."""

from contextlib import suppress
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.recipe import flat_settings, recipe_from_dict
from personalize.common.run_folder import read_manifest
from personalize.common.untrusted import read_bytes
from personalize.training.load_run import require_run

# Settings and sections of the recipe that decide no weight: captions are hashed as they are trained on, students have an
# identity of their own.
INDIFFERENT = ("device", "vae", "captions", "draw", "evaluate", "distill", "train.checkpoint_minutes")
LATER = {
    "prompt.chunks": 1,
    "prompt.weighting": "",
    "choose.bleed": 1.0,
    "choose.strengths": [],
    "train.cut_mix": 0.0,
    "photos.shape": "square",
    "train.caption_dropout": 0.0,
    "train.caption_shuffle": False,
    "train.offload": False,
    "train.timesteps": "uniform",
    "train.held_out_every": 0,
    "train.stop": "",
    "train.stop_window": 200,
    "train.noise_offset": 0.0,
    "train.input_perturbation": 0.0,
    "train.lr_cycles": 1,
    "train.lr_power": 1.0,
    "lora.plus_ratio": 1.0,
}  # settings that older recipes lack, and the default that changes nothing
# Settings of the base, which its fingerprint says; older recipes lack them.
IN_FINGERPRINT = ("prediction", "base_vae", "zero_snr")


def is_run(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def find_run(runs: Path, name: str, manifest: dict) -> tuple[Path, str]:
    """The run's folder in `runs`, and for a new one beside another called `name` how it differs and how to go on from that.

    Never the folder of another run. UserError where there are too many.
    """
    for path in sorted(runs.glob("*/manifest.json")):
        if _is_of(path, manifest["identity"]):
            return path.parent, ""
    return find_named(runs, name, manifest)


def find_named(runs: Path, name: str, manifest: dict) -> tuple[Path, str]:
    """As `find_run`, of runs called `name`, `name`-2 and so on alone: others, of which there may be thousands, are not read."""
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not is_run(folder):
            return folder, _difference(runs / name, manifest) if number > 1 else ""
        if _is_of(folder / "manifest.json", manifest["identity"]):
            return folder, ""
    raise UserError(f"{runs} holds 10000 runs called {name}. Give another folder: --runs.")


def _is_of(path: Path, identity: str) -> bool:
    """Whether this manifest is of the run of this identity; a damaged one is of another."""
    with suppress(UserError):
        return identity.encode() in read_bytes(path, "JSON file") and read_manifest(path.parent).get("identity") == identity
    return False


def decisive_settings(recipe: dict) -> dict:
    """What of a manifest's recipe decides weights and is not in the base's fingerprint, in its sections.

    A setting of LATER counts only where it is set, so that runs from before it keep their identity.
    """
    kept = {key: value for key, value in recipe.items() if key not in (*INDIFFERENT, *IN_FINGERPRINT)}
    unset = [key for key, default in LATER.items() if kept.get(key.split(".")[0], {}).get(key.split(".")[1]) == default]
    for key in [*unset, *(key for key in INDIFFERENT if "." in key)]:
        section, name = key.split(".")
        kept[section] = {other: value for other, value in kept.get(section, {}).items() if other != name}
    return {key: value for key, value in kept.items() if value != {}}  # a section of later settings alone


def _difference(earlier: Path, manifest: dict) -> str:
    old, new = (flat_settings(recipe_from_dict(m["recipe"], "the run's recipe")) for m in (require_run(earlier), manifest))
    decides = [key for key in new if not {key, key.split(".")[0]} & set(INDIFFERENT)]
    changed = [f"{key} = {new[key]!r}, there {old[key]!r}" for key in decides if new[key] != old[key]]
    why = ", ".join(changed[:3]) or "photos, captions, base or class images"
    option = f"--base {earlier / 'model'}" if "full" in manifest["methods"] else f"--init-from {earlier}"
    return f"this is not the run in {earlier}, which stays ({why}). To go on from its result: {option}"
