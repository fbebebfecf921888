"""Estimated and measured peak memory of training runs on this CPU, above the memory after imports.

    python -m benchmarks.memory                the small cases
    python -m benchmarks.memory --all          full-size Stable Diffusion 1.5 too: 12 GB of memory, 4.5 GB of disk, minutes

Each run is a child process that loads a base, encodes, and takes two steps; its peak is the kernel's (VmHWM). Bases are
random. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import bases

CASES = {  # name: (base, settings)
    "tiny, full": ("tiny", ["train.methods=full", "train.text_encoder=true"]),
    "Toyland, full and text encoder, 2 + 2": ("toyland", []),
    "Toyland, LoRA, 2 + 2": ("toyland", ["train.methods=lora"]),
    "SD1.5 512 px, LoRA": ("sd15", ["train.methods=lora"]),
    "SD1.5 512 px, LoRA, checkpointing": ("sd15", ["train.methods=lora", "train.gradient_checkpointing=true"]),
    "SD1.5 512 px, full, 8-bit AdamW, checkpointing": (
        "sd15", ["train.optimizer=adamw8bit", "train.gradient_checkpointing=true"],
    ),
    "SD1.5 512 px, full, 8-bit AdamW, checkpointing, bf16, split masters": (
        "sd15", ["train.optimizer=adamw8bit", "train.gradient_checkpointing=true", "dtype=bfloat16", "train.masters=split"],
    ),
}  # fmt: skip


def case(base: str, settings: list[str], recipe: Path | None = None):
    """The recipe of a case and its subject: two photos at the size of the base, four for small ones."""
    import personalize
    from personalize.data import photos
    from personalize.data.crops import Photo
    from personalize.data.subjects import Subject
    from personalize.models.locate import base_size

    size = base_size(base)
    common = [f"base={base}", "class_word=dog", "token=sks", "device=cpu", "dtype=float32"]
    resolved = personalize.resolve(recipe, [*common, *([] if base == "toyland" or recipe else ["prior.count=0"]), *settings])
    subject_photos = photos.load_photos(bases.PHOTOS, min_size=64)[0][: 2 if size > 64 else 4]
    if size > 64:
        square = size, size
        subject_photos = [Photo(p.path, p.image.resize(square), p.sha256, p.caption, square) for p in subject_photos]
    return resolved, [Subject(resolved.token[0], "dog", subject_photos)]


def measure(base: str, settings: list[str], recipe: Path | None = None) -> dict[str, int]:
    """Bytes at most in each phase of a real run in this process: above those after imports, or of torch's on a GPU."""
    import peft  # noqa: F401
    import torch

    from personalize.common import malloc
    from personalize.models import latent_diffusion, sd  # noqa: F401
    from personalize.training.memory.rehearsal import Rehearsal

    with suppress(ImportError):  # the only one of these that an installation need not have
        import bitsandbytes  # noqa: F401
    # Freed blocks of 2 MB and more leave the process at once. Otherwise glibc keeps them in pieces that rarely fit again,
    # and a run at full size holds 15 to 25 % more than its tensors.
    malloc.set_malloc({malloc.MMAP_THRESHOLD: 2 * malloc.MB, malloc.TRIM_THRESHOLD: 64 * malloc.MB})
    run = Rehearsal(*case(base, settings, recipe))
    on_gpu, before, peaks = run.recipe.device == "cuda", status("VmRSS"), {}
    for name, phase in run.phases().items():
        restart(on_gpu)
        start = time.monotonic()
        phase(None)
        peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM") - before
        print(f"  {name} {peaks[name] / 1e9:.2f} GB, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return peaks


def restart(on_gpu: bool) -> None:
    """From here on the peak is a new one."""
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(task: str, base: str, settings: list[str]) -> dict[str, int]:
    """`what` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", task, base, *settings]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(process.stdout.splitlines()[-1])


def in_child(task: str, base: str, settings: list[str]) -> dict[str, int]:
    if task == "measure":
        peaks = measure(base, settings)
        return {**peaks, "peak": max(peaks.values())}
    from personalize.training.memory.rehearsal import rehearse

    counted = rehearse(*case(base, settings))
    return {**{name: phase.peak for name, phase in counted.phases.items()}, "peak": counted.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--folder", type=Path, help="where bases are kept; else a temporary one")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, name, *settings = options.child
        print(json.dumps(in_child(task, name, settings)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print("| run | estimated, GB | measured, GB | ratio |\n|---|---|---|---|")
        for name, (kind, settings) in CASES.items():
            if (options.all or kind != "sd15") and options.only in name:
                where = bases.base(kind, options.folder or Path(temporary))
                estimated, measured = (child(task, where, settings)["peak"] for task in ("estimate", "measure"))
                print(f"| {name} | {estimated / 1e9:.2f} | {measured / 1e9:.2f} | {estimated / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
