"""Whether a change of structure changed a number: SHA-256 of weights and images of short seeded runs of every method.

python tests/same_bits.py WORK > before.json     # in a checkout of the old code; WORK keeps the tiny bases
python tests/same_bits.py WORK > after.json      # in the new one, on the same machine; then compare the two files

Only the command line is called, so both sides may name their modules as they like. Hashes are of one machine: they are
not committed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    "photos.size=64",
    "photos.min_size=32",
    "draw.size=64",
    "draw.steps=3",
    "draw.count=2",
    "prior.count=4",
    "prior.steps=3",
]
METHODS = {
    "full": ["full"],
    "full-text-encoder": ["full", "--set", "train.text_encoder=true"],
    "full-ema-accumulate": ["full", "--set", "train.ema=0.9", "--set", "train.batch=2", "--set", "train.accumulate=2"],
    "full-split": ["full", "--set", "train.masters=split", "--set", "dtype=bfloat16"],
    "lora": ["lora"],
    "dora": ["lora", "--set", "lora.dora=true"],
    "lora-conv-text": ["lora", "--set", "lora.conv=true", "--set", "train.text_encoder=true", "--set", "train.snr_gamma=5"],
    "lora-predictions": ["lora", "--set", "prior.kind=predictions"],
    "lokr": ["lokr"],
    "loha": ["loha"],
    "oft": ["oft"],
    "boft": ["boft"],
    "textual-inversion": ["textual-inversion"],
    "custom-diffusion": ["custom-diffusion"],
    "pivotal": ["textual-inversion", "--method", "lora"],
}
LEARN_A_WORD = ("textual-inversion", "custom-diffusion", "pivotal")
TOYLAND = {
    "full": [],
    "lora": ["--method", "lora"],
    "textual-inversion": ["--method", "textual-inversion"],
    "custom-diffusion": ["--method", "custom-diffusion"],
}


def main(work: Path) -> None:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    hashes: dict[str, str] = {}
    for family in ("sd1", "sd2", "sdxl"):
        base = work / "bases" / family
        if not base.exists():
            sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
            import bases

            bases.LAYOUTS[family](base)
        names = METHODS if family == "sd1" else ("full", "lora", "textual-inversion")
        for name in names:
            extra = [arg for text in [*SMALL, "train.steps=3"] for arg in ("--set", text)]
            token = "<zqv>" if name in LEARN_A_WORD else "zqv"
            words = [f"--base={base}", *extra, "--token", token, "--method", *METHODS[name]]
            hashes |= one(out / family / name, words, draw=[arg for text in SMALL[2:5] for arg in ("--set", text)])
    quick = ["draw.steps=4", "prior.count=8", "choose.every=10", "choose.count=1", "choose.class_count=2", "choose.steps=3"]
    for name, words in TOYLAND.items():
        extra = [arg for text in [*quick, "train.steps=20"] for arg in ("--set", text)]
        hashes |= one(out / "toyland" / name, [*words, *extra], draw=["--set", "draw.steps=4"], scored=True)
    json.dump(hashes, sys.stdout, indent=1)


def one(folder: Path, words: list[str], *, draw: list[str], scored: bool = False) -> dict[str, str]:
    """Class images, weights and images of one run; with `scored` its evaluation and its export too."""
    print(folder.relative_to(folder.parents[1]), file=sys.stderr)
    runs = ["--runs", str(folder)]
    personalize(
        "train", str(ROOT / "data_examples" / "dog"), "--class", "dog", *words, *runs, "--priors", str(folder / "priors")
    )
    personalize("generate", "a {token} {class} on the beach", *draw, "--count", "2", *runs)
    (run,) = (path.parent for path in folder.glob("*/manifest.json"))
    if scored:
        small = ["evaluate.count=1", "evaluate.class_count=2", *(["draw.steps=4"])]
        personalize("evaluate", str(run), *[arg for text in small for arg in ("--set", text)])
        form = ["diffusers", "--fuse"] if folder.name == "custom-diffusion" else ["diffusers"]
        personalize("export", str(run), "--to", *form, "--no-check")
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".png") and path.name != "grid.png")
    hashes = {str(path.relative_to(folder.parents[1])): digest(path) for path in found}
    for path in (run / "evaluation" / "metrics.json", run / "choosing.jsonl"):
        if path.exists():
            hashes[str(path.relative_to(folder.parents[1]))] = hashlib.sha256(scores(path).encode()).hexdigest()
    return hashes


def scores(path: Path) -> str:
    """Every number that does not depend on the clock."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in rows])
    metrics = json.loads(path.read_text())
    return json.dumps({key: metrics[key] for key in ("scores", "class", "copying", "truth", "prompts")}, sort_keys=True)


def personalize(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "personalize", *words, "--quiet"], check=True, cwd=ROOT, env=environment, stdout=2)


def digest(path: Path) -> str:
    """Of the tensors of a weights file, whose header may say a version; of any other file's bytes."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the tiny bases and the runs")
    main(parser.parse_args().work.absolute())
