"""What LoRA files call the layers of a base: one index from every known name to (part, layer).

A name is looked up, never split: `down_blocks_0_attentions_0` could be split in many ways, and only one of them is a layer
of the base.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from personalize.common.errors import UserError
from personalize.formats.ldm_unet import unet_layers, unet_names

Layer = tuple[str, str]  # part of the base, dotted name within it
LYCORIS = "lycoris_"  # of its wrapper, which takes one network and says nothing of which
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
# what a known spelling begins with: a layer that is unknown behind it is of another base
HEADS = (*(head for heads in KOHYA.values() for head in heads), "unet.", "text_encoder.", "text_encoder_2.")
COMFY = ("diffusion_model.", "model.diffusion_model.")  # before dotted names of the U-Net
BARE = "base_model.model."  # PEFT's own files
DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"
# LyCORIS' matrices, each a role of its own; formats/lycoris.py says what they are
FACTORS = (
    *(f"{head}_w{i}_{end}" for head in ("lokr", "hada") for i in "12" for end in "ab"),
    "lokr_w1",
    "lokr_w2",
    "lokr_t2",
    "hada_t1",
    "hada_t2",
)
WEIGHT, BIAS, UP_BIAS = "change of weight", "change of bias", "bias of the update"
# what a key of each role ends with; PEFT may put the adapter's name in: `lora_A.default_0.weight`
ENDINGS = {
    DOWN: re.compile(r"(\.lora_A(\.\w+)?|[._]lora[._]down|\.lora_linear_layer\.down)\.weight$"),
    UP: re.compile(r"(\.lora_B(\.\w+)?|[._]lora[._]up|\.lora_linear_layer\.up)\.weight$"),
    ALPHA: re.compile(r"\.alpha$"),
    MAGNITUDE: re.compile(r"\.(dora_scale|lora_magnitude_vector(\.\w+){0,2})$"),
    **{factor: re.compile(rf"\.{factor}$") for factor in FACTORS},
    WEIGHT: re.compile(r"\.(diff|w_norm)$"),
    BIAS: re.compile(r"\.(diff_b|b_norm)$"),
    UP_BIAS: re.compile(r"(\.lora_B(\.\w+)?|[._]lora[._]up)\.bias$"),
}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# What decides the names of SDXL's U-Net.
SDXL = {"block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10]}
SDXL |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
SDXL |= {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time"}


def split_key(key: str) -> tuple[str, str] | None:
    """A key of a LoRA file as (name of a layer, a role of ENDINGS), or None where it is not one."""
    found = ((ending.search(key), role) for role, ending in ENDINGS.items())
    return next(((key[: match.start()], role) for match, role in found if match), None)


def known_names(layers: Mapping[str, Collection[str]], *, first: str = "") -> dict[str, Layer]:
    """{name in a file: (part, layer)} of every layer in {part: layers}.

    A name without its part ("base_model.model.encoder…") may be of either of two text encoders; it is given to the part
    `first`, else to the one that comes first.
    """
    index: dict[str, Layer] = {}
    for part in sorted(layers, key=lambda part: part != first):
        original = unet_layers(layers[part]) if part == "unet" else {}
        for layer in sorted(layers[part]):
            forms = _forms(part, layer, original)
            heads = [f"{part}.", BARE, *(("", *COMFY) if part == "unet" else ())]
            names = [head + form for head in heads for form in forms]
            underscored = dict.fromkeys(form.replace(".", "_") for form in forms)
            names += [head + form for head in (*KOHYA.get(part, ()), LYCORIS) for form in underscored]
            for name in names:
                index.setdefault(name, (part, layer))
    return index


def layer_tails(layers: Mapping[str, Collection[str]]) -> set[str]:
    """Every layer's names without what programs write before them, with underscores: `mid_block_attentions_0_proj_in`."""
    originals = {part: unet_layers(layers[part]) if part == "unet" else {} for part in layers}
    forms = (form for part in layers for layer in layers[part] for form in _forms(part, layer, originals[part]))
    return {form.replace(".", "_") for form in forms}


def kohya_name(part: str, layer: str, *, sdxl: bool, original: Mapping[str, str]) -> str | None:
    """What kohya's trainer calls a layer, or None where it has no name. `original` is `unet_layers` of SDXL's U-Net."""
    if part == "unet":
        name = original.get(layer) if sdxl else layer
        return name and "lora_unet_" + name.replace(".", "_")
    head = {"text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    return head + with_text_model(layer).replace(".", "_")


def kohya_names(names: Iterable[str], *, family: str, unet: Collection[str] | None = None) -> dict[str, str]:
    """{`part.dotted.name`: kohya's name of the layer}. UserError for a layer that has none there."""
    assert family in ("sd", "sdxl"), family
    sdxl = family == "sdxl"
    original, found = unet_layers(unet or sdxl_layers()) if sdxl else {}, {}
    for name in names:
        part, _, layer = name.partition(".")
        key = kohya_name(part, layer, sdxl=sdxl, original=original)
        if key is None:
            raise UserError(f"the LoRA's layer {name} has no name in an SDXL file of kohya's: it was made for another base.")
        found[name] = key
    return found


def sdxl_layers() -> Iterable[str]:
    """The layers of the released SDXL's U-Net."""
    return {key.rpartition(".")[0] for key in unet_names(SDXL)}


def with_text_model(layer: str) -> str:
    """A text encoder's layer as files name it, whatever the installed transformers calls it."""
    return layer if layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"


def _forms(part: str, layer: str, original: Mapping[str, str]) -> list[str]:
    """The dotted names of a layer within its part; `original` has those of single files for the U-Net."""
    if part != "unet":
        return _text_forms(layer)
    return list(dict.fromkeys([*_unet_forms(layer), original.get(layer, layer)]))


def _unet_forms(layer: str) -> list[str]:
    """The layer, and its name before PEFT: `attn1.processor.to_q` for `attn1.to_q`, `to_out` for `to_out.0`."""
    old = re.sub(r"\b(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", layer)
    return list(dict.fromkeys((layer, old, old.replace(".processor.", "."))))


def _text_forms(layer: str) -> list[str]:
    bare = layer.removeprefix("text_model.")
    stem, _, last = bare.rpartition(".")
    old = [f"{stem}.{OLD_TEXT[last]}"] if last in OLD_TEXT else []
    return [f"{head}{form}" for form in [bare, *old] for head in ("text_model.", "")]
