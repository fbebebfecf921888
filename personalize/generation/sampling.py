"""The two things every command does with a base: the loss of a batch of latents, and drawing pictures.

B pictures, C latent channels, h w latent size; z0 eps (B,C,h,w), t (B,).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.common.errors import UserError, nearest
from personalize.core import losses, rng
from personalize.core.guidance import GUIDANCE, Cond
from personalize.core.samplers import SAMPLERS
from personalize.core.schedule import Schedule
from personalize.generation.diffusers_samplers import DIFFUSERS
from personalize.models.interface import LatentModel


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn from its prompt and noise."""

    sampler: str
    steps: int
    guidance: float
    rescale: float = 0.0
    interval: tuple[float, ...] = ()  # low, high of t / T
    negative: str = ""
    size: int = 0  # px; 0: what the base trains at
    batch: int = 0  # pictures at once; 0: chosen for the device


def per_image_loss(
    model: LatentModel, z0: Tensor, cond: Cond, *, t: Tensor, eps: Tensor, goal: Tensor | None = None,
    mask: Tensor | None = None, snr_gamma: float = 0.0, schedule: Schedule | None = None,
) -> Tensor:  # fmt: skip
    """z0, cond, t, eps -> (B,) float32: squared error of the base's own target, min-SNR weighted if gamma > 0.

    goal (B,C,h,w) in place of that target; mask (B,1,h,w): weights of the squared error's mean; schedule: the model's
    own, with its table on the device, so that nothing is copied there.
    """
    schedule = schedule or model.schedule
    out = model.predict(schedule.add_noise(z0, eps, t), t, cond)
    loss = losses.denoising_loss(out, schedule.target(z0, eps, t) if goal is None else goal, mask)
    return loss * losses.min_snr_weight(schedule.snr(t), snr_gamma, schedule.prediction) if snr_gamma else loss


def sampler_named(name: str) -> Callable:
    """A row of our samplers or of diffusers' schedulers. UserError for another name."""
    table = {**SAMPLERS, **DIFFUSERS}
    if name not in table:
        raise UserError(f"unknown sampler {name!r}{nearest(name, table) or '.'} Known: {', '.join(sorted(table))}.")
    return table[name]


def draw(model: LatentModel, prompts: list[str], generators: list[torch.Generator], how: Drawing, *, on_step=None) -> Tensor:
    """B prompts and one generator for each -> z0 (B,C,h,w) float32 on the model's device.

    Row i depends on prompt i and generator i alone, beyond float rounding; with the same generators it is what
    `StableDiffusionPipeline` draws.
    """
    assert len(prompts) == len(generators), (len(prompts), len(generators))
    size = how.size or model.size
    if size % (8 * model.downscale):
        raise UserError(f"size {size} px is not a multiple of {8 * model.downscale}, which base {model.name!r} needs.")
    side = size // model.downscale
    noise = rng.normal(generators, (model.latent_channels, side, side)).to(model.device)
    with torch.inference_mode():
        uncond = None if how.guidance == 1 else encode(model, [how.negative] * len(prompts), draws=True)
        T = model.schedule.T
        guided = GUIDANCE["cfg"](
            model.predict,
            encode(model, prompts, draws=True),
            uncond,
            how.guidance,
            rescale=how.rescale,
            interval=(how.interval[0] * T, how.interval[1] * T) if how.interval else None,
        )
        sample = sampler_named(how.sampler)
        return sample(guided, noise, model.schedule, how.steps, generators=generators, on_step=on_step)


def encode(model: LatentModel, prompts: list[str], *, draws: bool = False) -> Cond:
    """`encode_prompts`, with each different prompt encoded once. (B texts) -> cond of B rows; `draws`: prepared for drawing."""
    different = list(dict.fromkeys(prompts))
    cond = model.encode_prompts(different)
    if draws:
        cond = model.prepare(cond)
    rows = torch.tensor([different.index(p) for p in prompts], device=model.device)
    return {key: value[rows] for key, value in cond.items()}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, which a GPU is not waited for: without pinned memory each copy waits for all work before it."""
    if device.type != "cuda" or tensor.device.type != "cpu" or type(tensor) is not Tensor:  # a fake has no memory to pin
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def picked(table: Tensor, rows: list[int]) -> Tensor:
    """`table[rows]`, likewise."""
    return table[sent(torch.tensor(rows), table.device)]


def batches(model: LatentModel, count: int, how: Drawing) -> Iterator[range]:
    """Parts of range(count) that are drawn at once. The cut is the same wherever drawing starts."""
    size = how.batch or default_batch(model, how.size or model.size)
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def default_batch(model: LatentModel, size: int) -> int:
    """Pictures at once: 16 pictures of 512 px on a GPU; on the CPU small latents in larger batches, large ones alone."""
    cells = (size // model.downscale) ** 2
    return max(1, min(64, (16 * 4096 if model.device.type == "cuda" else 25 * 256) // cells))


def image_generators(seed: int, indices: range | list[int], purpose: str = "image") -> list[torch.Generator]:
    """One generator a picture: picture i of a seed is the same in every batch, count and process."""
    return [rng.generator(seed, purpose, i) for i in indices]


def to_pil(images: Tensor) -> list:
    """(B,3,H,W) in [-1,1] -> B PIL pictures."""
    from PIL import Image

    array = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]
