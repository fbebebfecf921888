"""Image prompts by an IP-Adapter (Ye et al. 2308.06721): tokens of images, which each cross-attention reads beside the text.

B rows, P images, I tokens of an image, D text width, C channels of an attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.common.untrusted import Many, Number, Table
from personalize.core.guidance import Cond
from personalize.formats.safetensors_io import load_tensors
from personalize.models import loading
from personalize.models.fast_unet import IMAGE_KEYS_VALUES, why_not_fast
from personalize.models.interface import LatentModel
from personalize.models.lazy_imports import lazy_imports

FOLDER = "ip_adapter"  # of a base that has an adapter of its own
ENCODER = "image_encoder"  # the folder beside an adapter's file, as in h94/IP-Adapter
LOOK = "preprocessor_config.json"  # beside the encoder's weights; without it images look as CLIP's do
_STATISTICS = Many(Number(-10, 10, real=True), 3, 3)
_LOOK = Table({"image_mean": _STATISTICS, "image_std": _STATISTICS}, needs=("image_mean", "image_std"))


@dataclass(frozen=True)
class ImagePrompt:
    """One row of keys and values (1,P·I,2C) for each attention; in `uncond` those of no image."""

    cond: Cond
    uncond: Cond

    def rows(self, count: int) -> tuple[Cond, Cond]:
        return tuple({name: kv.expand(count, -1, -1) for name, kv in part.items()} for part in (self.cond, self.uncond))


class ImageAdapter:
    """An adapter's file for the U-Net of a base, and the encoder that its images are read by.

    projection: the encoder's answer -> (P,I,D); keys_values: name of a cross-attention -> its weights (C,D) of each.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module, keys_values: dict[str, tuple[Tensor, Tensor]], look: dict):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = encoder.config.image_size
        self.encoder, self.projection, self.keys_values = encoder, projection, keys_values
        self.processor = CLIPImageProcessorPil(size=side, crop_size=side, **look)

    @torch.no_grad()
    def prompt(self, images: Sequence[Image.Image], scale: float) -> ImagePrompt:
        """P images of any size, whose middle squares are read. scale: of what they add to each attention, 1 as trained."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values.to(next(self.encoder.parameters()))
        if hasattr(self.projection, "image_embeds"):
            embedding = self.encoder(pixels).image_embeds
            parts = embedding, torch.zeros_like(embedding)
        else:  # of the "plus" and "full" kinds, whose tokens are of patches
            parts = (self.encoder(x, output_hidden_states=True).hidden_states[-2] for x in (pixels, torch.zeros_like(pixels)))
        return ImagePrompt(*(self._read(self.projection(part).flatten(0, 1)[None], scale) for part in parts))

    def _read(self, tokens: Tensor, scale: float) -> Cond:
        return {
            IMAGE_KEYS_VALUES + name: torch.cat([tokens @ k.T, scale * (tokens @ v.T)], -1)
            for name, (k, v) in self.keys_values.items()
        }


def load_image_adapter(model: LatentModel, file: Path | None = None) -> tuple[ImageAdapter, dict]:
    """The adapter in a .safetensors file, without one the base's own -> the adapter; its name and hash.

    The file is as h94/IP-Adapter has it, of the plain, "plus" or "full" kind, with a folder image_encoder beside it. UserError
    for one that is missing, damaged, of another kind, or made for another base.
    """
    if why := why_not_fast(model.unet):
        raise UserError(
            f"base {model.name!r} takes no image prompt, for {why} in its U-Net. Use a Stable Diffusion 1, 2 or XL base."
        )
    if file is None and not (own := sorted((model.folder / FOLDER).glob("*.safetensors"))):
        raise UserError(
            f"base {model.name!r} has no adapter for image prompts of its own. Give the file of one that was made for it, such "
            "as ip-adapter_sd15.safetensors of h94/IP-Adapter: --adapter FILE."
        )
    path = Path(file or own[0])
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_tensors(path, "an adapter for image prompts").items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{path} is no IP-Adapter: it has a tensor {name[:80]!r}. Give one of h94/IP-Adapter.")
        parts[part][rest] = tensor
    try:
        with lazy_imports():
            projection = _projection(model.unet, parts["image_proj"]).float().to(model.device)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: the projection of images cannot be read ({str(error).splitlines()[0][:200]}). Give an adapter of the "
            "plain, plus or full kind; those for faces need an encoder of faces."
        ) from None
    weights = _keys_values(model, parts["ip_adapter"], path)
    encoder, look = _encoder(path.parent, model)
    adapter = ImageAdapter(encoder, projection.eval().requires_grad_(False), weights, look)
    _require_fit(adapter, path)
    return adapter, {"file": path.name, "sha256": content_hash(path)}


def _projection(unet: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """One of diffusers' projections, told from the names and shapes of its tensors by the library itself."""
    if not {"proj.weight", "proj.3.weight", "latents"} & state.keys():
        raise ValueError("it has none of proj.weight, proj.3.weight, latents")
    return unet._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False)


def _keys_values(model: LatentModel, state: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross-attentions have the odd numbers, in the order of the U-Net's attentions."""
    names = [name.removesuffix(".processor") for name in model.unet.attn_processors]
    wanted = {name: model.unet.get_submodule(name) for name in names if name.endswith("attn2")}
    shapes = {
        f"{2 * k + 1}.{part}_ip.weight": tuple(getattr(attention, part).weight.shape)
        for k, attention in enumerate(wanted.values())
        for part in ("to_k", "to_v")
    }
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        wide = {tensor.shape[-1] for tensor in state.values() if tensor.ndim == 2}
        raise UserError(
            f"{path} was made for another base: {model.name!r} has {len(wanted)} attentions to the text, of width "
            f"{next(iter(shapes.values()))[1]}, and the file has keys for {len(state) // 2}, of width "
            f"{', '.join(map(str, sorted(wide))) or 'none'}. Give the adapter of this base's family."
        )
    kv = [state[name].to(model.device, torch.float32) for name in shapes]
    return {name: (kv[2 * k], kv[2 * k + 1]) for k, name in enumerate(wanted)}


def _encoder(folder: Path, model: LatentModel) -> tuple[nn.Module, dict]:
    """The vision tower beside an adapter, and the mean and deviation of the colours that it reads ({}: CLIP's)."""
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    if not (folder / ENCODER).is_dir():
        raise UserError(
            f"{folder} has no folder {ENCODER}: the encoder of images that the adapter was trained with. In h94/IP-Adapter "
            f"it is models/{ENCODER} or sdxl_models/{ENCODER}; put it beside the adapter's file."
        )
    encoder = loading.load_network(CLIPVisionModelWithProjection, folder, ENCODER, torch.float32).to(model.device)
    look = folder / ENCODER / LOOK
    said = read_json(look, _LOOK) if look.exists() else {}
    return encoder, {name: said[name] for name in _LOOK.fields if name in said}


def _require_fit(adapter: ImageAdapter, path: Path) -> None:
    """UserError where the encoder's answers are no input of the projection."""
    side = adapter.encoder.config.image_size
    try:
        adapter.prompt([Image.new("RGB", (side, side))], 1.0)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the encoder {path.parent / ENCODER} ({str(error).splitlines()[0][:120]}). Put the one that "
            "the adapter was trained with beside it."
        ) from None
