"""`personalize many`: a table of subjects in, a table of runs out.

The same command goes on: a row whose run is finished is done, an interrupted one resumes. A row that fails is a failed row.
"""

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from personalize.commands.many_ray import RayEngine, ray_engine
from personalize.commands.personalizer import NO_SCORES, Personalizer
from personalize.commands.session import PRIORS, RUNS, resolve
from personalize.common import distributed
from personalize.common.errors import Interrupted, UserError, nearest
from personalize.common.files import append_jsonl, key_of, make_folder, read_jsonl, write_text
from personalize.common.recipe import Recipe, recipe_to_dict
from personalize.common.terminal import SILENT, Terminal
from personalize.data.manifest_rows import check_rows, read_rows, row_settings, shard_of, write_parquet
from personalize.training.preflight import duration
from personalize.training.together import shared_settings

ENGINES = ("local", "ray")
KINDS = {
    "id": "string", "status": "string", "run": "string", "checkpoint": "string", "identity": "float64",
    "prompt_adherence": "float64", "drift": "float64", "seconds": "float64", "peak_bytes": "int64", "error": "string",
    "key": "string",
}  # fmt: skip


@dataclass(frozen=True)
class ManyResult:
    """rows: of results.jsonl, in the manifest's order; file: results.parquet."""

    rows: list[dict]
    file: Path

    @property
    def failed(self) -> int:
        return sum(row["status"] == "failed" for row in self.rows)


class _Bars(Terminal):
    """Progress bars without the lines of each run, which are many."""

    def say(self, line: str) -> None:
        pass


def many(
    manifest: Path | str,
    *,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    shard: str = "",
    retry_failed: bool = False,
    together: int = 1,
    engine: str = "local",
    workers: int = 1,
    cpus: int = 0,
    gpus: float | None = None,
    screen: Terminal = SILENT,
) -> ManyResult:
    """Trains the subjects of a manifest (`data.manifest_rows`) one after another on a warm base, each into runs/<id>.

    shard: "i/n" of them alone. A row that failed before is tried again with `retry_failed`, or when it or the recipe has
    changed. together: as many rows train in one batch, where their recipes allow it (`training.together.SHARED`); what stops
    a batch makes failed rows of all. engine: "local", or "ray" with so many workers, of `cpus` CPUs and `gpus` GPUs each (see
    `commands.many_ray`). UserError, before anything runs, for a manifest, a recipe or a base that is wrong;
    Interrupted where a signal stopped it.
    """
    if distributed.world_size() > 1:
        raise UserError("many trains each subject in one process. Start one for each GPU, with --shard i/n, not by a launcher.")
    resolved = _resolver(recipe, settings)
    rows = read_rows(manifest)
    check_rows(rows, resolved)
    rows, file = (shard_of(rows, shard), f"results-{shard.replace('/', '-of-')}") if shard else (rows, "results")
    path = Path(runs) / f"{file}.jsonl"
    keys = {str(row["id"]): _key(row, resolved(row)) for row in rows}
    recipes = [resolved(row) for row in rows]
    shown = SILENT if engine == "ray" else _Bars(quiet=screen.quiet)
    work = Personalizer(recipe=recipe, settings=settings, runs=runs, priors=priors, screen=shown)
    with _engine(engine, work, recipes, workers=workers, cpus=cpus, gpus=gpus, screen=screen) as started:
        if rows:
            started.check(recipes[0], recipes if together > 1 else [], screen)
        with _held(path), _stopped_by_sigterm():
            job = _Job(started, rows, keys, path, screen)
            job.run(lambda rows: _batches(rows, together, resolved), retry_failed=retry_failed)
    return ManyResult(job.ordered(), path.with_suffix(".parquet"))


class _Loop:
    """The engine "local": one batch of rows after another in this process."""

    workers, ended = 1, ""

    def __init__(self, work: Personalizer):
        self.work, self.batch = work, []
        self.check = work.check

    def results(self, batches: Iterable[list[Mapping]]) -> Iterator[list[dict]]:
        for self.batch in batches:
            yield self.work.together(self.batch)

    def running(self) -> list[str]:
        return [str(row["id"]) for row in self.batch]


@contextmanager
def _engine(
    name: str, work: Personalizer, recipes: Sequence[Recipe], *, workers: int, cpus: int, gpus: float | None, screen: Terminal
) -> Iterator[_Loop | RayEngine]:
    if name not in ENGINES:
        raise UserError(f"--engine {name!r} is none of {', '.join(ENGINES)}{nearest(name, ENGINES)}")
    if name == "local" and (workers != 1 or cpus or gpus is not None):
        raise UserError(
            "--workers, --cpus and --gpus are of --engine ray. Add it, or start a process for each GPU, with --shard i/n."
        )
    if name == "local" or not recipes:
        yield _Loop(work)
    else:
        with ray_engine(work, recipes[0].device, workers=workers, cpus=cpus, gpus=gpus, screen=screen) as engine:
            yield engine


