"""What a warm base saves a row of `personalize many`: each subject trained by a process of its own, and by one that stays.

python -m benchmarks.warm_rows WORK --rows 4 --set train.steps=20    # prints JSON; one thread; the two take turns
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = [
    "train.methods=lora",
    "train.steps=20",
    "prior.count=8",
    "prior.steps=4",
    "draw.steps=8",
    "choose.every=0",
    "device=cpu",
]
WORKER = """
import json, sys, time
from personalize import Personalizer
work = Personalizer(settings=json.loads(sys.argv[1]), runs=sys.argv[2], priors=sys.argv[3])
for line in sys.stdin:
    began = time.process_time()
    row = work(json.loads(line))
    print(json.dumps({"cpu": time.process_time() - began, "error": row["error"], "peak": row["peak_bytes"]}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    settings, photos = [*SHORT, *options.set], str(ROOT / "data_examples" / "dog")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    priors, start = str(options.work / "priors"), {"env": environment, "cwd": ROOT, "text": True}
    begun = [sys.executable, "-c", WORKER, json.dumps(settings), str(options.work / "warm"), priors]
    worker = subprocess.Popen(begun, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **start)
    seconds: dict[str, list] = {"cold": [], "warm": [], "cold cpu": [], "warm cpu": []}
    for k in range(options.rows + 1):  # the first row of each reads what the system then keeps, and draws the class images
        row = {"id": f"r{k}", "photos": photos, "class": "dog", "train.lr": 1e-4 * (k + 1)}
        began = time.monotonic()
        worker.stdin.write(json.dumps(row) + "\n")
        worker.stdin.flush()
        told = json.loads(worker.stdout.readline())
        assert told["error"] is None, told
        seconds["warm"].append(time.monotonic() - began)
        seconds["warm cpu"].append(told["cpu"])
        words = [w for text in [*settings, f"train.lr={row['train.lr']}"] for w in ("--set", text)]
        folders = ["--runs", str(options.work / f"cold{k}"), "--priors", priors, "--quiet"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "-m", "personalize", "train", photos, "--class", "dog", *words, *folders], check=True,
                       stdout=subprocess.DEVNULL, **start)  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds["cold"].append(time.monotonic() - began)
        seconds["cold cpu"].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    worker.stdin.close()
    worker.wait()
    print(json.dumps({name: [round(s, 2) for s in each] for name, each in seconds.items()}))


if __name__ == "__main__":
    main()
