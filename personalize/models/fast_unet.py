"""The forward pass of diffusers' `UNet2DConditionModel` in fewer and larger operators: the same function, to rounding.

It walks the library's modules and calls torch on their weights. Left out is what does nothing for these networks
(division by 1, dropout of 0, copies there and back), what is the same at every step (keys and values of the text), and what
is the same for both halves of guidance (all before the text enters).
1x1 convolutions on tokens are matrix products, which spares a CPU oneDNN's reorders.

B images, C channels, h w latent size; N = h w tokens, L text tokens, D text width.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from personalize.core.guidance import Cond
from personalize.models.kernels.group_norm import group_norm_silu
from personalize.models.offload import Offload

BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D"}
PLAIN = {  # the settings that `fast_forward` computes; one that is not here does not matter
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None, "dropout": 0.0,
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "num_class_embeds": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip
TEXT_KEYS_VALUES = "attn2:"  # begins the names of the text's keys and values in a conditioning
IMAGE_KEYS_VALUES = "image:"  # and of an image prompt, read beside the text's; see `image_adapter`
# In a conditioning, (B,) int64: how many rows from its own a row takes queries and keys of self- or cross-attention. As they
# are relative they stay right when the halves of guidance are put together.
BORROW_SELF, BORROW_CROSS = "borrow:self", "borrow:cross"
PREPARED = (TEXT_KEYS_VALUES, IMAGE_KEYS_VALUES, BORROW_SELF, BORROW_CROSS)
# Told the queries (kB,H,N,c) and keys (kB,H,L,c) of each cross-attention, in H heads; each row's own, whatever is borrowed.
Watch = Callable[[Tensor, Tensor], None]
WATCH = "watch"


def why_not_fast(unet: nn.Module) -> str:
    """Why only the library's own forward pass will do, or "" where this one computes the same."""
    config = unet.config
    for name, value in PLAIN.items():
        if config.get(name, value) != value:
            return f"{name} is {config[name]!r}"
    if config.get("addition_embed_type") not in (None, "text_time"):
        return f"addition_embed_type is {config.addition_embed_type!r}"
    for kind in (*config.down_block_types, config.mid_block_type, *config.up_block_types):
        if kind not in BLOCKS:
            return f"it has a {kind}"
    return ""


def text_keys_values(unet: nn.Module, text: Tensor, offload: Offload | None = None) -> Cond:
    """(B,L,D) -> (B,L,2C) by name for every cross-attention: its keys, then its values, the same at every sampling step."""
    attentions = {name: part for name, part in unet.named_modules() if name.endswith(".attn2")}
    run = offload.call_alone if offload else _now
    return {
        TEXT_KEYS_VALUES + name: torch.cat([run(_call, a.to_k, text), run(_call, a.to_v, text)], -1)
        for name, a in attentions.items()
    }


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """The residual and transformer blocks in the order of a pass: the parts that gradient checkpointing computes again."""
    middle = unet.mid_block
    layers = [layer for block in unet.down_blocks for layer in _layers(block)]
    layers += [(middle.resnets[0], middle.attentions[0]), (middle.resnets[1], None)]
    layers += [layer for block in unet.up_blocks for layer in _layers(block)]
    return [part for resnet, attention in layers for part in (resnet, *(attention.transformer_blocks if attention else ()))]


