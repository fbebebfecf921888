"""Drawing: many pictures by a program that is running, and one picture from the start of a process to a file.

Pictures of both sides start from the same noise, so that they can be compared. Each measurement is a process of its own:

    python -m benchmarks.drawing '{"side": "ours", …}'      an `Ask` as JSON; prints a JSON line
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import jobs
from benchmarks.phases import Ratio, median, ratio
from personalize.common.recipe import SamplingConfig

BATCHES = (4, 8, 16, 32, 64)
SEARCH_STEPS = 5
PROMPT, GUIDANCE = "a dog", 7.5
SCRIPT = """import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None{dtype}).to({device!r})
pipeline({prompt!r}, num_inference_steps={steps}).images[0].save({out!r})
"""


@dataclass(frozen=True)
class Ask:
    """What a process is asked for. side: ours or theirs; base: as that side takes it; out: a .npy for the pictures."""

    side: str
    base: str
    device: str
    dtype: str
    sampler: str = "ddim"
    count: int = 64
    steps: int = 25
    batch: int = 0  # ours: 0 is what `personalize generate` takes; theirs: 0 searches the best of BATCHES
    out: str = ""


@dataclass(frozen=True)
class Apart:
    """Two sets of pictures: mean absolute difference, 0…255, and PSNR, dB (inf where they are the same)."""

    mean: float
    psnr: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} of 255, PSNR {self.psnr:.1f} dB"


@dataclass(frozen=True)
class Drawn:
    """Seconds of each round by side, and the ratios of theirs to the others."""

    seconds: dict[str, list[float]]
    batches: dict[str, int]
    apart: dict[str, Apart]

    def ratio(self, side: str) -> Ratio:
        return ratio(self.seconds["theirs"], self.seconds[side])

    def rows(self) -> list[str]:
        lines = ["| | batch | s | ratio | difference |", "|---|---|---|---|---|"]
        for side, seconds in self.seconds.items():
            apart = f"{self.apart[side]}" if side in self.apart else ""
            times = "" if side == "theirs" else str(self.ratio(side))
            lines.append(f"| {NAMES[side]} | {self.batches[side]} | {median(seconds):.2f} | {times} | {apart} |")
        return lines


NAMES = {
    "theirs": "StableDiffusionPipeline",
    "ours": "personalize (difference: to the pipeline's)",
    "half": "personalize in bfloat16 (difference: to its own in float32)",
}


def many(job: jobs.Job, work: Path, *, rounds: int, count: int, steps: int) -> Drawn:
    """`count` pictures on both sides, and by ours in bfloat16, in alternating processes."""
    common = {"device": job.device, "count": count, "steps": steps, "sampler": job.sampler}
    asks = {
        "theirs": Ask("theirs", str(job.folder), dtype=job.dtype, **common),
        "ours": Ask("ours", job.base, dtype=job.dtype, **common),
    }
    if job.dtype == "float32":
        asks["half"] = Ask("ours", job.base, dtype="bfloat16", **common)
    best = _child(dataclasses.replace(asks["theirs"], steps=SEARCH_STEPS))["batch"]
    asks["theirs"] = dataclasses.replace(asks["theirs"], batch=best)
    asks = {side: dataclasses.replace(ask, out=str(work / f"{side}.npy")) for side, ask in asks.items()}
    seconds, batches = {side: [] for side in asks}, {}
    for k in range(rounds):
        for side in list(asks)[:: 1 if k % 2 == 0 else -1]:
            told = _child(asks[side])
            seconds[side].append(told["seconds"])
            batches[side] = told["batch"]
    pictures = {side: _read(ask.out) for side, ask in asks.items()}
    to = {"ours": "theirs", "half": "ours"}
    return Drawn(seconds, batches, {a: difference(pictures[a], pictures[b]) for a, b in to.items() if a in asks})


def one(job: jobs.Job, work: Path, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Whole processes, from their start to a picture on the disk -> seconds of each round: a short script's, ours."""
    dtype = ", torch_dtype=torch.bfloat16" if job.device == "cuda" else ""
    script, out = work / "one.py", work / "theirs.png"
    script.write_text(
        SCRIPT.format(folder=str(job.folder), dtype=dtype, device=job.device, prompt=PROMPT, steps=steps, out=str(out))
    )
    mine = [
        "-m", "personalize", "generate", PROMPT, "--base", job.base, "--count", "1", "--steps", str(steps),
        "--sampler", job.sampler, "--guidance", f"{GUIDANCE}", "--device", job.device, "--dtype", job.dtype,
        "--out", str(work / "ours"),
    ]  # fmt: skip
    taken: dict[str, list[float]] = {"theirs": [], "ours": []}
    for k in range(rounds + 1):  # the first one fills the disk's cache and is not counted
        for side, command in (("theirs", [str(script)]), ("ours", mine)):
            began, ended = jobs.spawn([sys.executable, *command], work / "log.txt")
            if k:
                taken[side].append(ended - began)
    assert out.exists() and list((work / "ours").glob("a-dog*.png"))
    return taken["theirs"], taken["ours"]


