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
from personalize.common.files import read_json
from personalize.common.untrusted import Number, Table, Text, require_regular
from personalize.evaluation.preprocessing import IMAGENET, OPENAI, PLAIN, Preprocessing, preprocess
from personalize.models.lazy_imports import lazy_imports

BATCH = 64
DINO = "facebook/dino-vits16"
# The main branch holds pickled weights only; this is the hub's own conversion of them to safetensors.
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
# Beside a Toyland's identity encoder, by `python -m benchmarks.encoder --out FILE`: how often it agrees with the truth.
AGREEMENT = "agreement.json"
_SHARE = Number(0, 1, real=True)
_AGREEMENT = Table({"encoders": Table({"dino": Text()}, ("dino",)), "agreement": Table({"dino": _SHARE}, ("dino",))},
                   ("encoders", "agreement"))  # fmt: skip


class Identity(NamedTuple):
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
    spread      the inverse: (B,P), (H, W) -> (B,1,H,W), what the patches say of each pixel; 0 beyond what DINO sees
    grid        patches of DINO per side
    names       "dino" and "clip" -> where the weights came from and the start of their SHA-256
    looks       "dino" and "clip" -> how images are shown to it, in one line
    """

    dino: Callable[[Tensor], Identity]
    clip_image: Callable[[Tensor], Tensor]
    clip_text: Callable[[list[str]], Tensor]
    cover: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor, tuple[int, int]], Tensor]
    grid: int
    names: dict[str, str]
    looks: dict[str, str]


@dataclass(frozen=True)
class Clip:
    """A CLIP pair on its device, whose answers a gradient can follow; rows of any length.

    image  (B,3,H,W) -> (B,E); values may leave [-1,1]
    text   B texts -> (B,E)
    scale  its logit scale: log p is scale · cosine, but for a constant
    name   where the weights came from and the start of their SHA-256
    look   how images are shown to it, in one line
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]
    scale: float
    name: str
    look: str


@dataclass(frozen=True)
class _Source:
    """Where an encoder comes from. kind: "dino" or "clip", also the name of its setting; place: folder or hub id."""

    kind: str
    place: str
    revision: str
    look: Preprocessing
    tokenizer: str