def fast_forward(
    unet: nn.Module, z_t: Tensor, t: Tensor, text: Tensor, *, added: Cond | None = None, prepared: Cond | None = None,
    offload: Offload | None = None, watch: Watch | None = None,
) -> Tensor:  # fmt: skip
    """(B,C,h,w), (B,), (kB,L,D) -> raw output (kB,C,h,w). added: SDXL's conditions; prepared: of `text_keys_values`.

    prepared may have a third part: values that are read by the row's own queries and keys where the others are borrowed.
    It may also say BORROW_SELF and BORROW_CROSS. softmax(q k) of another row is never made: attention is called with its q, k.
    Of kB rows each part of B has the same z_t and t, and B rows are computed up to the first cross-attention. Not for SDXL,
    where the text is in the time embedding, nor where self-attention is borrowed: there it is kB from the start.
    With gradient checkpointing each residual and each transformer block is computed again for its gradient. offload: of
    these blocks, which are fetched both times.
    """
    run = recomputed if unet.is_gradient_checkpointing and torch.is_grad_enabled() else _now
    if offload:
        run = partial(run, offload.call)
    both = _by_attention(unet, prepared or {}) | {WATCH: watch}
    if added or BORROW_SELF in both:
        z_t, t = repeated(z_t, len(text)), repeated(t, len(text))
    emb = unet.time_embedding(unet.get_time_embed(sample=z_t, timestep=t))
    if added:
        emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = F.silu(emb)

    def layer(resnet: nn.Module, attention: nn.Module | None, h: Tensor) -> Tensor:
        h = run(_resnet, resnet, h, repeated(emb, len(h)))
        return h if attention is None else _attend(attention, h, lambda block, x: run(_transform, block, x, text, both))

    h = _call(unet.conv_in, z_t)
    skips = [h]
    for block in unet.down_blocks:
        for resnet, attention in _layers(block):
            h = layer(resnet, attention, h)
            skips.append(h)
        for down in block.downsamplers or ():
            h = _call(down.conv, h)
            skips.append(h)
    h = layer(unet.mid_block.resnets[0], unet.mid_block.attentions[0], h)
    h = layer(unet.mid_block.resnets[1], None, h)
    for block in unet.up_blocks:
        for resnet, attention in _layers(block):
            h = layer(resnet, attention, torch.cat([h, repeated(skips.pop(), len(h))], 1))
        for up in block.upsamplers or ():
            h = _call(up.conv, F.interpolate(h, size=skips[-1].shape[-2:]))
    return _call(unet.conv_out, _norm(unet.conv_norm_out, h, silu=True))


def _by_attention(unet: nn.Module, prepared: Cond) -> dict[Any, Any]:
    """What is prepared, parted, by attention, of images by (attention, IMAGE_KEYS_VALUES); and at BORROW_SELF and BORROW_CROSS
    (B,) the row that each row borrows from.
    """
    both = {}
    for name, value in prepared.items():
        if name.startswith(TEXT_KEYS_VALUES):
            attention = unet.get_submodule(name.removeprefix(TEXT_KEYS_VALUES))
            both[attention] = value.split(attention.inner_kv_dim, -1)
        elif name.startswith(IMAGE_KEYS_VALUES):
            attention = unet.get_submodule(name.removeprefix(IMAGE_KEYS_VALUES))
            both[attention, IMAGE_KEYS_VALUES] = value.chunk(2, -1)
        else:
            both[name] = torch.arange(len(value), device=value.device) + value
    return both


def repeated(x: Tensor, rows: int) -> Tensor:
    """(B,...) -> (rows,...): x as often as it goes into `rows`, in its own memory format, which `repeat` would not keep."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def recomputed(function: Callable, *inputs) -> Tensor:
    """Keeps the inputs only, and computes what lies between again for the gradient.

    Not for what draws random numbers, such as dropout: their generator's state is not kept, as no CUDA graph could read it.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def has_dropout(network: nn.Module) -> bool:
    """Whether a network in training draws random numbers."""
    return any(isinstance(module, nn.Dropout) and module.p for module in network.modules())


def _now(function: Callable, *inputs) -> Tensor:
    return function(*inputs)