class _Job:
    """The rows of a job, and what became of each."""

    def __init__(self, engine: _Loop | RayEngine, rows: Sequence[Mapping], keys: Mapping, path: Path, screen: Terminal):
        self.engine, self.rows, self.keys, self.path, self.screen = engine, rows, keys, path, screen
        self.earlier = {row["id"]: row for row in read_jsonl(path) if keys.get(row.get("id")) == row.get("key")}
        self.results: dict[str, dict] = {}
        self.seconds: list[float] = []  # of each row that was trained here

    def ordered(self) -> list[dict]:
        return [self.results[name] for row in self.rows if (name := str(row["id"])) in self.results]

    def run(self, batches: Callable[[list], Iterable[list]], *, retry_failed: bool) -> None:
        if not retry_failed:
            self.results = {name: row for name, row in self.earlier.items() if row["status"] == "failed"}
        write_text(self.path, "")
        for row in self.ordered():
            append_jsonl(self.path, row)
            self.screen.say(f"{row['id']}: failed before, see --retry-failed: {row['error']}")
        try:
            for results in self.engine.results(batches([row for row in self.rows if str(row["id"]) not in self.results])):
                for result in results:
                    self._done(result)
        except (Interrupted, KeyboardInterrupt) as stop:
            running = set(self.engine.running()) - self.results.keys()
            names = [str(row["id"]) for row in self.rows if str(row["id"]) in running]
            for name in names:
                lacks = {**dict.fromkeys(("run", "seconds", "peak_bytes")), **NO_SCORES}
                self._add({"id": name, "status": "interrupted", **lacks})
            where = f"row {', '.join(map(repr, names)) or 'none'}: {str(stop) or 'stopped'}{self.engine.ended}"
            raise Interrupted(f"{where}. {self._progress()}; the same command goes on from there") from None
        finally:
            self.write_table()

    def _done(self, result: dict) -> None:
        earlier = self.earlier.get(result["id"], {})
        if result["seconds"] is None and earlier.get("status") == "done":
            result |= {key: earlier[key] for key in ("seconds", "peak_bytes")}
        elif result["seconds"] is not None:
            self.seconds.append(result["seconds"])
        self._add(result)
        told = f": {result['error']}" if result["error"] else ""
        self.screen.say(f"{result['id']}: {result['status']}{told}. {self._progress()}")

    def _add(self, result: dict) -> None:
        name = result["id"]
        self.results[name] = {key: (result | {"key": self.keys[name]}).get(key) for key in KINDS}
        append_jsonl(self.path, self.results[name])

    def _progress(self) -> str:
        counts = [sum(row["status"] == status for row in self.results.values()) for status in ("done", "failed")]
        text = f"{counts[0]} of {len(self.rows)} rows done, {counts[1]} failed"
        if not self.seconds:
            return text
        mean, left = sum(self.seconds) / len(self.seconds), len(self.rows) - sum(counts)
        time_left = f", about {duration(mean * left / self.engine.workers)} left" if left else ""
        return f"{text}, {duration(mean)} a row{time_left}"

    def write_table(self) -> None:
        """results.jsonl in the manifest's order, and the same rows as Parquet."""
        rows = self.ordered()
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_parquet(self.path.with_suffix(".parquet"), rows, KINDS)


def _resolver(recipe: Path | str | None, settings: Sequence[str]):
    """row -> its recipe; rows with the same settings are resolved once."""

    @lru_cache(maxsize=256)
    def of(texts: tuple[str, ...]) -> Recipe:
        return resolve(recipe, [*settings, *texts])

    return lambda row: of(tuple(row_settings(row)))


def _batches(rows: list[Mapping], size: int, resolved: Callable[[Mapping], Recipe]) -> list[list[Mapping]]:
    """Rows in their order, up to `size` of those that one batch can hold together."""
    alike: dict[str, list] = {}
    for number, row in enumerate(rows):
        alike.setdefault(str(shared_settings(resolved(row))) if size > 1 else str(number), []).append(row)
    return [group[k : k + size] for group in alike.values() for k in range(0, len(group), size)]


def _key(row: Mapping, recipe: Recipe) -> str:
    """What decides a row, but for the photos' content: a row that failed is another when this has changed."""
    return key_of({"photos": row.get("photos"), "class": row["class"], "recipe": recipe_to_dict(recipe)})


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM stops as Ctrl-C does, also where no step runs; the training loop has handlers of its own."""
    before = None
    with suppress(ValueError):  # outside the main thread Python sets no handlers
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Holds a table for this process. UserError where another one writes it."""
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    try:
        held = FileLock(path.with_suffix(".flock")).acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process writes {path}. Let it finish first, or give another --shard or --runs.") from None
    with held:
        yield