def single(job: jobs.Job, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """One picture by programs that run already -> seconds of each round: theirs, ours."""
    common = {"device": job.device, "count": 1, "steps": steps, "sampler": job.sampler, "batch": 1, "dtype": job.dtype}
    asks = (Ask("theirs", str(job.folder), **common), Ask("ours", job.base, **common))
    return tuple([_child(ask)["seconds"] for _ in range(rounds)] for ask in asks)


def difference(a, b) -> Apart:
    """(N,H,W,3) bytes each -> how far apart."""
    import numpy as np

    error = a.astype(np.float64) - b.astype(np.float64)
    square = float((error**2).mean())
    return Apart(float(np.abs(error).mean()), 10 * math.log10(255**2 / square) if square else math.inf)


def _read(path: str):
    import numpy as np

    return np.load(path)


def _child(ask: Ask) -> dict:
    command = [sys.executable, "-m", "benchmarks.drawing", json.dumps(dataclasses.asdict(ask))]
    done = subprocess.run(command, cwd=jobs.ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _theirs(ask: Ask):
    """A function (pictures, steps, batch) -> PIL pictures, by the pipeline as it is in its manual; and the batch asked for."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ask.base, torch_dtype=getattr(torch, ask.dtype), safety_checker=None)
    pipeline.to(ask.device).set_progress_bar_config(disable=True)

    def draw(count: int, steps: int, batch: int) -> list:
        made = []
        for start in range(0, count, batch):
            seeds = range(start, min(start + batch, count))
            made += pipeline(
                [PROMPT] * len(seeds), num_inference_steps=steps, guidance_scale=GUIDANCE, generator=list(map(seeded, seeds))
            ).images
        return made

    return draw, ask.batch


def _ours(ask: Ask):
    """The same by `personalize`, as its `generate` does it; the batch is its own choice unless asked for."""
    from personalize import models
    from personalize.common import malloc
    from personalize.generation import sampling

    model = malloc.keep_freed_memory_for(models.load_model(ask.base, device=ask.device, dtype=ask.dtype))

    def draw(count: int, steps: int, batch: int) -> list:
        made, how = [], SamplingConfig(ask.sampler, steps, GUIDANCE, batch=batch)
        for part in sampling.sampling_batches(model, count, how):
            z0 = sampling.sample_latents(model, [PROMPT] * len(part), list(map(seeded, part)), how)
            made += sampling.to_pil(model.decode_latents(z0))
        return made

    return draw, ask.batch or min(ask.count, sampling.default_batch_size(model, model.size))


def seeded(i: int):
    import torch

    return torch.Generator().manual_seed(i)


def timed(draw, *what: int) -> tuple[float, list]:
    import torch

    began = time.monotonic()
    pictures = draw(*what)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began, pictures


def main() -> None:
    import numpy as np

    ask = Ask(**json.loads(sys.argv[1]))
    draw, batch = (_ours if ask.side == "ours" else _theirs)(ask)
    if not batch:
        draw(BATCHES[0], 1, BATCHES[0])
        tried = {b: timed(draw, ask.count, ask.steps, b)[0] for b in BATCHES if b <= ask.count} or {ask.count: 0.0}
        print(json.dumps({"batch": min(tried, key=tried.get)}))
        return
    draw(batch, 2, batch)  # what is done once is not counted
    seconds, pictures = timed(draw, ask.count, ask.steps, batch)
    if ask.out:
        np.save(ask.out, np.stack([np.asarray(picture) for picture in pictures]))
    print(json.dumps({"seconds": seconds, "batch": batch}))


if __name__ == "__main__":
    main()
