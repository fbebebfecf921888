"""The encoders that judge: a ViT for identity (DINO), a CLIP pair for content and prompts. They never train a subject.

B images, D dimensions, P = grid × grid patches, row by row. Everything runs in float32 and returns to the CPU. Weights
are read from safetensors only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.evaluation.preprocessing import IMAGENET, OPENAI, PLAIN, Preprocessing, center_crop, preprocess, resize
from personalize.models.lazy_imports import lazy_imports

BATCH = 64
DINO = "facebook/dino-vits16"
# The main branch holds pickled weights only; this is the hub's own conversion of them to safetensors.
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
STATISTICS = {IMAGENET: "ImageNet mean and std", OPENAI: "OpenAI CLIP mean and std", PLAIN: "mean and std 0.5"}


class IdentityEncoder(NamedTuple):
    """What one forward pass of DINO's ViT says of B images: token (B,D), the class token; patches (B,P,D)."""

    token: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Encoders:
    """Functions to embeddings, each row of length 1 in float32 on the CPU.

    dino        (B,3,H,W) in [-1,1] -> Identity
    clip_image  (B,3,H,W) in [-1,1] -> (B,E)
    clip_text   B texts -> (B,E)
    cover       masks (B,1,H,W) in [0,1] -> (B,P): the share of each of DINO's patches that an image's mask covers,
                after the resize and crop that DINO gives the image
    grid        patches of DINO per side
    names       "dino" and "clip" -> where the weights came from and the start of their SHA-256
    looks       "dino" and "clip" -> how images are shown to it, in one line
    """

    dino: Callable[[Tensor], IdentityEncoder]
    clip_image: Callable[[Tensor], Tensor]
    clip_text: Callable[[list[str]], Tensor]
    cover: Callable[[Tensor], Tensor]
    grid: int
    names: dict[str, str]
    looks: dict[str, str]


@dataclass(frozen=True)
class _Source:
    """Where an encoder comes from. kind: "dino" or "clip", also the name of its setting; place: folder or hub id."""

    kind: str
    place: str
    revision: str
    look: Preprocessing
    tokenizer: str = ""


@lru_cache(maxsize=1)
def load_encoders(base: Path, device: torch.device | str, *, dino: str = "", clip: str = "") -> Encoders:
    """The encoders for images of a base -> Encoders.

    A Toyland has its own in the folder `base`; all other bases share DINO ViT-S/16 and CLIP ViT-B/32. dino, clip: a
    folder, a hub id, or a hub id with @revision in their place. UserError for one that cannot be had or is of another kind.
    """
    folder = base.resolve()
    own = (folder / "encoders").is_dir()
    if own and not dino:
        of_dino = _Source("dino", str(folder / "encoders" / "identity"), "", PLAIN)
    else:
        of_dino = _source("dino", dino or DINO, IMAGENET)
    if own and not clip:
        of_clip = _Source("clip", str(folder / "encoders" / "clip"), "", PLAIN, str(folder / "tokenizer"))
    else:
        of_clip = _source("clip", clip or CLIP, OPENAI)
    vit, vit_name = _identity(of_dino, device)
    pair, words, clip_name = _clip(of_clip, device)

    side, clip_side = vit.config.image_size, pair.config.vision_config.image_size
    tokens = _eye(lambda pixels: vit(pixel_values=pixels).last_hidden_state, of_dino.look, side, device)

    def identity(images: Tensor) -> IdentityEncoder:
        every = tokens(images)
        return IdentityEncoder(every[:, 0], every[:, 1:])

    def image(pixels: Tensor) -> Tensor:
        return pair.visual_projection(pair.vision_model(pixel_values=pixels).pooler_output)

    return Encoders(
        dino=identity,
        clip_image=_eye(image, of_clip.look, clip_side, device),
        clip_text=_reader(pair, words, device),
        cover=lambda masks: _covered(masks, of_dino.look, side, vit.config.patch_size),
        grid=side // vit.config.patch_size,
        names={"dino": vit_name, "clip": clip_name},
        looks={"dino": _told(of_dino.look, side), "clip": _told(of_clip.look, clip_side)},
    )


def _source(kind: str, given: str, look: Preprocessing) -> _Source:
    place, _, revision = given.partition("@")
    if Path(given).expanduser().is_dir():
        place, revision = str(Path(given).expanduser()), ""
    return _Source(kind, place, revision, look, place)


