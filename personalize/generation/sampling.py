"""Prompts and noise -> latents -> images, with any sampler.

B images, C latent channels, h w latent size; z0 eps (B,C,h,w), t (B,).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.image_size import Size, as_size, in_words, require_multiple
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.core.guidance import GUIDANCE, Cond, Guided
from personalize.core.samplers import SAMPLERS
from personalize.generation.attention_maps import AttentionMaps
from personalize.generation.diffusers_samplers import DIFFUSERS
from personalize.generation.words import Emphasis, encode_words
from personalize.models.image_adapter import ImagePrompt
from personalize.models.interface import LAYOUT, MASKED, LatentModel
from personalize.models.out_of_memory import DoesNotFit, free_cache, halved


def sample_latents(
    model: LatentModel,
    prompts: list[str],
    generators: list[torch.Generator],
    config: SamplingConfig,
    *,
    on_step=None,
    first: int = 0,
    start: Tensor | None = None,
    visits: int = 1,
    masked: Tensor | None = None,
    image: ImagePrompt | None = None,
    layout: Tensor | None = None,
    encoded: Tensor | None = None,
    steer: Callable[[Guided, slice], Guided] | None = None,
    emphasis: Emphasis | None = None,
    maps: list[Tensor] | None = None,
    mapped: Sequence[int] | None = None,
) -> Tensor:
    """B prompts and one generator for each -> z0 (B,C,h,w) float32 on the model's device.

    first, start (B,C,h,w), visits: as samplers take them; masked (1,1+C,h,w): MASKED for every row; image: photos that
    every row is told beside its prompt; layout (K,h,w): LAYOUT for every row; encoded (B,L,D): what is read in place of the
    prompts, as of `Decoder`; steer: what `core.steering` adds to the guidance of some of the rows; emphasis: words of the
    prompts that count more, less or not at all; maps: a list that gets the attention maps (L,h,w) of each row, or of those in
    `mapped`, which ascend.
    Row i depends on prompt i and generator i alone, beyond float rounding; with the same generators it is what
    `StableDiffusionPipeline` gives. What does not fit in memory is sampled in halves, which is said once; DoesNotFit for one
    image that does not.
    """
    assert len(prompts) == len(generators), (len(prompts), len(generators))
    size, states = image_size(model, config), [g.get_state() for g in generators]

    def sample(rows: slice) -> Tensor:
        for g, state in zip(generators[rows], states[rows], strict=True):  # as it was before what did not fit
            g.set_state(state)
        begin = {"first": first, "start": None if start is None else start[rows].to(model.device)}
        begin |= {"masked": masked, "image": image, "layout": layout, "encoded": None if encoded is None else encoded[rows]}
        begin |= {"visits": visits} if visits > 1 else {}  # which ddpm alone knows
        wrap = None if steer is None else lambda guided: steer(guided, rows)
        here = range(len(prompts))[rows]
        wanted = [] if maps is None else [k - here.start for k in (here if mapped is None else mapped) if k in here]
        begin |= {"watch": AttentionMaps(len(here), wanted)} if wanted else {}
        z0 = _sample_at_once(model, prompts[rows], generators[rows], config, wrap, emphasis, on_step=on_step, **begin)
        if wanted:
            maps.extend(begin["watch"].mean(z0.shape[-2:]))
        return z0

    def smaller(count: int) -> None:
        model.most_at_once[size] = count
        free_cache(model.device)
        model.say(
            f"out of memory: from here on {count} image{'s' if count > 1 else ''} of {in_words(size)} px at once (draw.batch)"
        )

    at_once = min(len(prompts), model.most_at_once.get(size, len(prompts)))
    try:
        return torch.cat(list(halved(sample, len(prompts), at_once, smaller=smaller)))
    except DoesNotFit as error:
        raise DoesNotFit(
            f"one image of {in_words(size)} px does not fit in the memory of {model.device} ({error}). Use a smaller "
            "draw.size, free memory there, or use --device cpu."
        ) from None


def image_size(model: LatentModel, config: SamplingConfig) -> Size:
    """Width and height of an image, px. UserError for those that the base cannot draw."""
    size = as_size(config.size or model.size)
    require_multiple(size, 8 * model.downscale, what="size", base=model.name)
    return size


def latent_shape(model: LatentModel, size: int | str | Size) -> tuple[int, int, int]:
    """Channels, height and width of an image's latents."""
    width, height = as_size(size)
    return model.latent_channels, height // model.downscale, width // model.downscale


