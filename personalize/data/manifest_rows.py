"""The rows of a manifest of many subjects: {"id": "rex", "photos": folder or files, "class": "dog", "train.steps": 400}.

It is a JSONL, CSV or Parquet file, or a folder of subjects' folders. Any column beside the three is a setting by its dotted
key, and an empty cell leaves it as it is.
"""

import csv
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError, nearest
from personalize.common.files import writing
from personalize.common.recipe import SETTINGS
from personalize.common.untrusted import require_regular
from personalize.data.subjects import list_subjects
from personalize.models.lazy_imports import quiet_libraries

OWN = ("id", "photos", "class")  # columns that are no settings
COLUMNS = (*OWN, *(key for key in SETTINGS if key != "class_word"))
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)  # of a run's folder on any system
TAKEN = ("base-pictures",)  # what lies beside the runs


def read_rows(source: str | Path) -> list[dict]:
    """The rows of a manifest, in its order; relative photos are beside it. UserError for what is no such table."""
    if str(source).startswith("hf:") or Path(source).is_dir() or not Path(source).suffix:
        return [{"id": name, "photos": photos, "class": word} for name, (photos, word) in list_subjects(str(source)).items()]
    path = Path(source)
    if path.suffix.lower() not in READERS:
        raise UserError(f"the manifest {source} is none of {', '.join(READERS)}, and no folder of subjects. Give one of these.")
    require_regular(path, "table")
    rows = _loaded(path)
    if not rows:
        raise UserError(f"the manifest {path} has no row. Write one for each subject: its id, photos and class.")
    return [_beside(path.parent, row) for row in rows]


def check_rows(rows: Sequence[Mapping], check: Callable[[Mapping], object]) -> None:
    """UserError, which names the row, for a column that is no setting, an id that names no folder or two, and a missing class.

    check: of a row's settings, with a UserError of its own.
    """
    numbers: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        where, name = f"row {number}", row.get("id")
        for column in row:
            if column not in COLUMNS:
                hint = nearest(column, COLUMNS) or "."
                raise UserError(f"{where} has the column {column!r}, which is no setting{hint} Settings have dotted keys.")
        name = "" if name is None else str(name)
        if not NAME.fullmatch(name) or name in TAKEN:
            raise UserError(
                f"{where} has the id {name!r}; it names a folder. Use letters, digits, '.', '_' and '-', at most 100."
            )
        if name in numbers:
            raise UserError(f"rows {numbers[name]} and {number} have the same id {name!r}. Give each row its own.")
        numbers[name] = number
        if not isinstance(word := row.get("class"), str) or not word.strip():
            raise UserError(f"{where} ({name!r}) does not say the class, such as dog. Fill in the column class.")
        try:
            check(row)
        except UserError as error:
            raise UserError(f"{where} ({name!r}): {error}") from None


def shard_of(rows: Sequence[Mapping], shard: str) -> list[Mapping]:
    """The rows of shard "i/n", i from 0 to n-1: every n-th. UserError for another text."""
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {shard!r} is not i/n with i from 0 to n-1. Give one such as 0/8, the first of eight.")
    return list(rows[int(number) :: int(count)])


def row_settings(row: Mapping) -> list[str]:
    """A row's settings as texts for --set. A text is read as one, as it is in a CSV."""
    given = {key: value for key, value in row.items() if key not in OWN and not _is_empty(value)}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _beside(folder: Path, row: dict) -> dict:
    """The row with the paths of its photos seen from here, without its empty cells."""
    row = {key: value for key, value in row.items() if not _is_empty(value)}
    photos = row.get("photos")
    if isinstance(photos, str):
        row["photos"] = _seen_from(folder, photos)
    elif isinstance(photos, list):
        row["photos"] = [_seen_from(folder, str(photo)) for photo in photos]
    return row


def _seen_from(folder: Path, photos: str) -> str:
    return photos if photos.startswith("hf:") else os.path.join(folder, os.path.expanduser(photos))


def _loaded(path: Path) -> list[dict]:
    """A table's rows as dicts. Nothing of the file is run, and its copy in the cache of `datasets` goes at once."""
    import datasets

    try:
        with tempfile.TemporaryDirectory() as cache, _no_bars():
            return READERS[path.suffix.lower()](datasets.Dataset, str(path), cache).to_list()
    except Exception as error:  # of pandas, pyarrow and datasets, each its own
        why = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the manifest {path} cannot be read: {why[0]}. Check that each column holds one kind of value."
        ) from None


def write_parquet(path: Path, rows: Sequence[Mapping], kinds: Mapping[str, str]) -> None:
    """Rows as a Parquet file; kinds: of each column, as `datasets` calls them."""
    from datasets import Dataset, Features, Value

    features = Features({name: Value(kind) for name, kind in kinds.items()})
    with writing(path) as temporary, _no_bars():
        Dataset.from_dict({name: [row[name] for row in rows] for name in kinds}, features=features).to_parquet(temporary)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, `datasets` shows no progress bar and tells its log, not the screen."""
    import datasets

    quiet_libraries()
    shows = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shows:
            datasets.enable_progress_bars()


def _csv(kind, path: str, cache: str):
    """Every cell as text: as a number the id 007 would be 7, and NA none."""
    from datasets import Features, Value

    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    features = Features({name: Value("string") for name in names})
    options = {"keep_default_na": False, "na_filter": False, "encoding": "utf-8-sig"}
    return kind.from_csv(path, features=features, cache_dir=cache, keep_in_memory=True, **options)


def _jsonl(kind, path: str, cache: str):
    return kind.from_json(path, cache_dir=cache, keep_in_memory=True)


def _parquet(kind, path: str, cache: str):
    return kind.from_parquet(path, cache_dir=cache, keep_in_memory=True)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
