"""Drawing: many pictures by a program that is running, and one picture from the start of a process to a file.

Pictures of both sides start from the same noise, so that they can be compared. Each measurement is a process of its own:

    python -m benchmarks.drawing '{"side": "ours", …}'      a `Request` as JSON; prints a JSON line
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
from personalize.common.recipe_sections import SamplingConfig
from personalize.models import devices

BATCHES = (4, 8, 16, 32, 64)
SEARCH_STEPS = 5
PROMPT, GUIDANCE = "a dog", 7.5
SCRIPT = """import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None{dtype}).to({device!r})
pipeline({prompt!r}, num_inference_steps={steps}).images[0].save({out!r})
"""


@dataclass(frozen=True)
class Request:
    """What a process is asked for. side: ours or theirs; base: as that side takes it; out: a .npy for the images."""

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
class Difference:
    """Two sets of images: mean absolute difference, 0…255, and PSNR, dB (inf where they are the same)."""

    mean: float
    psnr: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} of 255, PSNR {self.psnr:.1f} dB"


@dataclass(frozen=True)
class Timings:
    """Seconds of each round by side, and the ratios of theirs to the others."""

    seconds: dict[str, list[float]]
    batches: dict[str, int]
    differences: dict[str, Difference]

    def ratio(self, side: str) -> Ratio:
        return ratio(self.seconds["theirs"], self.seconds[side])

    def rows(self) -> list[str]:
        lines = ["| | batch | s | ratio | difference |", "|---|---|---|---|---|"]
        for side, seconds in self.seconds.items():
            difference = f"{self.differences[side]}" if side in self.differences else ""
            times = "" if side == "theirs" else str(self.ratio(side))
            lines.append(f"| {NAMES[side]} | {self.batches[side]} | {median(seconds):.2f} | {times} | {difference} |")
        return lines


NAMES = {
    "theirs": "StableDiffusionPipeline",
    "ours": "personalize (difference: to the pipeline's)",
    "half": "personalize in bfloat16 (difference: to its own in float32)",
}


def many(job: jobs.Job, work: Path, *, rounds: int, count: int, steps: int) -> Timings:
    """`count` images on both sides, and by ours in bfloat16 where a CPU has that, in alternating processes."""
    common = {"device": job.device, "count": count, "steps": steps, "sampler": job.sampler}
    requests = {
        "theirs": Request("theirs", str(job.folder), dtype=job.dtype, **common),
        "ours": Request("ours", job.base, dtype=job.dtype, **common),
    }
    if job.dtype == "float32" and devices.cpu_has_bfloat16():
        requests["half"] = Request("ours", job.base, dtype="bfloat16", **common)
    best = _child(dataclasses.replace(requests["theirs"], steps=SEARCH_STEPS))["batch"]
    requests["theirs"] = dataclasses.replace(requests["theirs"], batch=best)
    requests = {side: dataclasses.replace(request, out=str(work / f"{side}.npy")) for side, request in requests.items()}
    seconds, batches = {side: [] for side in requests}, {}
    for k in range(rounds):
        for side in list(requests)[:: 1 if k % 2 == 0 else -1]:
            result = _child(requests[side])
            seconds[side].append(result["seconds"])
            batches[side] = result["batch"]
    images = {side: _read(request.out) for side, request in requests.items()}
    to = {"ours": "theirs", "half": "ours"}
    return Timings(seconds, batches, {a: difference(images[a], images[b]) for a, b in to.items() if a in requests})


def one(job: jobs.Job, work: Path, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Whole processes, from their start to an image on the disk -> seconds of each round: a short script's, ours."""
    dtype = ", torch_dtype=torch.bfloat16" if job.device == "cuda" else ""
    script, out = work / "one.py", work / "theirs.png"
    script.write_text(
        SCRIPT.format(folder=str(job.folder), dtype=dtype, device=job.device, prompt=PROMPT, steps=steps, out=str(out))
    )
    generate = [
        "-m", "personalize", "generate", PROMPT, "--base", job.base, "--count", "1", "--steps", str(steps),
        "--sampler", job.sampler, "--guidance", f"{GUIDANCE}", "--device", job.device, "--dtype", job.dtype,
        "--out", str(work / "ours"),
    ]  # fmt: skip
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for k in range(rounds + 1):  # the first one fills the disk's cache and is not counted
        for side, command in (("theirs", [str(script)]), ("ours", generate)):
            start, end = jobs.spawn([sys.executable, *command], work / "log.txt")
            if k:
                seconds[side].append(end - start)
    assert out.exists() and list((work / "ours").glob("a-dog*.png"))
    return seconds["theirs"], seconds["ours"]