def _identity(source: _Source, device: torch.device | str) -> tuple[nn.Module, str]:
    with lazy_imports():
        from transformers import ViTConfig, ViTModel

    config = _checked(source, ViTConfig, "a ViT")
    try:
        vit, found = ViTModel.from_pretrained(source.place, config=config, add_pooling_layer=False, **_weights(source))
    except _unloadable() as error:
        raise _refusal(source, error) from error
    return _finished(source, vit, found, device)


def _clip(source: _Source, device: torch.device | str):
    with lazy_imports():
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    config = _checked(source, CLIPConfig, "a CLIP model")
    try:
        words = CLIPTokenizer.from_pretrained(source.tokenizer, revision=source.revision or "main")
        pair, found = CLIPModel.from_pretrained(source.place, config=config, **_weights(source))
    except _unloadable() as error:
        raise _refusal(source, error) from error
    pair, name = _finished(source, pair, found, device)
    return pair, words, name


def _weights(source: _Source) -> dict:
    """Arguments of from_pretrained: safetensors only, no code from the hub, and tell what was not found."""
    return {
        "revision": source.revision or "main", "dtype": torch.float32, "use_safetensors": True,
        "trust_remote_code": False, "output_loading_info": True,
    }  # fmt: skip


def _checked(source: _Source, kind: type, wanted: str):
    """The encoder's config, of the right kind; a folder must also hold safetensors."""
    with lazy_imports():
        from transformers import AutoConfig

    folder = Path(source.place)
    if folder.is_absolute() and not folder.is_dir():
        raise _refusal(source, "there is no such folder")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise _refusal(source, "it holds no model.safetensors, and pickled weights (.bin, .pth) are never read")
    try:
        config = AutoConfig.from_pretrained(source.place, revision=source.revision or "main", trust_remote_code=False)
    except _unloadable() as error:
        raise _refusal(source, error) from error
    if not isinstance(config, kind):
        raise _refusal(source, f"it is of the kind {config.model_type!r}, where {wanted} is needed")
    return config


def _finished(source: _Source, model: nn.Module, found: dict, device: torch.device | str) -> tuple[nn.Module, str]:
    """Refuses weights that transformers would have filled with random numbers; names the encoder by its weights."""
    if found["missing_keys"]:
        raise _refusal(source, f"its weights lack {sorted(found['missing_keys'])[0]}")
    place = Path(source.place).name if Path(source.place).is_dir() else source.place
    name = encoder_name(place + (f"@{source.revision}" if source.revision else ""), model.state_dict())
    return model.to(device).eval().requires_grad_(False), name


def encoder_name(place: str, weights: Mapping[str, Tensor]) -> str:
    """Where weights on the CPU came from, and the start of their SHA-256: the same weights elsewhere have the same."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return f"{place} sha256:{digest.hexdigest()[:12]}"


def _short(look: Preprocessing, size: int) -> int:
    """Pixels of the short side before the crop to `size`."""
    return round(look.short * size)


def _told(look: Preprocessing, size: int) -> str:
    return f"short side {_short(look, size)} bicubic with antialias, centre crop {size}, {STATISTICS[look]}"


def _eye(encode: Callable[[Tensor], Tensor], look: Preprocessing, size: int, device) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def see(images: Tensor) -> Tensor:
        parts = [encode(preprocess(part.to(device), look, size)) for part in images.split(BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    return see


def _covered(masks: Tensor, look: Preprocessing, size: int, patch: int) -> Tensor:
    """(B,1,H,W) in [0,1] -> (B,P), through the resize and crop of `show`."""
    shown = center_crop(resize(masks.float(), _short(look, size)), size)
    return F.avg_pool2d(shown, patch).flatten(1)


def _reader(pair: nn.Module, words, device) -> Callable[[list[str]], Tensor]:
    longest = pair.config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        ids = words(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        return pair.text_projection(pair.text_model(input_ids=ids.to(device)).pooler_output)

    @torch.inference_mode()
    def read(texts: list[str]) -> Tensor:
        parts = [encode(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()

    return read


def _unloadable() -> tuple[type[Exception], ...]:
    """What transformers raises for a source that is absent, damaged or of another shape."""
    from safetensors import SafetensorError

    return (OSError, ValueError, RuntimeError, SafetensorError)


def _refusal(source: _Source, why: Exception | str) -> UserError:
    what = {"dino": "identity (DINO)", "clip": "CLIP"}[source.kind]
    reason = str(why).strip().split("\n")[0].rstrip(".")
    return UserError(
        f"cannot load the {what} encoder {source.place}: {reason}. Give a folder with its config.json and "
        f"model.safetensors, or another hub id: --set evaluate.{source.kind}=FOLDER"
    )
