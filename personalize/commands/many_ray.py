"""`many --engine ray`: Ray Data gives batches of rows to actors, each of which keeps a `Personalizer`.

A worker that dies in a batch is started again by Ray, on any node that has room, and the batch is done again: its runs go on
from their last checkpoints.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from personalize.commands.personalizer import Personalizer, failed_row
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal

TRIES = 3  # of a batch whose worker dies; Ray itself would try for ever
STORE = 200_000_000  # bytes of a local cluster's object store, which holds rows alone
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


class RayEngine:
    """Workers of so many CPUs and GPUs each on the cluster to which this process is connected."""

    ended = "; the workers have ended"

    def __init__(self, work: Personalizer, *, workers: int, cpus: int, gpus: float):
        import ray

        self.work, self.workers = work, workers
        self._resources, self._threads = {"num_cpus": cpus, "num_gpus": gpus}, cpus
        self._tally, self._batches = ray.remote(num_cpus=0, max_restarts=-1)(_Tally).remote(), []

    def check(self, recipe: Recipe, together: Sequence[Recipe], screen: Terminal) -> None:
        """As `Personalizer.check`, of a worker: this machine may have no GPU."""
        import ray

        check = ray.remote(**self._resources, max_retries=0)(_refusal)
        if refusal := ray.get(check.remote(self.work, os.getcwd(), recipe, together)):
            raise UserError(refusal)

    def results(self, batches: Iterable[list[Mapping]]) -> Iterator[list[dict]]:
        """The results of each batch as it ends, in any order."""
        import ray.data

        if not (batches := list(batches)):
            return
        self._batches = batches
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        items = ray.data.from_items([{"batch": k} for k in range(len(batches))], override_num_blocks=len(batches))
        # No batch waits at a worker that is busy while another has none.
        pool = ray.data.ActorPoolStrategy(size=min(self.workers, len(batches)), max_tasks_in_flight_per_actor=1)
        given = (self.work, batches, self._tally, os.getcwd(), self._threads)
        for row in items.map(_Worker, fn_constructor_args=given, compute=pool, **self._resources).iter_rows():
            yield json.loads(row["results"])

    def running(self) -> list[str]:
        """The ids of rows that workers have begun."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            return [str(row["id"]) for k in ray.get(self._tally.begun.remote(), timeout=5) for row in self._batches[k]]
        return []


@contextmanager
def ray_engine(
    work: Personalizer, device: str, *, workers: int, cpus: int, gpus: float | None, screen: Terminal
) -> Iterator[RayEngine]:
    """The cluster at RAY_ADDRESS, or a local one that ends with this.

    cpus: of a worker, and its threads; 0 gives it those of this process on a CPU, for another number of threads gives other
    bits, and one beside a GPU. gpus: of a worker, such as 0.5; None gives it one where the device is a GPU.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray, which is not installed. Run: pip install 'personalize[ray]'")
    if gpus is None:
        gpus = float(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))
    cpus = cpus or (1 if gpus else torch.get_num_threads())
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    address, own = os.environ.get("RAY_ADDRESS", ""), not ray.is_initialized()
    # A dead worker is told of on stdout, where a command's result alone belongs.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if own:
                _connect(address, {} if address else {"num_cpus": workers * cpus, "object_store_memory": STORE})
            _say_resources(screen, address, workers, cpus, gpus)
            yield RayEngine(work, workers=workers, cpus=cpus, gpus=gpus)
        finally:
            if own:
                ray.shutdown()


def _connect(address: str, options: Mapping) -> None:
    import ray

    quiet = {"include_dashboard": None if address else False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    for last in (False, False, True):
        try:
            with _closed_stderr():
                ray.init(address=address or "local", **options, **quiet)
            return
        except ConnectionError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address!r} ({why}). Correct or unset it: without it one begins here."
            ) from None
        except Exception as error:  # on a busy machine it gives up after 30 s, a number of its own
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                raise


@contextmanager
def _closed_stderr() -> Iterator[None]:
    """Inside, nothing reaches stderr: Ray's C++ side says there that its log level was set. Its errors are exceptions."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _say_resources(screen: Terminal, address: str, workers: int, cpus: int, gpus: float) -> None:
    """What is there and what is asked for. UserError where this machine alone cannot have it; a cluster may grow."""
    import ray

    there = ray.cluster_resources().get("GPU", 0)
    if not address and workers * gpus > there:
        raise UserError(
            f"{workers} workers of {gpus:g} GPUs each need {workers * gpus:g}, and {there:g} are here. Give fewer, or "
            "--gpus 0.5, by which two workers share one."
        )
    each = f"{workers} workers of {cpus} CPUs" + (f" and {gpus:g} GPUs each" if gpus else " each")
    screen.say(
        f"{each} on " + (f"the Ray cluster at {address}, which has {there:g} GPUs now" if address else "a local Ray cluster")
    )


class _Tally:
    """A small actor that counts how often each batch was begun."""

    def __init__(self) -> None:
        self.tries: dict[int, int] = {}

    def begin(self, batch: int) -> int:
        self.tries[batch] = self.tries.get(batch, 0) + 1
        return self.tries[batch]

    def begun(self) -> list[int]:
        return list(self.tries)


class _Worker:
    """An actor of Ray Data: {"batch": number} -> {"results": JSON}."""

    def __init__(self, work: Personalizer, batches: Sequence[list[Mapping]], tally, folder: str, threads: int):
        self.work, self.batches, self.tally, self.threads = work, batches, tally, threads
        _enter(folder)

    def __call__(self, item: Mapping) -> dict:
        import ray

        torch.set_num_threads(self.threads)  # here, for it holds for the thread that calls it
        number = int(item["batch"])
        rows = self.batches[number]
        if ray.get(self.tally.begin.remote(number)) > TRIES:
            why = f"its worker died in it {TRIES} times: killed, crashed or out of memory; Ray's logs say how. Try it alone"
            return {"results": json.dumps([failed_row(row, f"{why}, by personalize train.") for row in rows])}
        try:
            return {"results": json.dumps(self.work.together(rows))}
        except BaseException:  # a GPU that has faulted, or a signal to this process alone: the next one tries again
            traceback.print_exc()
            os._exit(1)


def _refusal(work: Personalizer, folder: str, recipe: Recipe, together: Sequence[Recipe]) -> str:
    _enter(folder)
    try:
        work.check(recipe, together, SILENT)
    except UserError as error:
        return str(error)
    return ""


def _enter(folder: str) -> None:
    """To where relative paths lead as they do in the command, if this node has it; else they are the node's own."""
    if Path(folder).is_dir():
        os.chdir(folder)
