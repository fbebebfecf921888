"""Prompt-to-Prompt (Hertz et al. 2208.01626): an image again, with other words and the layout of the first.

Of each edit three rows are drawn in one call, from the same noise and the same random numbers: the source prompt, the target
without control, and the target with maps that are borrowed from the source. n edits, rows source after source, then the
others: B = 3n; C latent channels, h w latent size; z0 (B,C,h,w).
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from personalize.common.errors import UserError
from personalize.common.image_size import in_words
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.core.guidance import Guided
from personalize.core.inversion import ddpm_residuals
from personalize.core.samplers import SAMPLERS, ddpm
from personalize.generation.attention_control import borrowed, by_time, require_control
from personalize.generation.attention_maps import AttentionMaps
from personalize.generation.diffusers_samplers import DIFFUSERS
from personalize.generation.local_blend import LocalBlend
from personalize.generation.sampling import image_size, latent_shape, text_guidance, unconditional
from personalize.generation.words import PLAIN, Emphasis, align, encode_words, require_words
from personalize.models.interface import LatentModel
from personalize.models.out_of_memory import DoesNotFit, free_cache, halved
from personalize.models.prompt_chunks import read_prompt

PARTS = ("source", "plain", "edited")  # plain: the target from the same noise, without control


@dataclass(frozen=True)
class Edit:
    """keep, layout: the share of sampling, from its start, in which maps of the text and of self-attention are the source's."""

    source: str
    target: str
    keep: float = 0.8
    layout: float = 0.4
    emphasis: Emphasis = PLAIN  # of words of the target
    local_blend: bool = False  # whether it stays the source's where the maps of the words that change are weak


def require_edit(model: LatentModel, edit: Edit) -> None:
    """UserError for an edit that the base cannot make."""
    require_control(model)
    for name, share in (("--keep", edit.keep), ("--keep-layout", edit.layout)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} {share:g} is not a share of the sampling steps; give a number from 0 to 1.")
    require_words(model, [edit.target], edit.emphasis)
    source, target = (read_prompt(model, prompt).seen for prompt in (edit.source, edit.target))
    if edit.source.split() != edit.target.split() and source == target:
        cut = model.truncated_words(edit.target) or model.truncated_words(edit.source)
        why = (
            f"they differ only in words that are cut off: {cut!r}. Shorten them" if cut else "base reads both alike. Use others"
        )
        raise UserError(f"prompts {edit.source!r} and {edit.target!r} give the same image: {why}.")


def sample_edits(
    model: LatentModel,
    edit: Edit,
    generators: list[Generator],
    config: SamplingConfig,
    *,
    photo: Tensor | None = None,
    first: int = 0,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """One generator for each of n edits -> z0 (3,n,C,h,w) float32, in the order of PARTS.

    photo (1,C,h,w): the z0 of an image that the source prompt describes, which is then what is drawn as the source, by ddpm's
    residuals from step `first` on; without it edit i begins as `sample_latents` does. maps: a list that gets the attention
    maps (L,h,w) of each edited image, by its own queries and keys also where others are borrowed. DoesNotFit for one edit that
    does not.
    """
    size, states = image_size(model, config), [g.get_state() for g in generators]

    def sample(rows: slice) -> Tensor:
        def streams() -> list[Generator]:  # three images of an edit have each its own of the same numbers
            return [Generator().set_state(state) for state in states[rows]]

        own = [g for _ in PARTS for g in streams()]
        watch = AttentionMaps(len(own)) if edit.local_blend or maps is not None else None
        with torch.inference_mode():
            guided, inverted = _guided(model, edit, len(own) // 3, config, watch)
            blend = LocalBlend(model, (edit.source, edit.target), edit.emphasis, watch) if edit.local_blend else None
            guided = blend.steered(guided) if blend else guided
            if photo is None:
                noise = rng.normal(own, latent_shape(model, size)).to(model.device)
                z0 = {**SAMPLERS, **DIFFUSERS}[config.sampler](guided, noise, model.schedule, config.steps, generators=own)
            else:
                z0 = photo.to(model.device).expand(len(own) // 3, -1, -1, -1)
                z, residuals = ddpm_residuals(inverted, z0, model.schedule, config.steps, streams(), first=first)
                z, residuals = torch.cat([z] * 3), torch.cat([residuals] * 3, 1)
                z0 = ddpm(guided, z, model.schedule, config.steps, first=first, residuals=residuals)
            z0 = blend.pasted(z0) if blend else z0
        if maps is not None:
            maps.extend(watch.mean(z0.shape[-2:]).chunk(3)[2])
        return z0.unflatten(0, (3, -1))

    try:
        return torch.cat(list(halved(sample, len(generators), len(generators), smaller=lambda _: free_cache(model.device))), 1)
    except DoesNotFit as error:
        raise DoesNotFit(
            f"the three images of one edit at {in_words(size)} px do not fit in the memory of {model.device} ({error}). "
            "Use a smaller draw.size, free memory there, or use --device cpu."
        ) from None


def _guided(
    model: LatentModel, edit: Edit, count: int, config: SamplingConfig, watch: AttentionMaps | None
) -> tuple[Guided, Guided]:
    """What draws the three rows of `count` edits, and what the source prompt alone says, for inversion."""
    parts = torch.arange(3, device=model.device).repeat_interleave(count)
    texts = encode_words(model, [edit.source, edit.target], [PLAIN, edit.emphasis])
    cond = {key: value[parts.clamp(max=1)] for key, value in texts.items()}
    uncond = unconditional(model, 3 * count, config)
    source = torch.arange(3 * count, device=model.device)
    source[2 * count :] = source[:count]
    shares, own = align(model, edit.source, edit.target)
    same, none = torch.eye(len(own)), torch.zeros(len(own))
    maps = {"alignment": torch.stack([same, same, shares]).to(model.device)[parts]}
    if own.any():
        maps["own"] = torch.stack([none, none, own]).to(model.device)[parts]

    def phase(cross: bool, layout: bool) -> Guided:
        if not (cross or layout):
            return text_guidance(model, cond, uncond, config, watch)
        borrows = borrowed(cond, uncond, source, cross=cross, layout=layout, **(maps if cross else {}))
        return text_guidance(model, *borrows, config, watch)

    ends = [model.schedule.T * (1 - share) - 1 for share in (edit.keep, edit.layout)]
    middle = by_time(phase(edit.keep > edit.layout, edit.layout > edit.keep), phase(False, False), min(ends))
    alone = [each and {key: value[:count] for key, value in each.items()} for each in (cond, uncond)]
    return by_time(phase(True, True), middle, max(ends)), text_guidance(model, *alone, config)
