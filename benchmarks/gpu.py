"""Everything that only a GPU can say, measured part by part, with random weights at full size: nothing is downloaded.

    make gpu                                                   or python -m benchmarks.gpu: all parts
    python -m benchmarks.gpu --part step --part memory/sdxl    those whose names begin so
    python -m benchmarks.gpu --limit 540                       ends within so many seconds; the same command goes on
    python -m benchmarks.gpu --device cpu --size tiny          a rehearsal

Each part is a process of its own, of at most 8 minutes, whose results are written as soon as they are there, to
docs/gpu/DATE-CARD.json and a Markdown page made from it. What is there is not measured again; a part that failed only with
--again. Exit status 1 where one failed. Bases of random weights and runs (30 GB of disk) stay in --work for the next call.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks import jobs
from benchmarks.gpu_parts import TITLES, Setup, all_parts
from personalize.common.files import make_folder, read_json, slug, write_json, write_text

MOST = 480  # seconds that a part may take
LEAST = 20  # seconds in which no part can be done, so none is begun
GRACE = 5  # seconds to end in
MACHINE = "machine"  # a part that is asked for first, by each call
LOG_LINES = 30  # of a part that failed, to be shown


def main() -> None:
    options = parse_options(sys.argv[1:])
    setup = Setup(options.device, options.size, options.work.resolve(), tuple(path.resolve() for path in options.peer))
    if options.child:
        do_part(setup, options.child)
        return
    make_folder(setup.work)
    until = time.monotonic() + (options.limit or 1e9)
    wanted = chosen(list(all_parts(setup)), options.part)
    told = run_part(setup, MACHINE, MOST)
    if told["status"] != "done":
        sys.exit(f"{told['error']}\nWithout a GPU: --device cpu --size tiny, a rehearsal.")
    name = slug(f"{time.strftime('%Y-%m-%d')} {told['values']['card']}{' tiny' * (options.size == 'tiny')}")
    file = (options.out or default_folder(setup)) / f"{name}.json"
    results = {**told["values"], "date": time.strftime("%Y-%m-%d"), "parts": {}}
    for earlier in (default_folder(setup) / file.name, file):  # with --out it goes on from what is kept here too
        results = read_json(earlier) if earlier.exists() else results
    left = measure(setup, wanted, results, file, until=until, again=options.again)
    failed = [part for part in wanted if results["parts"].get(part, {}).get("status") == "failed"]
    print(f"{len(wanted) - len(failed) - left} done, {len(failed)} failed, {left} left: {file.with_suffix('.md')}")
    sys.exit(1 if failed else 0)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the bases")
    parser.add_argument("--part", action="append", default=[], help="how a part's name begins; may be given again")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="train_dreambooth.py or …_lora.py, to compare")
    parser.add_argument("--limit", type=float, default=0, help="seconds for this call; 0: as long as it takes")
    parser.add_argument("--again", action="store_true", help="parts that failed too")
    parser.add_argument("--out", type=Path, help="folder of the results; default: docs/gpu, for a rehearsal --work")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder for bases and runs, which may be removed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for script in options.peer:
        if script.name not in jobs.METHODS or not script.is_file():
            parser.error(f"--peer {script} is no file, or none of {', '.join(jobs.METHODS)}.")
    return options


def default_folder(setup: Setup) -> Path:
    return jobs.ROOT / "docs" / "gpu" if setup.device == "cuda" and setup.size == "full" else setup.work


def chosen(names: list[str], prefixes: list[str]) -> list[str]:
    """The names that begin with one of the prefixes, in their order. SystemExit for a prefix of none."""
    if strange := [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]:
        known = ", ".join(dict.fromkeys("/".join(name.split("/")[:2]) for name in names))
        sys.exit(f"--part {strange[0]}: no part's name begins so. Names begin with {known}.")
    return [name for name in names if name.startswith(tuple(prefixes or [""]))]


def measure(setup: Setup, wanted: list[str], results: dict, file: Path, *, until: float, again: bool) -> int:
    """Runs the parts that `results` lacks, and writes it after each -> how many are left."""
    make_folder(file.parent)
    done = ("done",) if again else ("done", "failed")
    todo = [part for part in wanted if results["parts"].get(part, {}).get("status") not in done]
    for k, part in enumerate(todo):
        seconds = min(MOST, until - time.monotonic())
        if seconds < LEAST:
            return len(todo) - k
        entry = run_part(setup, part, seconds)
        if entry["status"] == "stopped" and (seconds == MOST or k == 0):  # it would be stopped each time
            entry["status"] = "failed"
        results["parts"][part] = {**entry, "commit": commit()}
        write_json(file, results)
        write_text(file.with_suffix(".md"), "\n".join(page(results)) + "\n")
        print(f"{part}: {entry['status']}, {entry['seconds']:.0f} s {entry.get('error', '')}".rstrip(), flush=True)
        if entry["status"] == "stopped":
            return len(todo) - k
    return 0


def run_part(setup: Setup, part: str, seconds: float) -> dict:
    """A part in a process of its own -> status (done, failed, or stopped: out of time), seconds, values, error."""
    file, log = setup.work / "part.json", setup.work / "log.txt"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", part, "--device", setup.device, "--size", setup.size]
    command += ["--work", str(setup.work), *(word for path in setup.peers for word in ("--peer", str(path)))]
    began, status = time.monotonic(), "failed"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=jobs.ROOT, env=environment(setup), process_group=0)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "stopped"
            os.killpg(process.pid, signal.SIGTERM)  # torch's launcher then ends its workers, who have groups of their own
            time.sleep(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
    found = read_json(file) if file.exists() else {"values": {}}
    entry = {"seconds": round(time.monotonic() - began, 1), "values": found["values"]}
    if found.get("ended") and not found["error"]:
        return {"status": "done", **entry}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    error = f"stopped after {seconds:.0f} s" if status == "stopped" else f"exit status {process.returncode}: {lines[-1]}"
    print("\n".join(f"    {line}" for line in lines[-LOG_LINES:]), file=sys.stderr, flush=True)
    return {"status": status, **entry, "error": jobs.without_paths(found.get("error") or error)[:300]}


def environment(setup: Setup) -> dict[str, str]:
    """Of a part and what it starts: this package is found from any folder, whether or not it is installed."""
    path = os.pathsep.join([str(jobs.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setup.device == "cpu" else {}
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **hidden}


def do_part(setup: Setup, part: str) -> None:
    """In its own process: what was measured so far lies in part.json at any time."""
    found = {"values": {}, "ended": False, "error": ""}
    file = setup.work / "part.json"
    try:
        for values in describe(setup) if part == MACHINE else all_parts(setup)[part]():
            found["values"] |= values
            write_json(file, found)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    write_json(file, found | {"ended": True})


def describe(setup: Setup) -> Iterator[dict]:
    """The card, the machine and the libraries."""
    import torch

    from benchmarks.machine import libraries, machine

    card = torch.cuda.get_device_name() if setup.device == "cuda" else "cpu"
    yield {"card": card, "machine": machine(), "libraries": libraries()}


def commit() -> str:
    """Of the code that was measured; "" where git or its folder is not there."""
    with suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def page(results: Mapping) -> Iterator[str]:
    """Lines of Markdown: a table for each kind of part, and what does not fit in one beneath it."""
    yield f"# {results['card']}, {results['date']}"
    yield from ("", f"Made by `make gpu` ([how](../benchmarks.md)). {results['machine']}; {results['libraries']}.")
    for kind, title in TITLES.items():
        rows = {name.partition("/")[2]: part for name, part in results["parts"].items() if name.startswith(f"{kind}/")}
        if rows:
            yield from ("", f"## {title}", "", *_table(rows))
            for name, part in rows.items():
                if lines := part["values"].get("lines"):
                    yield from ("", f"**{name}**", "", *(line.replace("### ", "") for line in lines))


def _table(rows: Mapping[str, Mapping]) -> Iterator[str]:
    simple = (str, int, float)
    columns = list(dict.fromkeys(k for part in rows.values() for k, v in part["values"].items() if isinstance(v, simple)))
    if any("error" in part for part in rows.values()):
        columns.append("error")
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, part in rows.items():
        values = {**part["values"], "error": part.get("error", "")}
        yield f"| {name} | {' | '.join(_cell(values.get(column, '')) for column in columns)} |"


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    main()
