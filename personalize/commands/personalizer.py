"""`Personalizer`: trains one subject after another on a base that stays in memory. A loop, `map` and Ray take it alike."""

import gc
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from personalize import methods
from personalize.commands.session import PRIORS, RUNS, open_base, resolve_subjects
from personalize.commands.together import train_together
from personalize.commands.train import TrainResult, train
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import make_folder, write_text
from personalize.common.recipe import Recipe, recipe_from_dict
from personalize.common.terminal import SILENT, Terminal
from personalize.data.manifest_rows import row_settings
from personalize.evaluation import checkpoint_selection
from personalize.methods.stacked_lora import check_together
from personalize.models.devices import choose_device
from personalize.models.interface import LatentModel
from personalize.models.kept_networks import KeptNetworks
from personalize.models.out_of_memory import free_cache
from personalize.training import load_run, preflight


class Personalizer:
    """`Personalizer(base, recipe)(row)` trains the row's subject into runs/<id> -> the row of its result.

    A row is {"id": …, "photos": …, "class": …} and settings by their dotted keys. Each has the bits of `train` alone: the
    base's networks are read once, and each run gets modules of its own around their weights.
    """

    def __init__(
        self,
        base: str = "",
        recipe: Path | str | None = None,
        *,
        settings: Sequence[str] = (),
        runs: Path = RUNS,
        priors: Path = PRIORS,
        screen: Terminal = SILENT,
    ):
        self.recipe, self.settings = recipe, [*settings, *([f"base={base}"] if base else [])]
        self.runs, self.priors, self.screen = Path(runs), Path(priors), screen
        self._kept, self._device = KeptNetworks(), None

    def __call__(self, row: Mapping) -> dict:
        """id, status, run, checkpoint, identity, prompt_adherence, drift, seconds, peak_bytes and error.

        A row that fails has the status "failed" and the error in words; of one that is no UserError the traceback is in
        runs/<id>/error.txt. seconds, peak_bytes: None of a run that was finished before. `Interrupted` goes through.
        """
        began, trained, error = time.monotonic(), None, ""
        try:
            trained = self.train(row)
        except Interrupted:
            raise
        except UserError as told:
            error = str(told)
        except Exception as fault:
            place = self.runs / str(row["id"]) / "error.txt"
            make_folder(place.parent)
            write_text(place, traceback.format_exc())
            error = f"{type(fault).__name__}: {str(fault).strip().split(chr(10))[0]}. See {place}"
        finally:
            peak = preflight.peak_bytes(self._device) if self._device else None
            self._clean()
        return _result(row, trained, error, time.monotonic() - began, peak)

    def together(self, rows: Sequence[Mapping]) -> list[dict]:
        """As a call for each row, of rows that train in one batch: see `train_together`. seconds: of all, over their number."""
        if len(rows) == 1:
            return [self(rows[0])]
        began, ready, results = time.monotonic(), {}, {}
        for number, row in enumerate(rows):
            try:
                ready[number] = resolve_subjects(self._photos(row), row["class"], self.recipe, self._settings(row))
            except UserError as error:
                results[number] = error
        if ready:
            model = self.open_base(next(iter(ready.values()))[0], self.screen)
            options = {"runs": self.runs, "priors": self.priors, "names": [str(rows[k]["id"]) for k in ready]}
            try:
                done = train_together(model, list(ready.values()), **options, screen=self.screen)
            except Interrupted:
                raise
            except Exception as error:  # of all of them, such as too little memory
                done = [error if isinstance(error, UserError) else RuntimeError(repr(error))] * len(ready)
            finally:
                peak, model = preflight.peak_bytes(self._device), None
                self._clean()
            results |= dict(zip(ready, done, strict=True))
        seconds, told = (time.monotonic() - began) / len(rows), []
        for number, row in enumerate(rows):
            each = results[number]
            failed = isinstance(each, Exception)
            told.append(_result(row, None if failed else each, str(each) * failed, seconds, peak if ready else None))
        return told

    def check(self, recipe: Recipe, together: Sequence[Recipe], screen: Terminal) -> None:
        """UserError where the recipe's base cannot be opened, which stays in memory, or others cannot train in one batch."""
        model = self.open_base(recipe, screen)
        for one in together:
            check_together(model, one)

    def _photos(self, row: Mapping):
        if not row.get("photos"):
            raise UserError("there are no photos: the row's cell is empty. Name a folder or files.")
        return row["photos"]

    def _settings(self, row: Mapping) -> list[str]:
        return [*self.settings, *row_settings(row)]

    def train(self, row: Mapping) -> TrainResult:
        """The row's run, begun, resumed or found finished."""
        photos, folders = self._photos(row), {"runs": self.runs, "priors": self.priors}
        options = {"name": str(row["id"]), "opener": self.open_base, "screen": self.screen}
        return train(photos, class_word=row["class"], recipe=self.recipe, settings=self._settings(row), **folders, **options)

    def open_base(self, recipe: Recipe, screen: Terminal) -> LatentModel:
        """The recipe's base, to which nothing is attached, as `session.open_base` gives it."""
        self._device = choose_device(recipe.device)
        # Beside a device's copy that trains, the host's is another anyway.
        shared = self._device.type != "cpu" or not set(methods.BASE_TRAINS) & set(recipe.train.methods)
        return open_base(recipe, screen, make_network=self._kept.maker(shared=shared))

    def _clean(self) -> None:
        """Frees what the last row's model held, whose modules refer to each other.

        A GPU that has faulted raises here, and ends the worker: in this process all later rows would fail too.
        """
        gc.collect()
        if self._device and self._device.type == "cuda":
            torch.cuda.synchronize()
        if self._device:
            free_cache(self._device)


def failed_row(row: Mapping, error: str) -> dict:
    """The result of a row that no worker brought to an end."""
    return _result(row, None, error, 0.0, None) | {"seconds": None}


NO_SCORES = dict.fromkeys(("checkpoint", "identity", "prompt_adherence", "drift"))


def _result(row: Mapping, trained: TrainResult | None, error: str, seconds: float, peak: int | None) -> dict:
    result = {"id": str(row["id"]), "status": "done" if trained else "failed", "run": trained and str(trained.folder)}
    result |= _scores(trained.folder) if trained else NO_SCORES
    if trained and not trained.steps:
        return result | {"seconds": None, "peak_bytes": None, "error": None}
    return result | {"seconds": round(seconds, 2), "peak_bytes": peak, "error": error or None}


def _scores(folder: Path) -> dict:
    """What a finished run keeps, and the dev split's scores of it: None where checkpoints are not scored."""
    manifest = load_run.require_run(folder)
    if "chosen" not in manifest:
        return NO_SCORES | {"checkpoint": "model"}
    step, strength = manifest["chosen"], manifest.get("strength", 1.0)
    limits = recipe_from_dict(manifest["recipe"], str(folder)).choose
    scored = checkpoint_selection.read_scored(folder / checkpoint_selection.FILE)
    kept = [one for one in scored if (one.step, one.strength) == (step, strength)]
    row = next(iter(checkpoint_selection.checkpoint_rows(kept, limits, (step, strength))), {})
    scores = {"identity": row.get("identity"), "prompt_adherence": row.get("obeys"), "drift": row.get("drift")}
    return {"checkpoint": load_run.result_name(step, strength), **scores}
