"""What a training run is about to do, in plain words: images, passes, parameters, memory, time, and what the VAE loses."""

import math
import re
import resource
import sys
import time
from pathlib import Path

import torch

from personalize.common import distributed
from personalize.common.optimizers import OPTIMIZERS
from personalize.data.bucketed_set import BucketedSet, size_lines
from personalize.data.crops import Photo, draw_crops, image_tensor
from personalize.data.training_set import TrainingSet
from personalize.models.interface import LatentModel
from personalize.training.engine import Engine

FAR_BELOW = 4.0  # dB below the base's own images, from which on a VAE cannot show a photo as it is
STATUS = Path("/proc/self/status")  # Linux
POOR = 24.0  # dB; below it a difference is plain to see


def describe_run(data: TrainingSet | BucketedSet, engine: Engine) -> list[str]:
    """The lines before the first step. Measures one forward and backward pass; no weight and no randomness changes."""
    train, model = data.recipe.train, data.model
    subjects, priors = data.steps_per_batch
    passes = train.steps * subjects / len(data.photos)
    trained, total = sum(p.numel() for p in engine.params), sum(p.numel() for p in model.unet.parameters())
    peak_is_new = reset_peak(model.device)
    seconds = measure_step(data, engine)
    world, painted = distributed.world_size(), []
    if model.inpaints:
        painted = ["an inpainting base: each image is seen under random masks, a quarter of which paint all of it"]
    own = sum(p.numel() for p in distributed.local_shards(engine.params))
    state = own * OPTIMIZERS[train.optimizer].state_bytes  # the optimizer's, which does not exist yet
    return [
        f"{len(data.photos)} photos, prompt {data.prompts[0]!r}"
        + (
            f"; {data.prior_count} {_preserved(data)}, prompt {data.prompts[len(data.photos)]!r}"
            if priors
            else "; no class images"
        ),
        f"{train.steps} steps of {subjects} + {priors} images: each photo is seen {passes:.0f} times",
        *size_lines(data),
        *painted,
        *_mixed(data),
        f"{', '.join(train.methods)}: {trained / 1e6:.2f} M parameters train, the U-Net has {total / 1e6:.1f} M; "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
        + (f", in {world} processes" if world > 1 else "")
        + (", each with its share of the weights (FSDP)" if distributed.is_sharded() else ""),
        f"about {duration(train.steps * seconds)} and {'' if peak_is_new else 'at most '}"
        f"{(peak_bytes(model.device) + state) / 1e9:.1f} GB, by one measured step"
        + ("" if peak_is_new else "; the memory is this process's peak so far, which cannot be reset here"),
    ]


def _mixed(data: TrainingSet) -> list[str]:
    if data.cut_mix is None:
        return []
    return [f"{data.cut_mix.share:.0%} of the photos show two subjects side by side, prompt {data.cut_mix.prompts[0]!r}"]


def _preserved(data: TrainingSet) -> str:
    return "class images" if data.prior.target is None else "predictions of the frozen base"


def measure_step(data: TrainingSet | BucketedSet, engine: Engine) -> float:
    """Seconds of forward and backward of a step with the largest images; the second of two
    when they are short, for the first warms up.
    """
    for _ in range(2):
        began = time.monotonic()
        engine.backward(data.at(data.largest_step))
        if data.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = distributed.broadcast_from_rank0(time.monotonic() - began)
        engine.clear()
        if seconds > 2:
            break
    return seconds


def reset_peak(device: torch.device) -> bool:
    """Lets `peak_bytes` begin anew, or it would tell what loading and class images took -> whether that is possible here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux; proc(5)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: torch's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if STATUS.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(peak[1]) * 1024  # getrusage begins with the peak of the process that started this one
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def representable(data: TrainingSet, base_images: list | None) -> list[str]:
    """How well the base's VAE can show these photos, and the base's own images: PSNR of the round trip in dB."""
    model, size = data.model, data.recipe.photos.size or data.model.size
    of_photos = psnr(model, data.photos, size)
    if not base_images:
        return [f"the base's VAE shows these photos at {of_photos:.1f} dB"]
    shown = [Photo(str(i), image, "", None, image.size) for i, image in enumerate(base_images[:8])]
    of_base = psnr(model, shown, size)
    line = f"the base's VAE shows these photos at {of_photos:.1f} dB, its own images at {of_base:.1f} dB"
    if of_photos >= min(of_base - FAR_BELOW, POOR):
        return [line]
    advice = (
        "Toyland draws simple cartoons and will not draw a real subject; with a GPU, use a base trained on photos: "
        "--base stable-diffusion-v1-5/stable-diffusion-v1-5"
        if model.has_world
        else "Use a base whose training images are closer to your photos."
    )
    return [line, f"warning: no training can give more than the VAE shows, and that is little. {advice}"]


def psnr(model: LatentModel, photos: list[Photo], size: int) -> float:
    """Mean over photos of 10 log10(4 / MSE) between an image in [-1,1] and its round trip through the VAE, dB."""
    values = []
    for photo in photos:
        x = image_tensor(draw_crops([photo]), size)
        mean, _ = model.encode_images(x)
        values.append(10 * math.log10(4 / float((model.decode_latents(mean).cpu() - x).square().mean())))
    return sum(values) / len(values)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
