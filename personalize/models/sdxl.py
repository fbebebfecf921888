"""Stable Diffusion XL (Podell et al. 2307.01952): two text encoders, a pooled embedding, the image's size as condition.

B texts, L tokens, D D2 widths of the text encoders.
"""

import torch
from torch import Tensor

from personalize.common.image_size import Size, as_size
from personalize.core.guidance import Cond
from personalize.models.interface import SIZES
from personalize.models.lazy_imports import lazy_imports
from personalize.models.prompt_chunks import join_chunks, split_mask
from personalize.models.prompt_weights import PENULTIMATE, weigh

with lazy_imports():
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

TEXT = {
    "text_encoder": (CLIPTextModel, "tokenizer"),
    "text_encoder_2": (CLIPTextModelWithProjection, "tokenizer_2"),
}
HAS_SIZES = True


def encode_prompts(model, prompts: list[str], kept: Tensor | None = None) -> Cond:
    """text (B,L,D+D2): each encoder's last layer but one; pooled (B,P): the second's projection at the end of the text.

    Of several chunks that is the end of the first one, and no word has a weight there: as in kohya's scripts and in compel.
    An empty prompt is all zeros where the base was trained so (`force_zeros_for_empty_prompt`), as diffusers does for a
    negative prompt that is not given. kept: of `LatentModel`.
    """
    hidden_states = []
    for part, encoder in model.text_encoders.items():
        ids = model.tokens(part, prompts)
        out = encoder(ids, attention_mask=split_mask(kept, model.chunks), output_hidden_states=True)
        states = weigh(model, part, prompts, out.hidden_states[-2], PENULTIMATE)
        hidden_states.append(join_chunks(states, model.chunks))
    ids, last = ids[:: model.chunks], out.last_hidden_state[:: model.chunks]
    # Where the config says eos_token_id 2, as SDXL's does, transformers pools at the largest id: a learned word's.
    rows, ends = torch.arange(len(ids), device=ids.device), (ids == model.tokenizers[part].eos_token_id).int().argmax(-1)
    text, pooled = torch.cat(hidden_states, -1), encoder.text_projection(last[rows, ends])
    if model.index.get("force_zeros_for_empty_prompt", True):
        given = torch.tensor([prompt != "" for prompt in prompts], device=text.device)
        text, pooled = text * given[:, None, None], pooled * given[:, None]
    return {"text": text, "pooled": pooled}


def unet_arguments(cond: Cond, size: int | Size) -> dict:
    """The size conditions of `cond`; without any, an image that was of its size to begin with, not cropped, and is so now."""
    if SIZES in cond:
        sizes = cond[SIZES]
    else:
        width, height = as_size(size)
        sizes = cond["text"].new_zeros(6)  # made where it is used: a copy from the host cannot be part of a CUDA graph
        sizes[0::4], sizes[1::4] = height, width
        sizes = sizes.expand(len(cond["text"]), 6)
    added = {"text_embeds": cond["pooled"], "time_ids": sizes}
    return {"encoder_hidden_states": cond["text"], "added_cond_kwargs": added}