def single(job: jobs.Job, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """One image by programs that run already -> seconds of each round: theirs, ours."""
    common = {"device": job.device, "count": 1, "steps": steps, "sampler": job.sampler, "batch": 1, "dtype": job.dtype}
    requests = (Request("theirs", str(job.folder), **common), Request("ours", job.base, **common))
    return tuple([_child(request)["seconds"] for _ in range(rounds)] for request in requests)


def difference(a, b) -> Difference:
    """(N,H,W,3) bytes each -> how far apart."""
    import numpy as np

    error = a.astype(np.float64) - b.astype(np.float64)
    square = float((error**2).mean())
    return Difference(float(np.abs(error).mean()), 10 * math.log10(255**2 / square) if square else math.inf)


def _read(path: str):
    import numpy as np

    return np.load(path)


def _child(request: Request) -> dict:
    command = [sys.executable, "-m", "benchmarks.drawing", json.dumps(dataclasses.asdict(request))]
    process = subprocess.run(command, cwd=jobs.ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def _theirs(request: Request):
    """A function (count, steps, batch) -> PIL images, by the pipeline as it is in its manual; and the batch asked for."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        request.base, torch_dtype=getattr(torch, request.dtype), safety_checker=None
    )
    pipeline.to(request.device).set_progress_bar_config(disable=True)

    def draw(count: int, steps: int, batch: int) -> list:
        images = []
        for start in range(0, count, batch):
            seeds = range(start, min(start + batch, count))
            images += pipeline(
                [PROMPT] * len(seeds), num_inference_steps=steps, guidance_scale=GUIDANCE, generator=list(map(seeded, seeds))
            ).images
        return images

    return draw, request.batch


def ours(request: Request):
    """The same by `personalize`, as its `generate` does it; the batch is its own choice unless asked for."""
    from personalize import models
    from personalize.common import malloc
    from personalize.generation import sampling

    model = malloc.keep_freed_memory_for(models.load_model(request.base, device=request.device, dtype=request.dtype))

    def draw(count: int, steps: int, batch: int) -> list:
        images, config = [], SamplingConfig(request.sampler, steps, GUIDANCE, batch=batch)
        for part in sampling.sampling_batches(model, count, config):
            z0 = sampling.sample_latents(model, [PROMPT] * len(part), list(map(seeded, part)), config)
            images += sampling.to_pil(model.decode_latents(z0))
        return images

    return draw, request.batch or min(request.count, sampling.default_batch_size(model, model.size))


def seeded(i: int):
    import torch

    return torch.Generator().manual_seed(i)


def timed(draw, *arguments: int) -> tuple[float, list]:
    import torch

    start = time.monotonic()
    images = draw(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - start, images


def main() -> None:
    import numpy as np

    request = Request(**json.loads(sys.argv[1]))
    draw, batch = (ours if request.side == "ours" else _theirs)(request)
    if not batch:
        draw(BATCHES[0], 1, BATCHES[0])
        batches = [b for b in BATCHES if b <= request.count]
        seconds_by_batch = {b: timed(draw, request.count, request.steps, b)[0] for b in batches} or {request.count: 0.0}
        print(json.dumps({"batch": min(seconds_by_batch, key=seconds_by_batch.get)}))
        return
    draw(batch, 2, batch)  # what is done once is not counted
    seconds, images = timed(draw, request.count, request.steps, batch)
    if request.out:
        np.save(request.out, np.stack([np.asarray(image) for image in images]))
    print(json.dumps({"seconds": seconds, "batch": batch}))


if __name__ == "__main__":
    main()