@lru_cache(maxsize=1)
def load_encoders(
    base: Path, device: torch.device | str, *, dino: str = "", clip: str = "", make_network: Callable | None = None
) -> Encoders:
    """The encoders for images of a base -> Encoders.

    A Toyland has its own in the folder `base`; all other bases share DINO ViT-S/16 and CLIP ViT-B/32. dino, clip: a
    folder, a hub id, or a hub id with @revision in their place. UserError for one that cannot be had or is of another kind.
    `make_network` takes the place of loading in the memory estimate, which reads no text.
    """
    with lazy_imports():
        from transformers import ViTModel

    dino_source = _source("dino", dino, base.resolve() / "encoders" / "identity", DINO, IMAGENET)
    vit, vit_name = (make_network or _network)(dino_source, ViTModel, "a ViT", device, add_pooling_layer=False)
    pair = load_clip(base, device, clip=clip, make_network=make_network)
    side, patch = vit.config.image_size, vit.config.patch_size

    def tokens(images: Tensor) -> Tensor:
        return vit(pixel_values=preprocess(images.to(device), dino_source.look, side)).last_hidden_state

    def identity(images: Tensor) -> Identity:
        every = _embed(tokens, images)
        return Identity(every[:, 0], every[:, 1:])

    return Encoders(
        dino=identity,
        clip_image=lambda images: _embed(pair.image, images),
        clip_text=lambda texts: _embed(pair.text, texts),
        cover=lambda masks: F.avg_pool2d(dino_source.look.square(masks.float(), side), patch).flatten(1),
        spread=lambda patches, size: dino_source.look.spread(patches.float().unflatten(1, (1, side // patch, -1)), size),
        grid=side // patch,
        names={"dino": vit_name, "clip": pair.name},
        looks={"dino": dino_source.look.describe(side), "clip": pair.look},
    )


def load_clip(base: Path, device: torch.device | str, *, clip: str = "", make_network: Callable | None = None) -> Clip:
    """The CLIP of `load_encoders` alone, as what guides: its weights are frozen, and gradients pass through it."""
    with lazy_imports():
        from transformers import CLIPModel, CLIPTokenizer

    source = _source("clip", clip, base.resolve() / "encoders" / "clip", CLIP, OPENAI)
    pair, name = (make_network or _network)(source, CLIPModel, "a CLIP model", device)
    tokenizer = None if make_network else _load(source, CLIPTokenizer, source.tokenizer)
    side, longest = pair.config.vision_config.image_size, pair.config.text_config.max_position_embeddings

    def image(images: Tensor) -> Tensor:
        pixels = preprocess(images.to(device), source.look, side)
        return pair.visual_projection(pair.vision_model(pixel_values=pixels).pooler_output)

    def text(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        return pair.text_projection(pair.text_model(input_ids=ids.to(device)).pooler_output)

    scale = 1.0 if make_network else pair.logit_scale.exp().item()
    return Clip(image, text, scale, name, source.look.describe(side))


def encoder_name(place: str, weights: Mapping[str, Tensor]) -> str:
    """Where weights on the CPU came from, and the start of their SHA-256: the same weights elsewhere have the same."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return f"{place} sha256:{digest.hexdigest()[:12]}"


def truth_agreement(base: Path, name: str) -> float | None:
    """The share of pairs of images of which the identity encoder, by its name's hash, prefers the one that is nearer by truth.

    None where nobody measured it: for a base without a world, and for other weights than those that lie in the base.
    """
    path = base / "encoders" / "identity" / AGREEMENT
    found = read_json(path, _AGREEMENT) if path.exists() else None
    same = found and found["encoders"]["dino"].split()[-1:] == name.split()[-1:]
    return found["agreement"]["dino"] if same else None


@torch.inference_mode()
def _embed(encode: Callable, rows: Tensor | list[str]) -> Tensor:
    """Images or texts, BATCH at a time  ->  rows of length 1 in float32 on the CPU."""
    parts = [encode(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def _source(kind: str, given: str, own: Path, standard: str, look: Preprocessing) -> _Source:
    """What the setting gives; without it a Toyland's own, which lies at `own`, or else the standard one."""
    if not given and own.parent.is_dir():
        return _Source(kind, str(own), "", PLAIN, str(own.parents[1] / "tokenizer"))
    place, _, revision = (given or standard).partition("@")
    if Path(given or standard).expanduser().is_dir():
        place, revision = str(Path(given or standard).expanduser()), ""
    return _Source(kind, place, revision, look, place)


def _network(source: _Source, kind: type[nn.Module], wanted: str, device: torch.device | str, **options):
    """The network, and its name by its weights.

    UserError for a folder without safetensors, for another kind of network, and for weights that lack some:
    transformers would fill them with random numbers.
    """
    with lazy_imports():
        from transformers import AutoConfig

    folder = Path(source.place)
    if folder.is_absolute() and not folder.is_dir():
        raise _refusal(source, "there is no such folder")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise _refusal(source, "it holds no model.safetensors, and pickled weights (.bin, .pth) are never read")
    if folder.is_dir():
        read_json(folder / "config.json")
        for file in folder.glob("*.safetensors"):
            require_regular(file, "weight file")
    config = _load(source, AutoConfig, source.place, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise _refusal(source, "its config asks for another library by quantization_config")
    if not isinstance(config, kind.config_class):
        raise _refusal(source, f"it is of the kind {config.model_type!r}, where {wanted} is needed")
    options |= {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options["attn_implementation"] = "sdpa"  # a config could name code of the hub
    network, info = _load(source, kind, source.place, config=config, **options)
    if info["missing_keys"]:
        raise _refusal(source, f"its weights lack {sorted(info['missing_keys'])[0]}")
    place = folder.name if folder.is_dir() else source.place
    name = encoder_name(place + (f"@{source.revision}" if source.revision else ""), network.state_dict())
    return network.to(device).eval().requires_grad_(False), name


def _load(source: _Source, kind: type, place: str, **options):
    """`kind.from_pretrained`. UserError for a source that is absent, damaged or of another shape."""
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(place, revision=source.revision or "main", **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _refusal(source, error) from error


def _refusal(source: _Source, why: Exception | str) -> UserError:
    what = {"dino": "identity (DINO)", "clip": "CLIP"}[source.kind]
    reason = str(why).strip().split("\n")[0].rstrip(".")
    return UserError(
        f"cannot load the {what} encoder {source.place}: {reason}. Give a folder with its config.json and "
        f"model.safetensors, or another hub id: --set evaluate.{source.kind}=FOLDER"
    )
