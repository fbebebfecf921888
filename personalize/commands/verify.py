"""`personalize verify`: is a run what its manifest says, and do its steps give the same weights again? Nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personalize.commands.session import RUNS, open_run
from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_jsonl
from personalize.common.recipe import Recipe, flat_settings, load_recipe, recipe_from_dict
from personalize.common.run_folder import checkpoints
from personalize.common.terminal import SILENT, Terminal
from personalize.data.captions import add_token
from personalize.data.class_images import OWN
from personalize.data.photos import is_data_set, load_photos, read_photo
from personalize.data.subjects import Subject
from personalize.models.interface import LatentModel
from personalize.training import manifest as manifests
from personalize.training import replay
from personalize.training.log import FILE
from personalize.training.prepare import class_latents, prepare
from personalize.training.run import TrainingRun

PATHS = ("base", "base_vae", "train.init_from")  # as given in recipe.toml, absolute in the manifest


@dataclass(frozen=True)
class VerifyResult:
    """folder: of the run; passed: a line for each thing that is as it was; failed: a line for each that is not."""

    folder: Path
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, what: str, differs: Sequence[str], ok: str) -> bool:
        """Whether nothing differs, with a line for each that does, or else one."""
        self.failed.extend(f"{what}: {line}" for line in differs)
        if not differs:
            self.passed.append(f"{what}: {ok}")
        return not differs


def verify(
    run: Path | str | None = None,
    *,
    steps: int = 10,
    base: str = "",
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
) -> VerifyResult:
    """Compares a run (the newest finished one in `runs`) with its manifest, and replays at most `steps` of its steps.

    Photos, captions, masks, base, recipe and class images are as they were; the SHA-256 of checkpoints and result. Steps are
    replayed to the next checkpoint where one is near enough, and held against its bits and the logged losses; on a GPU, or
    where the machine or its libraries are others, against a tolerance. 0 steps: none. UserError where the base cannot be read.
    """
    folder, model, recipe, manifest = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
    if "student" in manifest:
        raise UserError(
            f"{folder} is a student, whose steps are not those of train. Verify its teacher: {manifest['teacher']['run']}"
        )
    result = VerifyResult(folder)
    same_base = result.add("base", _base(manifest, model), f"{manifest['base']}, {model.fingerprint}")
    subjects = [_subject(model, recipe, entry, result, says_all="machine" in manifest) for entry in manifest["subjects"]]
    _recipe(folder, manifest, subjects, result)
    first = {entry["class"]: entry["prior_folder"] for entry in manifest["subjects"] if entry.get("prior_folder")}
    latents, priors = None, {name: Path(folder) for name, folder in manifest.get("class_folders", first).items()}
    try:
        latents = {} if None in subjects else class_latents(model, recipe, subjects, priors, manifest.get("prior", {}))
    except UserError as error:
        result.add("class images", [str(error)], "")
    if priors and latents:
        result.passed.append(f"class images: {sum(map(len, latents.values()))}, drawn as they were")
    whole = _hashes(folder, manifest, result)
    if same_base and None not in subjects and latents is not None and steps:
        data, engine = prepare(model, recipe, subjects, priors, latents, screen=screen)
        data.release()
        ema = [p.detach().clone() for p in engine.params] if recipe.train.ema else []
        _replay(TrainingRun(folder, data, engine, ema, manifest, writes=False), whole, steps, result, screen)
    elif steps:
        result.failed.append("replay: none, because of what differs above")
    return result


def _base(manifest: dict, model: LatentModel) -> list[str]:
    if manifest["fingerprint"] in ("", model.fingerprint):
        return []
    return [f"{manifest['base']} has weights {model.fingerprint} now, and the run was trained on {manifest['fingerprint']}"]


def _subject(model: LatentModel, recipe: Recipe, entry: dict, result: VerifyResult, *, says_all: bool) -> Subject | None:
    """A subject's photos as they would be trained on now, and a line for each that has changed; None where one is gone.

    says_all: whether the entry has captions and masks, which older ones lack.
    """
    rows, photos, differs = entry["photos"], [], []
    if is_data_set(rows[0]["path"]):
        photos = load_photos(rows[0]["path"].rpartition("[")[0], min_size=1)[0]
    for row in rows if not photos else ():
        try:
            photos.append(read_photo(Path(row["path"])))
        except (UserError, OSError) as error:
            differs.append(f"{row['path']} cannot be read ({error})")
    usable, subject = len(photos) == len(rows), None
    if usable:
        held = [bool(row.get("held_out")) for row in rows]
        trained, held_out = ([photo for photo, out in zip(photos, held) if out == wanted] for wanted in (False, True))
        if recipe.captions.add_token:  # as `train` does it
            trained, _ = add_token(model, trained, token=entry["token"], word=entry["class"])
        subject = Subject(entry["token"], entry["class"], trained, held_out)
        for photo, row in zip([*trained, *held_out], sorted(rows, key=lambda row: bool(row.get("held_out")))):
            differs += [
                f"the {name} of {row['path']} has changed"
                for name, key in {"photo": "sha256", "caption": "caption", "mask": "mask_sha256"}.items()
                if (says_all or key in row) and row.get(key) != (getattr(photo, key) or None)
            ]
    elif not differs:
        differs.append(f"{rows[0]['path']} and its like are {len(photos)} now, and were {len(rows)}")
    result.add(f"photos of {entry['token']}", differs, f"{len(rows)}, with their captions and masks")
    return subject


def _recipe(folder: Path, manifest: dict, subjects: list[Subject | None], result: VerifyResult) -> None:
    """recipe.toml against the manifest, and both with the photos against the run's identity."""
    try:
        written = load_recipe(folder / "recipe.toml")
    except UserError as error:
        result.add("recipe", [str(error)], "")
        return
    now, then = flat_settings(written), flat_settings(recipe_from_dict(manifest["recipe"], str(folder / "manifest.json")))
    differs = [f"{key} is {now[key]!r} in recipe.toml, {then[key]!r} in the manifest" for key in now if now[key] != then[key]]
    result.add("recipe", [line for line in differs if not line.startswith(PATHS)], f"{len(now)} settings")
    if None not in subjects:
        same = manifest.get("identity") == _identity(written, manifest, subjects)
        wrong = "photos, captions, masks, base, recipe and class images together are not those that the run was begun with"
        result.add("identity", [] if same else [wrong], str(manifest.get("identity")))


