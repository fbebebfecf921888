"""Stable Diffusion 1.x and 2.x, and every base of that shape: one CLIP text encoder, whose last layer is the conditioning.

B texts, L tokens, D text width.
"""

from torch import Tensor

from personalize.common.image_size import Size
from personalize.core.guidance import Cond
from personalize.models.lazy_imports import lazy_imports
from personalize.models.prompt_chunks import join_chunks, split_mask
from personalize.models.prompt_weights import LAST, weigh

with lazy_imports():
    from transformers.models.clip.modeling_clip import CLIPTextModel

TEXT = {"text_encoder": (CLIPTextModel, "tokenizer")}
HAS_SIZES = False


def encode_prompts(model, prompts: list[str], kept: Tensor | None = None) -> Cond:
    """text (B,L,D): hidden states of the last layer. Gradients flow where the text encoder trains. kept: of `LatentModel`."""
    # Padding is attended to, as in training of these bases; diffusers passes a mask only where the config asks.
    encoder, ids = model.text_encoders["text_encoder"], model.tokens("text_encoder", prompts)
    states = encoder(ids, attention_mask=split_mask(kept, model.chunks)).last_hidden_state
    return {"text": join_chunks(weigh(model, "text_encoder", prompts, states, LAST), model.chunks)}


def unet_arguments(cond: Cond, size: int | Size) -> dict[str, Tensor]:
    return {"encoder_hidden_states": cond["text"]}
