"""What another busy program costs: drawing, training, pretraining and scoring beside a stand-in neighbour, and alone.

    python -m benchmarks.neighbour                      every job, 5 rounds; a Markdown table on stdout
    python -m benchmarks.neighbour --jobs draw          one job

Whole processes of `personalize` on Toyland, alternating between the spin counts: the package's own, and that of GNU's
OpenMP, which is what a run had before. The demand: alone at most 3 % slower than GNU's, beside the neighbour at most twice
what it takes alone. Exit status 1 where a median misses it. On a machine that is otherwise quiet, or it says nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from personalize.common.openmp import WAIT

ROOT = Path(__file__).parents[1]
PHOTOS = str(ROOT / "data_examples" / "dog")
TRAIN = ("train", PHOTOS, "--class", "dog", "--set", "choose.every=0", "--set", "train.checkpoint_every=0")
JOBS = {  # each in a new folder
    "draw": ("generate", "a dog swimming", "--base", "toyland", "--count", "1"),
    "train": (*TRAIN, "--steps", "20", "--set", "prior.count=4"),
    "pretrain": (
        "pretrain",
        "base",
        "--until",
        "vae",
        "--set",
        "pictures=2000",
        "--set",
        "subjects=100",
        "--set",
        "vae_steps=40",
    ),
    "score": ("evaluate", "--protocol", "quick"),
}
NEIGHBOUR = "while True:\n    pass"  # a thread that never waits, as a browser's script
SPINS = {"ours": {}, "GNU's": {"GOMP_SPINCOUNT": "300000"}}
QUIET_MORE, BESIDE_MORE = 1.03, 2.0
Seconds = dict[tuple[str, str, bool], list[float]]  # by job, spin count and whether a neighbour is there


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen]]:
    """Inside, as many processes of one busy thread each."""
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def wall_seconds(job: str, environment: dict[str, str]) -> float:
    """Of one process of this job, in a folder of its own; what it needs from before is made first and not counted."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAIT, "OMP_WAIT_POLICY")}
    with tempfile.TemporaryDirectory() as folder:

        def run(*words: str) -> None:
            command = [sys.executable, "-m", "personalize", *words]
            path = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
            subprocess.run(
                command, cwd=folder, check=True, capture_output=True, env={**clean, "PYTHONPATH": path, **environment}
            )

        if job == "score":
            run(*TRAIN, "--steps", "2", "--set", "prior.count=2")
        began = time.monotonic()
        run(*JOBS[job])
        return time.monotonic() - began


def measure(
    jobs: Sequence[str], *, rounds: int, count: int, run: Callable[[str, dict[str, str]], float] = wall_seconds
) -> Seconds:
    """Alternates between spin counts within a round, first alone, then beside `count` neighbours."""
    seconds: Seconds = {}
    for _ in range(rounds):
        for job in jobs:
            for beside in (False, True):
                with neighbours(count if beside else 0):
                    for name, environment in SPINS.items():
                        seconds.setdefault((job, name, beside), []).append(run(job, environment))
    return seconds


def table(seconds: Seconds) -> tuple[list[str], bool]:
    """A Markdown table of medians, and whether every job keeps both demands."""
    lines = [
        "| job | alone, s | GNU's alone | ratio | beside, s | GNU's beside | ratio to alone |",
        "|---|---|---|---|---|---|---|",
    ]
    kept = True
    for job in dict.fromkeys(job for job, _, _ in seconds):
        alone, gnu, beside, gnu_beside = (
            statistics.median(seconds[job, name, there]) for there in (False, True) for name in SPINS
        )
        kept &= alone <= QUIET_MORE * gnu and beside <= BESIDE_MORE * alone
        cells = (
            f"{alone:.1f}",
            f"{gnu:.1f}",
            f"{alone / gnu:.2f}×",
            f"{beside:.1f}",
            f"{gnu_beside:.1f}",
            f"{beside / alone:.2f}×",
        )
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return lines, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count(), help="busy processes; default: one a core")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    lines, kept = table(measure(arguments.jobs, rounds=arguments.rounds, count=arguments.neighbours))
    print(f"{os.cpu_count()} cores, load average before {load:.2f}, {time.strftime('%Y-%m-%d')}\n\n" + "\n".join(lines))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