def _identity(recipe: Recipe, manifest: dict, subjects: list[Subject]) -> str:
    prior = {
        word: entry if entry.get("images") == OWN else entry | {"base": recipe.base}
        for word, entry in manifest.get("prior", {}).items()
    }
    return manifests.identity(recipe, subjects, fingerprint=manifest["fingerprint"], prior=prior)


def _hashes(folder: Path, manifest: dict, result: VerifyResult) -> list[Path]:
    """Checks what the run saved -> its checkpoints that are as they were written."""
    recorded, whole = manifest.get("sha256", {}), []
    results = [folder / "model"] if manifest["status"] == "finished" else []
    for path in [*checkpoints(folder), *results]:
        if not path.exists():
            differs = ["it is gone"]
        else:
            differs = ["its SHA-256 is another"] if recorded.get(path.name, content_hash(path)) != content_hash(path) else []
        said = f"SHA-256 {recorded[path.name][:12]}…" if path.name in recorded else "its SHA-256 was not recorded"
        if result.add(path.name, differs, said) and path.parent.name == "checkpoints":
            whole.append(path)
    return whole


def _replay(run: TrainingRun, whole: list[Path], steps: int, result: VerifyResult, screen: Terminal) -> None:
    logged = {row["step"]: row for row in read_jsonl(run.folder / FILE)}
    segment = replay.choose_segment(whole, logged, steps)
    if segment is None:
        result.failed.append("replay: no step is logged after the last checkpoint, or there is none")
        return
    why = replay.why_inexact(run)
    screen.say(f"replaying steps {segment.first + 1} to {segment.last}" + (f"; within a tolerance: {why}" if why else ""))
    differs = replay.replay(run, segment, logged, exact=not why)
    way = f"steps {segment.first + 1} to {segment.last}"
    against = f"{segment.next.name} and log.jsonl" if segment.next else "log.jsonl"
    how = f"within {replay.LOSS_SHARE:.0%} of each loss and {replay.WAY_SHARE:.0%} of the way ({why})" if why else "bit for bit"
    result.add(f"replay of {way}", differs, f"as in {against}, {how}")
