"""One worker against two in `personalize many`: the loop, two shards side by side, and Ray with one and with two workers.

python -m benchmarks.many_workers WORK --rows 4 --rounds 2    # prints JSON; one thread a worker; the arms take turns
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.warm_rows import ROOT
from benchmarks.warm_rows import SHORT as UNSCORED

SHORT = [*UNSCORED, "choose.every=20", "choose.count=1", "choose.class_count=1"]
RAY = ["--engine", "ray", "--workers"]
ARMS = {"loop": [[]], "two shards": [["--shard", "0/2"], ["--shard", "1/2"]], "ray 1": [[*RAY, "1"]], "ray 2": [[*RAY, "2"]]}


def cpu_seconds(mark: str) -> dict[int, float]:
    """Of each process that is alive and has `mark` in its environment, at any depth."""
    used = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                used[int(place.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):  # it has ended, or is another user's
            continue
    return used


def run_arm(name: str, number: int, work: Path, rows: int, settings: list[str]) -> dict[str, float]:
    """One job of new rows -> seconds, CPU seconds of all its processes (to half a second each), seconds a row."""
    photos, mark = str(ROOT / "data_examples" / "dog"), f"MANY_WORKERS={name}-{number}"
    manifest, results = work / "manifest.jsonl", []
    lines = [{"id": f"{name}-{number}-{k}".replace(" ", "-"), "photos": photos, "class": "dog"} for k in range(rows)]
    manifest.write_text("".join(json.dumps(row | {"train.lr": 1e-4 * (k + 1)}) + "\n" for k, row in enumerate(lines)))
    sets = [word for text in settings for word in ("--set", text)]
    command = [sys.executable, "-m", "personalize", "many", str(manifest), "--json", *sets]
    command += ["--runs", str(work / "runs"), "--priors", str(work / "priors")]
    environment = os.environ | dict([mark.split("=")]) | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    began, used = time.monotonic(), {}
    started = {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*command, *words], **started) for words in ARMS[name]]
    while any(job.poll() is None for job in jobs):
        used |= cpu_seconds(mark)
        time.sleep(0.5)
    seconds = time.monotonic() - began
    for job in jobs:
        assert job.returncode == 0, job.stdout.read()
        results += json.loads(job.stdout.read())["rows"]
    return {
        "seconds": round(seconds, 1),
        "cpu": round(sum(used.values()), 1),
        "of a row": round(sum(row["seconds"] for row in results) / rows, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = [*SHORT, *options.set]
    run_arm("loop", -1, options.work, 1, settings)  # draws the class images and the base's
    for number in range(options.rounds):
        for name in ARMS:
            print(json.dumps({"arm": name} | run_arm(name, number, options.work, options.rows, settings)), flush=True)


if __name__ == "__main__":
    main()
