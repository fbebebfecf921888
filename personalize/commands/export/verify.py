"""Does what was written draw what was trained? One image here, the same one by a fresh process, and their distance.

An image is (H,W,3) uint8. A distance is the mean over all values, on their scale of 0 to 255.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from personalize.commands.export import open_plainly
from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.generation import sampling
from personalize.models.interface import LatentModel

STEPS, SAMPLER, SEED = 4, "ddim", 0
SAME, SAME_HALF = 0.5, 1.0  # largest distance of two images that count as the same, in full and in half precision
MARGIN = 4  # a run's image is at least so many times that distance away from the base's


@dataclass(frozen=True)
class Check:
    """to_run: distance of the export's image to the run's; to_base: to the bare base's; allowed: how large to_run may be."""

    to_run: float
    to_base: float
    allowed: float

    def __str__(self) -> str:
        run = f"{self.to_run:.2f} of 255 from the run's own image ({self.allowed:g} allowed)"
        return f"drawn by a fresh process, {run} and {self.to_base:.1f} from the base's"


@dataclass(frozen=True)
class Files:
    """What a fresh process draws with: a base's folder or file, LoRA files on it, and embeddings as (file, word)."""

    base: Path
    loras: Sequence[Path] = ()
    embeddings: Sequence[tuple[Path, str]] = ()


def draw(model: LatentModel, prompt: str, config: SamplingConfig, seed: int) -> Image.Image:
    z0 = sampling.sample_latents(model, [prompt], sampling.image_generators(seed, range(1)), config)
    return sampling.to_pil(model.decode_latents(z0))[0]


def draw_in_process(model: LatentModel, prompt: str, guidance: float) -> np.ndarray:
    """The image by a model as it is now."""
    return np.asarray(draw(model, prompt, SamplingConfig(SAMPLER, STEPS, guidance, size=model.size), SEED))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def require_margin(run: np.ndarray, base: np.ndarray, *, half: bool) -> None:
    """UserError where the run's image is so much like the base's that an export of nothing would pass for the run."""
    gap, least = distance(run, base), MARGIN * (SAME_HALF if half else SAME)
    if gap < least:
        raise UserError(
            f"the run's image is {gap:.2f} of 255 away from the base's, less than the {least:g} that it takes to see "
            "whether an export works. Train longer, or export without the check: --no-check."
        )


def draw_in_fresh_process(model: LatentModel, files: Files, prompt: str, guidance: float, *, scratch: Path) -> np.ndarray:
    """The image by a fresh process on the same device. UserError quotes its last line where it fails."""
    options = [("base", files.base), ("out", scratch / "drawn"), *(("lora", path) for path in files.loras)]
    options += [("embedding", f"{path}:{token}") for path, token in files.embeddings]
    options += [("count", 1), ("steps", STEPS), ("sampler", SAMPLER), ("guidance", guidance), ("seed", SEED)]
    options += [("set", f"prompt.chunks={model.chunks}"), ("set", f"prompt.weighting={model.weighting}")]
    options += [("size", model.size), ("device", model.device), ("dtype", str(model.dtype).removeprefix("torch."))]
    words = [word for name, value in options for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "personalize", "generate", *words, "--json", "--", prompt]
    # A single file is unpacked into the cache, where nobody will look for this one again.
    environment = os.environ | {"PERSONALIZE_CACHE": str(scratch / "cache")}
    if model.device.type != "cpu":  # its memory is for the fresh process, which loads the same base
        for network in model.networks.values():
            network.to("cpu")
        model.release(vae=True, texts=True)
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1].removeprefix("error: ")
        raise UserError(f"a fresh process cannot draw with what was written, so it is not kept: {last_line}")
    return np.asarray(Image.open(json.loads(process.stdout)["files"][0]).convert("RGB"))


def require_opens_plainly(folder: Path, *, lora_of: Path | None = None) -> None:
    """UserError where diffusers and PEFT, without personalize, do not open a folder with the weights that are in it.

    A whole base's, or that of a LoRA of the base in the folder `lora_of`.
    """
    words = [sys.executable, open_plainly.__file__, str(folder), *([str(lora_of)] if lora_of else [])]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise UserError(
            f"plain diffusers cannot open what was written, so it is not kept: {last_line}. Please report it; --no-check keeps "
            "the files."
        )


def compare_images(written: np.ndarray, run: np.ndarray, base: np.ndarray, *, half: bool) -> Check:
    """UserError where what was written does not draw the run's image."""
    check = Check(distance(written, run), distance(written, base), SAME_HALF if half else SAME)
    if check.to_run > check.allowed:
        problem = f"what was written does not draw the run's image, so it is not kept: {check}"
        raise UserError(f"{problem}. Please report it; --no-check keeps the files.")
    return check
