"""Seconds that a person waits on this machine: the help, one picture, each phase of the quickstart.

    python -m benchmarks.startup

Whole processes, median of three for the short ones; a Markdown table on stdout.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHOTOS = Path(__file__).parents[1] / "data_examples" / "dog"


def seconds(*command: str, folder: Path, times: int = 1) -> float:
    """Median wall seconds of `personalize COMMAND` in `folder`."""
    durations = []
    for _ in range(times):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "personalize", *command], cwd=folder, check=True, capture_output=True)
        durations.append(time.monotonic() - start)
    return statistics.median(durations)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.append(("`personalize --help`", seconds("--help", folder=folder, times=3)))
        rows.append(("prior: 100 class pictures", seconds("prior", "dog", folder=folder)))
        rows.append(("train: the default recipe", seconds("train", str(PHOTOS), "--class", "dog", folder=folder)))
        one = ("generate", "a sks dog swimming", "--count", "1")
        rows.append(("generate: one picture", seconds(*one, folder=folder, times=3)))
        rows.append(("evaluate", seconds("evaluate", folder=folder)))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n\n| command | seconds |\n|---|---|")
    for command, duration in rows:
        print(f"| {command} | {duration:.1f} |")


if __name__ == "__main__":
    main()