def _sample_at_once(
    model: LatentModel, prompts: list[str], generators: list[torch.Generator], config: SamplingConfig, wrap,
    emphasis: Emphasis | None, *, masked: Tensor | None, image: ImagePrompt | None, layout: Tensor | None,
    encoded: Tensor | None, watch: AttentionMaps | None = None, **options,
) -> Tensor:  # fmt: skip
    noise = rng.normal(generators, latent_shape(model, config.size or model.size)).to(model.device)
    beside = {} if masked is None else {MASKED: masked.expand(len(prompts), -1, -1, -1)}
    beside |= {} if layout is None else {LAYOUT: layout.to(model.device).expand(len(prompts), -1, -1, -1)}
    shown, hidden = image.rows(len(prompts)) if image else ({}, {})
    with torch.inference_mode():
        uncond = unconditional(model, len(prompts), config)
        uncond = uncond and uncond | beside | hidden
        if encoded is None:
            cond = encode_texts(model, prompts, draws=True, emphasis=emphasis)
        else:
            cond = model.prepare({"text": encoded})
        cond = cond | beside | shown
        guided = text_guidance(model, cond, uncond, config, watch)
        sample = {**SAMPLERS, **DIFFUSERS}[config.sampler]
        return sample(wrap(guided) if wrap else guided, noise, model.schedule, config.steps, generators=generators, **options)


def unconditional(model: LatentModel, rows: int, config: SamplingConfig) -> Cond | None:
    """The negative prompt for so many rows; None where the guidance scale asks for none."""
    return None if config.guidance == 1 else encode_texts(model, [config.negative] * rows, draws=True)


def text_guidance(
    model: LatentModel, cond: Cond, uncond: Cond | None, config: SamplingConfig, watch: AttentionMaps | None = None
) -> Guided:
    """Classifier-free guidance as the settings say. watch: as `predict` takes it."""
    T = model.schedule.T
    interval = (config.interval[0] * T, config.interval[1] * T) if config.interval else None
    predict = partial(model.predict, watch=watch) if watch else model.predict
    return GUIDANCE["cfg"](predict, cond, uncond, config.guidance, rescale=config.rescale, interval=interval)


def encode_texts(
    model: LatentModel, prompts: list[str], *, draws: bool = False, emphasis: Emphasis | None = None
) -> Cond:  # fmt: skip
    """`encode_prompts`, with each distinct prompt encoded once. (B texts) -> cond of B rows; `draws`: prepared for sampling."""
    distinct = list(dict.fromkeys(prompts))
    if emphasis:
        cond = encode_words(model, distinct, [emphasis] * len(distinct))
    else:
        cond = model.encode_prompts(distinct)
        cond = model.prepare(cond) if draws else cond
    rows = torch.tensor([distinct.index(p) for p in prompts], device=model.device)
    return {key: value[rows] for key, value in cond.items()}


def sampling_batches(model: LatentModel, count: int, config: SamplingConfig, *, rows: int = 1) -> Iterator[range]:
    """Parts of range(count), of so many rows each, that are sampled together. The cut is the same wherever sampling starts."""
    size = max(1, (config.batch or default_batch_size(model, config.size or model.size)) // rows)
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def default_batch_size(model: LatentModel, size: int | str | Size) -> int:
    """Images at once: 16 images of 512 px on a GPU; on the CPU small latents in larger batches, large ones alone."""
    cells = math.prod(edge // model.downscale for edge in as_size(size))
    return max(1, min(64, (16 * 4096 if model.device.type == "cuda" else 25 * 256) // cells))


def image_generators(seed: int, indices: range | list[int], purpose: str = "image") -> list[torch.Generator]:
    """One generator per image: image i of a seed is the same in every batch, count and process."""
    return [rng.generator(seed, purpose, i) for i in indices]


def require_images(images: Tensor, model: LatentModel) -> Tensor:
    """Images as they are. UserError where one is not a number, which would be saved as black."""
    if not images.isfinite().all():
        remedy = (
            "Use --dtype float32." if model.dtype != torch.float32 else "Draw with fewer LoRAs, lower weights or less guidance."
        )
        raise UserError(
            f"{model.name!r} draws images that are not numbers in {str(model.dtype).removeprefix('torch.')}. {remedy}"
        )
    return images


def to_pil(images: Tensor) -> list:
    """(B,3,H,W) in [-1,1] -> B PIL images."""
    from PIL import Image

    array = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]
