"""The part "unclip": DALL·E 2 (Ramesh et al. 2204.06125) in small, what `models.unclip` reads.

In three stages. The space of embeddings: see `unclip_pair`. An MLP learns to say an embedding in the base's own words: the text
encoder's hidden states of a caption that says all, always in the same order. The frozen base then draws what the embedding is
of. The prior is trained by itself, on embeddings alone.

N scenes, B of a step; D dimensions of an embedding, L tokens of width W.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common.files import make_folder, write_json
from personalize.common.settings import setting
from personalize.core import losses, rng
from personalize.formats.safetensors_io import load_tensors, save_tensors
from personalize.models import unclip
from personalize.models.interface import LatentModel
from personalize.toyland.pretraining import stages, unclip_pair
from personalize.toyland.pretraining.image_adapter import read_rows
from personalize.toyland.pretraining.pipeline import render_all
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import (
    ACTIONS,
    PLACES,
    Scene,
    accessory_words,
    colour_word,
    sample_scene,
    with_article,
)

SEED = 3 << 28  # of the first scene
RANK = 256  # of the canonical captions' hidden states
SEEN = 6_000  # captions by which the basis is found
TEXTS_AT_ONCE = 250
WORDS_LR, PRIOR_LR = 1e-3, 1e-3
BATCH = {"words": 256, "prior": 128}  # rows of a step
LAYERS, HEADS, HEAD = 3, 4, 32  # of the prior; HEAD: width of a head


@dataclass(frozen=True)
class Settings:
    pictures: int = setting(12_000, "scenes drawn")
    pair_steps: int = setting(1_000, "steps of 192 images with captions")
    words_steps: int = setting(2_000, "steps of 256 embeddings, to say them in words")
    prior_steps: int = setting(600, "steps of 128 embeddings")
    noise: float = setting(0.5, "deviation of what is added to an embedding: those of new images are off by as much", least=0)
    seed: int = setting(0, "seed of all randomness")


def scene_of(k: int) -> Scene:
    return sample_scene(SEED + k)


def canonical(scene: Scene) -> str:
    """Everything there is to say, in one order: "a blue dog jumping on the beach wearing a red hat"."""
    noun = with_article(f"{colour_word(scene.subject.body)} {scene.subject.class_word}")
    accessory = [accessory_words(scene.accessory)] if scene.accessory else []
    return " ".join([noun, ACTIONS[scene.action], PLACES[scene.place], *accessory])


def train(model: LatentModel, out: Path, work: Path, settings: Settings, say: Callable[[str], None]) -> None:
    """Writes pair, decoder and prior into `out`; each stage goes on from its file in `work`."""
    torch.manual_seed(settings.seed)
    images = render_all(work / "images.npy", scene_of, settings.pictures, model.size, say)
    latents = read_rows(work / "latents.npy", images, lambda x: torch.stack(model.encode_images(x), 1))
    features = unclip_pair.read_images(model, images, latents, work)
    hidden, said = unclip_pair.read_captions(model, scene_of, len(images), work)
    say(f"read {len(images)} images and captions")
    options = {"steps": settings.pair_steps, "seed": settings.seed, "say": say}
    pair = unclip_pair.train_pair(features, hidden, said, scene_of, work, **options)
    with torch.no_grad():
        embeddings = torch.cat([unclip.scaled(pair.image_head(part.float())) for part in features.split(TEXTS_AT_ONCE)])
    decoder = train_words(model, embeddings, work, settings, say)
    prior = train_prior(pair, embeddings, hidden, said, work, settings, say)
    export(out, model, pair, decoder, prior)


def train_words(
    model: LatentModel, embeddings: Tensor, work: Path, settings: Settings, say: Callable[[str], None]
) -> unclip.Decoder:
    """The decoder whose tokens are near the hidden states of the canonical captions; its loss is their unexplained share."""
    torch.manual_seed(settings.seed)
    mean, basis, coefficients = principal_states(model, len(embeddings), work / "canonical.safetensors", settings)
    decoder = unclip.Decoder(embeddings.shape[1], *unclip.sizes(model), rank=len(basis))
    decoder.basis.weight.data.copy_(basis.T)
    decoder.basis.bias.data.copy_(mean)
    decoder, variance = decoder.to(model.device), coefficients.square().sum(1).mean()

    def loss(step: int) -> Tensor:
        rows = stages.sample_rows(step, BATCH["words"], len(embeddings), seed=settings.seed, purpose="unclip/words")
        g = rng.generator(settings.seed, "unclip/words", step)
        e = embeddings[rows] + settings.noise * torch.randn(len(rows), embeddings.shape[1], generator=g)
        error = decoder.coefficients(unclip.scaled(e).to(model.device)) - coefficients[rows].to(model.device)
        return error.square().sum(1).mean() / variance

    said = nn.ModuleList([decoder.enter, decoder.blocks, decoder.leave])
    log = stages.loss_logger("unclip, words", settings.words_steps, say, every=250)
    train_stage(
        said, loss, work / "words.safetensors", steps=settings.words_steps, lr=WORDS_LR, muon=False, ema_decay=0.995, say=log
    )
    return decoder


@torch.no_grad()
def principal_states(model: LatentModel, count: int, path: Path, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the canonical captions of N scenes -> their mean (LW,), a basis (K,LW), coefficients (N,K), kept."""
    if not path.exists():

        def states(rows: Tensor) -> Tensor:
            return model.encode_prompts([canonical(scene_of(k)) for k in rows.tolist()])["text"].flatten(1).cpu()

        parts = torch.arange(count).split(TEXTS_AT_ONCE)
        some = torch.cat([states(rows) for rows in parts[: -(-SEEN // TEXTS_AT_ONCE)]])
        mean = some.mean(0)
        columns = torch.svd_lowrank(some - mean, q=min(RANK, len(some)), niter=4)[2]
        coefficients = torch.cat([(states(rows) - mean) @ columns for rows in parts])
        tensors = {"mean": mean, "basis": columns.T.contiguous(), "coefficients": coefficients}
        save_tensors(path, tensors)
    kept = load_tensors(path)
    return kept["mean"], kept["basis"], kept["coefficients"]


def train_prior(
    pair: unclip.Pair, embeddings: Tensor, hidden: Tensor, said: Tensor, work: Path, settings: Settings,
    say: Callable[[str], None],
) -> unclip.Prior:  # fmt: skip
    """The prior by the squared error of the clean embedding, that of its deviation 1."""
    torch.manual_seed(settings.seed)
    prior = unclip.Prior(prior_network(embeddings, L=said.shape[1]))
    T = unclip.SCHEDULE.T

    def loss(step: int) -> Tensor:
        rows = stages.sample_rows(step, BATCH["prior"], len(embeddings), seed=settings.seed, purpose="unclip/prior")
        g = rng.generator(settings.seed, "unclip/prior", step)
        z0, eps = prior.normalised(embeddings[rows]), torch.randn(len(rows), embeddings.shape[1], generator=g)
        t = stages.stratified_timesteps(len(rows), T, g)
        with torch.no_grad():
            texts = pair.of_texts(hidden[rows].float(), said[rows])
        out = prior.predict(unclip.SCHEDULE.add_noise(z0, eps, t), t, texts)
        return losses.denoising_loss(out, z0).mean()

    log = stages.loss_logger("unclip, prior", settings.prior_steps, say)
    train_stage(prior.network, loss, work / "prior.safetensors", steps=settings.prior_steps, lr=PRIOR_LR, muon=False,
        ema_decay=0.995, say=log)  # fmt: skip
    return prior


def prior_network(embeddings: Tensor, *, L: int, layers: int = LAYERS, heads: int = HEADS, head: int = HEAD):
    """diffusers' PriorTransformer for L tokens and embeddings (N,D), with their mean and deviation."""
    from diffusers import PriorTransformer

    network = PriorTransformer(
        num_attention_heads=heads, attention_head_dim=head, num_layers=layers, embedding_dim=embeddings.shape[1],
        num_embeddings=L,
    )  # fmt: skip
    network.clip_mean.requires_grad_(False).copy_(embeddings.mean(0, keepdim=True))
    network.clip_std.requires_grad_(False).copy_(embeddings.std(0, keepdim=True))
    return network


def export(out: Path, model: LatentModel, pair: unclip.Pair, decoder: unclip.Decoder, prior: unclip.Prior) -> None:
    """Files of the pair and of the decoder, prior/ as of diffusers; in half precision."""
    make_folder(out)
    for file, module in ((unclip.PAIR, pair), (unclip.DECODER, decoder)):
        state = {name: value.detach().cpu().half().contiguous() for name, value in module.state_dict().items()}
        save_tensors(out / file, state)
    prior.network.cpu().half().save_pretrained(out / unclip.PRIOR)
    write_json(out / unclip.SAYS, {"clip": unclip.clip_hash(model)})
