"""What a `.safetensors` of unknown origin is, told from its names and shapes, so that a wrong file is refused by what it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError
from personalize.formats.ldm import PREFIXES
from personalize.formats.lora_names import ALPHA, split_key

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = PREFIXES["sd1"]["unet"], PREFIXES["sd1"]["vae"]
CONV_IN = UNET + "input_blocks.0.0.weight"
# (part of a name, what the file is); the first match counts
UNSUPPORTED = (
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("double_stream_blocks.", "a HiDream model"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("motion_modules.", "an AnimateDiff motion module"),
    ("patchify_proj.", "a video model"),
    ("clip_txt_mapper.", "a Stable Cascade model"),
    ("text_encoders.clip_g.", "a Stable Diffusion 3 model"),
)
CHANNELS = {  # input channels of U-Nets of the same layout that take more than noise; 9, an inpainting one, are read
    8: "an editing model of the InstructPix2Pix kind (8 input channels)",
    7: "an upscaling model (7 input channels)",
    5: "a depth-to-image model (5 input channels)",
}
ADVICE = "A base is a Stable Diffusion 1.x, 2.x or SDXL checkpoint with U-Net, VAE and text encoders in one file."


def detect_family(shapes: Shapes, path: Path, *, needs_vae: bool = True) -> str:
    """ "sd1", "sd2" or "sdxl" of a single-file checkpoint {name: shape}. UserError says what else the file is."""
    if adapter := detect_adapter(shapes):
        raise _refused(path, adapter)
    if CONV_IN not in shapes:
        raise _refused(path, _without_unet(shapes))
    if purpose := more_than_noise(shapes[CONV_IN][1] if len(shapes[CONV_IN]) == 4 else 0):
        raise _refused(path, f"{purpose}, which personalize does not train")
    if "edm_mean" in shapes:
        raise _refused(path, "a model with EDM's noise schedule (Playground 2.5), which personalize does not train")
    if needs_vae and not _any(shapes, VAE):
        raise UserError(
            f"{path} is a checkpoint without a VAE (no name begins with {VAE}). Give one, a .safetensors file or a folder of "
            "diffusers: --set base_vae=FILE."
        )
    for family, prefixes in reversed(PREFIXES.items()):
        if all(_any(shapes, prefix) for part, prefix in prefixes.items() if part.startswith("text_encoder")):
            return family
    if _any(shapes, "conditioner.embedders.0.model."):
        raise _refused(path, "an SDXL refiner, which makes no image of its own")
    raise _refused(path, "a checkpoint without a text encoder (no name begins with cond_stage_model. or conditioner.)")


def more_than_noise(channels: Any) -> str:
    """What a U-Net with this number of input channels is for, or "" where it draws or inpaints by text."""
    return CHANNELS.get(channels, "") if isinstance(channels, int) else ""


def detect_adapter(shapes: Shapes) -> str:
    """ "a LoRA …" or "a textual-inversion embedding …" where the file is that, else ""."""
    roles = {split[1] for name in shapes if (split := split_key(name))}
    if roles - {ALPHA}:
        return "a LoRA, which changes a base and is not one itself"
    are_rows = all(len(shape) == 2 and shape[0] <= 256 for shape in shapes.values())
    are_few = 0 < len(shapes) <= 2 and not any(name.endswith((".weight", ".bias")) for name in shapes)
    return "a textual-inversion embedding, which adds a word to a base" if are_rows and are_few else ""


def _without_unet(shapes: Shapes) -> str:
    for mark, kind in UNSUPPORTED:
        if any(mark in name for name in shapes):
            return f"{kind}, which personalize does not train"
    if "input_blocks.0.0.weight" in shapes or ("conv_in.weight" in shapes and _any(shapes, "down_blocks.")):
        return "a U-Net alone; if it is of a diffusers folder, give that folder"
    if _any(shapes, VAE) or "decoder.conv_in.weight" in shapes:
        return "a VAE alone"
    if any("encoder.layers.0.self_attn." in name or "resblocks.0." in name for name in shapes):
        return "a text encoder alone"
    example = min(shapes, default="nothing")
    return f"of a layout unknown here: it has no {CONV_IN}, but {len(shapes)} tensors such as {example[:100]}"


def _any(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _refused(path: Path, kind: str) -> UserError:
    return UserError(f"{path} is {kind}. {ADVICE}")
