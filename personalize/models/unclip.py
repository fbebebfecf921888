"""DALL·E 2 (Ramesh et al. 2204.06125) on a base: a prior from text to a CLIP image embedding, a decoder from that to images.

B rows, D dimensions of an embedding, L tokens of a prompt, W their width, F features of an image. An embedding is of length
sqrt(D), so that its numbers have a deviation of about one; CLIP's own have the length 1.

The decoder is the base's U-Net as it is. An embedding becomes L tokens in place of the prompt's, in the text encoder's own
states, so guidance, samplers and the unconditional prompt are the base's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.common.untrusted import Table, Text
from personalize.core import rng
from personalize.core.samplers import ddim
from personalize.core.schedule import cosine, from_betas
from personalize.formats.safetensors_io import load_tensors
from personalize.models import config_schema, loading
from personalize.models.interface import LatentModel
from personalize.models.lazy_imports import lazy_imports
from personalize.models.locate import weight_files

FOLDER, PRIOR, SAYS = "unclip", "prior", "unclip.json"  # of a base that has one; and in it
CLIP = "encoders/clip"  # of the base
PAIR, DECODER = "pair.safetensors", "decoder.safetensors"
STEPS = 25  # of the prior
GRID = 4  # cells a side, of what an image is read by
SCHEDULE = from_betas(cosine(1000), "sample", spacing="trailing")  # of the prior (2204.06125, section 2.2)
_SAYS = Table({"clip": Text(most=200)}, needs=("clip",))


def scaled(embeddings: Tensor) -> Tensor:
    """CLIP's (B,D) of any length -> of length sqrt(D)."""
    return F.normalize(embeddings, dim=-1) * math.sqrt(embeddings.shape[-1])


class Decoder(nn.Module):
    """What is told to the U-Net: e (B,D) -> tokens (B,L,W), by a residual MLP with a last layer of low rank."""

    def __init__(self, D: int, L: int, W: int, *, width: int = 512, rank: int = 256, depth: int = 3):
        super().__init__()
        self.enter = nn.Linear(D, width)
        self.blocks = nn.ModuleList(_block(width) for _ in range(depth))
        self.leave, self.basis = nn.Linear(width, rank), nn.Linear(rank, L * W)
        self.shape = L, W

    def coefficients(self, e: Tensor) -> Tensor:
        """(B,D) -> (B,rank), of the columns of `basis`."""
        x = self.enter(e)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)

    def forward(self, e: Tensor) -> Tensor:
        return self.basis(self.coefficients(e)).unflatten(1, self.shape)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


@dataclass(frozen=True)
class Texts:
    """B texts as a CLIP reads them. states (B,L,D): of each token, in the space of embeddings; mask (B,L): True where a token
    is one of the text; embeddings (B,D), of length sqrt(D)."""

    states: Tensor
    mask: Tensor
    embeddings: Tensor


class Pair(nn.Module):
    """The two heads of the embedding space, on frozen towers: features of an image (B,F) and states of a text's tokens."""

    def __init__(self, F: int, W: int, *, width: int = 256, D: int = 128):
        super().__init__()
        self.image = nn.Sequential(nn.Dropout(0.3), nn.Linear(F, width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, D))
        self.text = nn.Linear(W, D, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.5))  # log of what multiplies the cosine
        self.register_buffer("mean", torch.zeros(F))
        self.register_buffer("deviation", torch.ones(F))

    def image_head(self, features: Tensor) -> Tensor:
        return self.image((features - self.mean) / self.deviation)

    def of_images(self, model: LatentModel, pixels: Tensor, clip: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] and the base's CLIP embeddings of them -> (B,D)."""
        return scaled(self.image_head(torch.cat([unet_features(model, model.encode_images(pixels)[0]), scaled(clip)], 1)))

    def of_texts(self, hidden: Tensor, mask: Tensor) -> Texts:
        """As of `hidden_states`. The text's own embedding is the mean of its tokens', which are in the same space."""
        return Texts(self.text(hidden), mask, scaled(self.text(mean_of_tokens(hidden, mask))))


def hidden_states(model: LatentModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The text encoder's, (B,L,W), and (B,L): True from the first token of a text to its end."""
    (tokenizer,) = model.tokenizers.values()
    said = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return model.encode_prompts(texts)["text"], said["attention_mask"].bool().to(model.device)


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B,L,W), (B,L) -> (B,W)."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Prior:
    """network: diffusers' PriorTransformer, which predicts the clean embedding, less clip_mean, over clip_std."""

    def __init__(self, network: nn.Module):
        self.network = network

    def predict(self, z_t: Tensor, t: Tensor, texts: Texts) -> Tensor:
        """(B,D), (B,) -> z0 (B,D). The mask is always given: without one the network forgets that it is causal."""
        given = {"encoder_hidden_states": texts.states, "attention_mask": texts.mask, "proj_embedding": texts.embeddings}
        return self.network(z_t, t, **given).predicted_image_embedding

    def normalised(self, e: Tensor) -> Tensor:
        return (e - self.network.clip_mean) / self.network.clip_std

    @torch.inference_mode()
    def sample(self, texts: Texts, generators: list[Generator]) -> Tensor:
        """B texts, a generator for each -> embeddings (B,D) of images that they may be of."""
        noise = rng.normal(generators, (texts.embeddings.shape[1],)).to(texts.embeddings)

        def guided(z: Tensor, t: float) -> Tensor:
            return self.predict(z, torch.full((len(z),), int(t), device=z.device), texts)

        return scaled(self.network.post_process_latents(ddim(guided, noise, SCHEDULE, STEPS)))


