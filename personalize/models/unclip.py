"""DALL·E 2 (Ramesh et al. 2204.06125) on a base: a prior from text to a CLIP image embedding, a decoder from that to images.

B rows, D dimensions of an embedding, L tokens of a prompt, W their width, E width of the time embedding. An embedding is of
length sqrt(D), so that its numbers have a deviation of about one; CLIP's own have the length 1.

The decoder is the base's U-Net with a LoRA. An embedding becomes L tokens, which each cross-attention reads beside the
prompt's, and is projected into the time embedding. What a row is not told leaves its place to what it is: told neither, it has
the base's empty prompt twice, and attention to the same keys twice is the attention to them once.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.common.untrusted import Table, Text
from personalize.core import rng
from personalize.core.guidance import Cond
from personalize.core.samplers import ddim
from personalize.core.schedule import cosine, from_betas
from personalize.formats.safetensors_io import load_tensors
from personalize.models import loading
from personalize.models.fast_unet import TIME, why_not_fast
from personalize.models.interface import LatentModel
from personalize.models.lazy_imports import lazy_imports
from personalize.models.locate import weight_files

FOLDER, PRIOR, SAYS = "unclip", "prior", "unclip.json"  # of a base that has one; and in it
CLIP = "encoders/clip"  # of the base
DECODER, LORA = "decoder.safetensors", "pytorch_lora_weights.safetensors"
STEPS = 25  # of the prior
SCHEDULE = from_betas(cosine(1000), "sample", spacing="trailing")  # of the prior (2204.06125, section 2.2)
_SAYS = Table({"clip": Text(most=200)}, needs=("clip",))


def scaled(embeddings: Tensor) -> Tensor:
    """CLIP's (B,D) of any length -> of length sqrt(D)."""
    return F.normalize(embeddings, dim=-1) * math.sqrt(embeddings.shape[-1])


class Decoder(nn.Module):
    """What is told to the U-Net: e (B,D) -> tokens (B,L,W), by a residual MLP with a last layer of low rank; e -> (B,E)."""

    def __init__(self, D: int, L: int, W: int, E: int, *, width: int = 512, rank: int = 256, depth: int = 3):
        super().__init__()
        self.enter = nn.Linear(D, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave, self.basis = nn.Linear(width, rank), nn.Linear(rank, L * W)
        self.time = nn.Linear(D, E)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        self.shape = L, W

    def coefficients(self, e: Tensor) -> Tensor:
        """(B,D) -> (B,rank), of the columns of `basis`."""
        x = self.enter(e)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)

    def tokens(self, e: Tensor) -> Tensor:
        return self.basis(self.coefficients(e)).unflatten(1, self.shape)

    def tell(self, e: Tensor, text: Tensor | None = None) -> Cond:
        """(B,D), the prompts (B,L,W) or None -> a conditioning for `predict`."""
        tokens = self.tokens(e)
        return {"text": torch.cat([tokens if text is None else text, tokens], 1), TIME: self.time(e)}

    def tell_no_image(self, text: Tensor) -> Cond:
        """(B,L,W) -> the same conditioning as the base's own, in the form of `tell`."""
        return {"text": torch.cat([text, text], 1), TIME: text.new_zeros(len(text), self.time.out_features)}


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


@dataclass(frozen=True)
class Texts:
    """B texts as a CLIP reads them. states (B,L,D): of each token, in the space of embeddings; mask (B,L): True where a token
    is one of the text; embeddings (B,D), of length sqrt(D)."""

    states: Tensor
    mask: Tensor
    embeddings: Tensor

    def rows(self, which: Tensor) -> "Texts":
        return Texts(self.states[which], self.mask[which], self.embeddings[which])

    def float(self) -> "Texts":
        return Texts(self.states.float(), self.mask, self.embeddings.float())


def read_texts(pair: nn.Module, tokenizer, texts: list[str]) -> Texts:
    """By transformers' CLIPModel. What pools the last token's state is applied to each: the prior wants one width for all."""
    longest = pair.config.text_config.max_position_embeddings
    said = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
    out = pair.text_model(input_ids=said["input_ids"].to(pair.device))
    states, pooled = pair.text_projection(out.last_hidden_state), pair.text_projection(out.pooler_output)
    return Texts(states, said["attention_mask"].bool().to(pair.device), scaled(pooled))


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


def read_unclip(model: LatentModel) -> tuple[Decoder, Prior, dict]:
    """The base's own part -> decoder, prior, a record of it. Its LoRA is not in the U-Net yet.

    UserError where there is none, or one that is damaged or of another base.
    """
    folder = model.folder / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"base {model.name!r} draws from no CLIP embedding: there is no folder {FOLDER} in it. Use --base toyland, or "
            "train the part for a Toyland of your own: personalize pretrain BASE --part unclip."
        )
    if why := why_not_fast(model.unet):
        raise UserError(f"base {model.name!r} cannot be told a CLIP embedding, for {why} in its U-Net. Use --base toyland.")
    if model.chunks > 1:
        raise UserError(f"prompt.chunks is {model.chunks}, and a CLIP embedding takes the place of one: give prompt.chunks=1.")
    with lazy_imports():
        from diffusers.models.transformers.prior_transformer import PriorTransformer
    if read_json(folder / SAYS, _SAYS)["clip"] != clip_hash(model):
        raise UserError(
            f"{folder} was trained with another CLIP than {model.folder / CLIP}. Restore that one, or train the part again: "
            "personalize pretrain BASE --part unclip."
        )
    network = loading.load_network(PriorTransformer, folder, PRIOR, torch.float32)
    decoder = _decoder(model, folder / DECODER, network.config.embedding_dim)
    network, decoder = (part.to(model.device).eval().requires_grad_(False) for part in (network, decoder))
    files = {"decoder": folder / DECODER, "lora": folder / LORA, "prior": weight_files(folder / PRIOR)[0]}
    record = {name: content_hash(file) for name, file in files.items()}
    return decoder, Prior(network), record


def clip_hash(model: LatentModel) -> str:
    """Of the weights of the CLIP beside a base. UserError where it has none."""
    files = weight_files(model.folder / CLIP)
    if not files:
        raise UserError(f"{model.folder / CLIP} has no weights, and embeddings are those of this CLIP. Restore the folder.")
    return content_hash(files[0])


def _decoder(model: LatentModel, path: Path, D: int) -> Decoder:
    state = {name: value.float() for name, value in load_tensors(path, "a decoder of CLIP embeddings").items()}
    L, W, E = sizes(model)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    try:
        width, rank = len(state["enter.weight"]), len(state["leave.weight"])
        decoder = Decoder(D, L, W, E, width=width, rank=rank, depth=len(blocks))
        decoder.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} is of another base than {model.name!r} ({reason}). Train it again: personalize pretrain."
        ) from None
    return decoder


def sizes(model: LatentModel) -> tuple[int, int, int]:
    """L, W and E of a base."""
    (tokenizer,) = model.tokenizers.values()
    return tokenizer.model_max_length, model.unet.config.cross_attention_dim, model.unet.time_embedding.linear_2.out_features