def _layers(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    attentions = block.attentions if getattr(block, "has_cross_attention", False) else [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _resnet(resnet: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    h = _call(resnet.conv1, _norm(resnet.norm1, x, silu=True))
    h = h + _call(resnet.time_emb_proj, emb)[:, :, None, None]
    h = _call(resnet.conv2, _norm(resnet.norm2, h, silu=True))
    return h + (x if resnet.conv_shortcut is None else _call(resnet.conv_shortcut, x))


def _attend(part: nn.Module, x: Tensor, transform: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    h, w = x.shape[-2:]
    tokens = _on_tokens(part.proj_in, _norm(part.norm, x, silu=False).flatten(2).transpose(1, 2), h)
    for block in part.transformer_blocks:
        tokens = transform(block, tokens)
    return repeated(x, len(tokens)) + _on_tokens(part.proj_out, tokens, h).transpose(1, 2).unflatten(2, (h, w))


def _transform(block: nn.Module, tokens: Tensor, text: Tensor, both: Mapping[Any, Any]) -> Tensor:
    """(B,N,C), (kB,L,D) -> (kB,N,C). both: of `_by_attention`."""
    self_attention, cross, normed = block.attn1, block.attn2, _layer_norm(block.norm1, tokens)
    k, v = _call(self_attention.to_k, normed), _call(self_attention.to_v, normed)
    tokens = tokens + _attention(self_attention, normed, k, v, rows=both.get(BORROW_SELF))
    tokens = repeated(tokens, len(text))
    k, v, *own = both[cross] if cross in both else (_call(cross.to_k, text), _call(cross.to_v, text))
    normed, rows = _layer_norm(block.norm2, tokens), both.get(BORROW_CROSS)
    image = both.get((cross, IMAGE_KEYS_VALUES))
    tokens = tokens + _attention(cross, normed, k, v, *own, rows=rows, watch=both[WATCH], image=image)
    a, gate = _call(block.ff.net[0].proj, _layer_norm(block.norm3, tokens)).chunk(2, -1)
    return tokens + _call(block.ff.net[2], a * F.gelu(gate))


def _attention(
    part: nn.Module, x: Tensor, k: Tensor, v: Tensor, own: Tensor | None = None, *, rows: Tensor | None = None,
    watch: Watch | None = None, image: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(B,N,C), keys and values (B,L,C) -> (B,N,C). rows (B,): those whose queries and keys read v; each row's read `own`.

    image: keys and values (B,I,C) that each row's queries read too (Ye et al. 2308.06721, eq. 5).
    """
    q, k, v = (each.unflatten(-1, (part.heads, -1)).transpose(1, 2) for each in (_call(part.to_q, x), k, v))
    if watch:
        watch(q, k)
    out = F.scaled_dot_product_attention(*((q, k) if rows is None else (q[rows], k[rows])), v)
    if own is not None:
        out = out + F.scaled_dot_product_attention(q, k, own.unflatten(-1, (part.heads, -1)).transpose(1, 2))
    if image:
        k, v = (each.unflatten(-1, (part.heads, -1)).transpose(1, 2) for each in image)
        out = out + F.scaled_dot_product_attention(q, k, v)
    return _call(part.to_out[0], out.transpose(1, 2).flatten(2))


def _on_tokens(layer: nn.Module, tokens: Tensor, height: int) -> Tensor:
    """A projection of (B,N,C), which is a linear layer in some bases and a 1x1 convolution in others."""
    if type(layer) is nn.Conv2d:
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)
    if isinstance(layer, nn.Linear) or isinstance(getattr(layer, "base_layer", None), nn.Linear):
        return _call(layer, tokens)
    return layer(tokens.transpose(1, 2).unflatten(2, (height, -1))).flatten(2).transpose(1, 2)  # an adapted convolution


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's function by torch's own call; quantized layers, and adapters other than plain LoRA, are called as they are."""
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight, layer.bias)
    if type(layer) is nn.Conv2d:
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    if not _is_lora(layer, x):
        return layer(x)
    (name,) = layer.active_adapters
    scale, low = layer.scaling[name], F.linear(x, layer.lora_A[name].weight)
    # PEFT scales the wide product instead, also by 1.
    return _call(layer.base_layer, x) + F.linear(low if scale == 1 else low * scale, layer.lora_B[name].weight)


def _is_lora(layer: nn.Module, x: Tensor) -> bool:
    """A linear layer of PEFT's with one active LoRA, of the simplest kind."""
    if type(getattr(layer, "base_layer", None)) is not nn.Linear or not getattr(layer, "lora_A", None):
        return False
    name, *others = layer.active_adapters or [""]
    if others or name not in layer.lora_A or layer.merged or layer.disable_adapters or layer.lora_variant:
        return False
    same = x.dtype == layer.lora_A[name].weight.dtype or torch.is_autocast_enabled(x.device.type)
    return same and type(layer.lora_dropout[name]) is nn.Identity and layer.lora_B[name].bias is None