@torch.no_grad()
def unet_features(model: LatentModel, z0: Tensor) -> Tensor:
    """Latents of images (B,C,h,w) -> (B,F): what the U-Net makes of them with the empty prompt and a little noise.

    Before its last upsampling it has to know what is to be seen (Xiang et al. 2303.09769). The noise is the same for every
    image.
    """
    unet, seen = model.unet, []
    block = unet.up_blocks[-2]
    parts = [block.resnets[-1], *(block.attentions[-1:] if getattr(block, "has_cross_attention", False) else ())]
    hooks = [part.register_forward_hook(lambda module, inputs, out: seen.append(out)) for part in parts]
    noise = torch.randn(z0.shape[1:], generator=rng.generator(0, "unclip/read")).to(z0)
    t = torch.full((len(z0),), model.schedule.T // 10, device=z0.device)
    text = model.encode_prompts([""])["text"].expand(len(z0), -1, -1)
    try:
        unet(model.schedule.add_noise(z0, noise.expand_as(z0), t), t, text)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [part[0] if isinstance(part, tuple) else part for part in seen]
    return torch.cat([F.adaptive_avg_pool2d(part, GRID).flatten(1) for part in maps], 1)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(B,D), (B,D), (B,) -> (B,D): from a (0) to b (1) on the sphere, at the length of a."""
    a, b = torch.broadcast_tensors(a, b)
    length, a, b = a.norm(dim=-1, keepdim=True), F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    share = share.view(-1, 1).to(a)
    near = angle.sin() < 1e-4  # where the arc is a straight line
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    arc = weights[0] * a + weights[1] * b
    return length * torch.where(near, F.normalize(torch.lerp(a, b, share), dim=-1), arc)


@dataclass(frozen=True)
class Unclip:
    """The part of a base. record: the hashes of its files."""

    pair: Pair
    prior: Prior
    decoder: Decoder
    record: dict[str, str]


def read_unclip(model: LatentModel) -> Unclip:
    """The base's own part. UserError where there is none, or one of another base."""
    folder = model.folder / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"base {model.name!r} draws from no CLIP embedding: there is no folder {FOLDER} in it. Use --base toyland, or "
            "train the part for a Toyland of your own: personalize pretrain BASE --part unclip."
        )
    if model.chunks > 1:
        raise UserError(f"prompt.chunks is {model.chunks}, and a CLIP embedding takes the place of one: give prompt.chunks=1.")
    with lazy_imports():
        from diffusers.models.transformers.prior_transformer import PriorTransformer
    if read_json(folder / SAYS, _SAYS)["clip"] != clip_hash(model):
        raise UserError(
            f"{folder} was trained with another CLIP than {model.folder / CLIP}. Restore that one, or train the part again: "
            "personalize pretrain BASE --part unclip."
        )
    read_json(folder / PRIOR / "config.json", config_schema.PRIOR)
    network = loading.load_network(PriorTransformer, folder, PRIOR, torch.float32)
    D, (L, W) = network.config.embedding_dim, sizes(model)
    pair = _module(model, folder / PAIR, lambda s: Pair(s["mean"].numel(), W, width=len(s["image.1.weight"]), D=D))
    decoder = _module(model, folder / DECODER, lambda s: Decoder(
        D, L, W, width=len(s["enter.weight"]), rank=len(s["leave.weight"]),
        depth=sum(name.startswith("blocks.") and name.endswith(".1.weight") for name in s),
    ))  # fmt: skip
    files = {"pair": PAIR, "decoder": DECODER, "prior": f"{PRIOR}/{weight_files(folder / PRIOR)[0].name}"}
    record = {name: content_hash(folder / file) for name, file in files.items()}
    return Unclip(pair, Prior(network.to(model.device)), decoder, record)


def _module(model: LatentModel, path: Path, make: Callable[[dict[str, Tensor]], nn.Module]) -> nn.Module:
    """A frozen module whose sizes `make` tells from the tensors of its file."""
    state = {name: value.float() for name, value in load_tensors(path, "a file of the part unclip").items()}
    try:
        module = make(state)
        module.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} is of another base than {model.name!r} ({reason}). Train the part again: personalize pretrain."
        ) from None
    return module.to(model.device).eval().requires_grad_(False)


def clip_hash(model: LatentModel) -> str:
    """Of the weights of the CLIP beside a base. UserError where it has none."""
    files = weight_files(model.folder / CLIP)
    if not files:
        raise UserError(f"{model.folder / CLIP} has no weights, and embeddings are those of this CLIP. Restore the folder.")
    return content_hash(files[0])


def sizes(model: LatentModel) -> tuple[int, int]:
    """L and W of a base."""
    (tokenizer,) = model.tokenizers.values()
    return tokenizer.model_max_length, model.unet.config.cross_attention_dim
