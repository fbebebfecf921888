"""The part "image-adapter": photos beside the prompt on Toyland, an IP-Adapter (Ye et al. 2308.06721) in the released format.

Two networks, one after the other. The encoder, a CLIP vision tower that begins as the base's, learns to read the individual off
one photo: its embedding is the mean of what the photo leaves open of class, colours, pattern, proportions and shapes, in
standard units, so no photo is the embedding 0. (Contrasted with captions a tower need not know them: no caption says them.)
Then it is frozen, and what its embeddings add to each cross-attention of the frozen U-Net is trained by the U-Net's own loss
on *another* scene of the same subject.

B images, A attributes, P photos, D text width, C channels of an attention.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.files import write_json, writing
from personalize.common.settings import setting
from personalize.core import losses, rng
from personalize.formats.safetensors_io import save_tensors
from personalize.models.fast_unet import IMAGE_KEYS_VALUES, fast_forward
from personalize.models.image_adapter import ENCODER, LOOK
from personalize.models.interface import LatentModel
from personalize.toyland import probes
from personalize.toyland.pretraining.pipeline import render_all
from personalize.toyland.pretraining.stages import loss_logger, masks, pixels, sample_rows
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import CLASSES, Scene, Subject, caption, colour_word, sample_scene, sample_subject

FILE = "ip-adapter.safetensors"
FIRST_SCENE = 10_000_000  # seeds of the scenes; the base has those that count up from 0
FIRST_PHOTO = 20_000_000
VIEWS, PHOTOS = 4, 2  # of a subject: scenes to draw, and photos, on which it stands and wears nothing
PHOTO_SHARE = 0.75  # of what the encoder learns from; the rest are scenes
TOKENS = 4  # of an image, as in the released plain kind
SHARES = {  # of the encoder's loss: where the two networks have to agree, the colours, counts most
    "class": 1, "pattern": 1, "ear": 0.5, "tail": 0.5, "body": 2, "second": 2, "detail": 2, "proportions": 1,
}  # fmt: skip
TEXT_DROPOUT, BOTH_DROPOUT = 0.05, 0.05
SUBJECT_WEIGHT = 9.0  # by how much more than the backdrop the subject counts; its accessory thrice
ENCODER_BATCH, ADAPTER_BATCH = 64, 32


@dataclass(frozen=True)
class Settings:
    """How long each stage is."""

    subjects: int = setting(12_000, "subjects drawn, each in four scenes and on two photos")
    encoder_steps: int = setting(1_600, "steps of 64 images before the encoder is frozen")
    adapter_steps: int = setting(900, "steps of 32 latents after that")
    seed: int = setting(0, "seed of all randomness")


def train(model: LatentModel, out: Path, work: Path, settings: Settings, say: Callable[[str], None]) -> None:
    """Writes image_encoder/ and ip-adapter.safetensors into `out`; each stage goes on from its file in `work`."""
    scenes = render_all(work / "pairs.npy", view_scene, settings.subjects * VIEWS, model.size, say)
    photos = render_all(work / "photos.npy", photo_scene, settings.subjects * PHOTOS, model.size, say)
    latents = read_rows(work / "latents.npy", scenes, lambda x: torch.stack(model.encode_images(x), 1))
    truth = attributes([sample_subject(k) for k in range(settings.subjects)])
    encoder = train_encoder(model, scenes, photos, truth, work, settings, say)
    embeddings = read_rows(work / "embeddings.npy", photos, lambda x: encoder(pixel_values=x.to(model.device)).image_embeds)
    adapter = train_adapter(model, scenes, latents, torch.from_numpy(embeddings), work, settings, say)
    export(out, encoder, adapter)


def view_scene(k: int) -> Scene:
    return sample_scene(FIRST_SCENE + k, subject=sample_subject(k // VIEWS))


def photo_scene(k: int) -> Scene:
    return sample_scene(FIRST_PHOTO + k, subject=sample_subject(k // PHOTOS), action="standing", accessory=None)


@torch.no_grad()
def read_rows(path: Path, images: np.ndarray, read: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What `read` makes of (B,3,H,H), of every image in half precision, kept in `path`."""
    if not path.exists():
        parts = torch.arange(len(images)).split(256)
        array = np.concatenate([read(pixels(images, rows, torch.device("cpu"))).cpu().half().numpy() for rows in parts])
        with writing(path) as temporary:
            np.save(temporary, array)
    return np.load(path)


def attributes(subjects: Sequence[Subject]) -> Tensor:
    """N subjects -> (N,A): what tells them apart, each column less its mean over its deviation."""
    rows = []
    for subject in subjects:
        kinds = {"class": CLASSES.index(subject.class_word)} | probes.kinds(subject)
        shares = [F.one_hot(torch.tensor(row), len(probes.TABLES[name])).float() for name, row in kinds.items()]
        rows.append(torch.cat([*shares, *(torch.tensor(value) for value in probes.values(subject).values())]))
    table = torch.stack(rows)
    return (table - table.mean(0)) / table.std(0).clamp(min=1e-3)


def columns() -> dict[str, int]:
    """The number of each attribute's columns, in their order."""
    return {name: len(probes.TABLES[name]) for name in ("class", "pattern", "ear", "tail")} | probes.VALUES


def train_encoder(
    model: LatentModel, scenes: np.ndarray, photos: np.ndarray, truth: Tensor, work: Path, settings: Settings,
    say: Callable[[str], None],
) -> nn.Module:  # fmt: skip
    """CLIPVisionModelWithProjection whose embedding (A,) is of `attributes`, by squared error."""
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    torch.manual_seed(settings.seed)
    clip = CLIPModel.from_pretrained(model.folder / "encoders" / "clip", dtype=torch.float32)
    config = clip.config.vision_config
    config.projection_dim = truth.shape[1]
    encoder = CLIPVisionModelWithProjection(config)
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    weight = torch.cat([torch.full((count,), SHARES[name] / count) for name, count in columns().items()])
    weight = (weight / weight.sum()).to(model.device)

    def loss(step: int) -> Tensor:
        x, who = _encoder_batch(scenes, photos, settings.seed, step)
        embedding = encoder(pixel_values=x.to(model.device)).image_embeds
        return ((embedding - truth[who].to(model.device)).square().mean(0) * weight).sum()

    train_stage(encoder.to(model.device), loss, work / "encoder.safetensors", steps=settings.encoder_steps, lr=1.5e-3,
        muon=False, ema_decay=0.995, say=loss_logger("image encoder", settings.encoder_steps, say))  # fmt: skip
    return encoder.eval().requires_grad_(False)


def _encoder_batch(scenes: np.ndarray, photos: np.ndarray, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Photos and scenes (B,3,H,H), half of them mirrored, and the number of each one's subject (B,)."""
    first, parts, who = round(PHOTO_SHARE * ENCODER_BATCH), [], []
    for images, count, views, kind in ((photos, first, PHOTOS, "photos"), (scenes, ENCODER_BATCH - first, VIEWS, "scenes")):
        rows = sample_rows(step, count, len(images), seed=seed, purpose=f"image encoder/{kind}")
        parts.append(pixels(images, rows, torch.device("cpu")))
        who.append(rows // views)
    x, mirrored = torch.cat(parts), torch.rand((ENCODER_BATCH, 1, 1, 1), generator=rng.generator(seed, "mirrored", step)) < 0.5
    return torch.where(mirrored, x.flip(3), x), torch.cat(who)


class Adapter(nn.Module):
    """The projection and, by the odd numbers of the released files, the keys and values of each cross-attention.

    It begins with the text's keys and no values, so that it adds nothing to the base.
    """

    def __init__(self, unet: nn.Module, width: int):
        from diffusers.models.embeddings import ImageProjection

        super().__init__()
        self.image_proj = ImageProjection(width, unet.config.cross_attention_dim, TOKENS)
        names = [name.removesuffix(".processor") for name in unet.attn_processors]
        self.names = {str(2 * k + 1): name for k, name in enumerate(name for name in names if name.endswith("attn2"))}
        self.ip_adapter = nn.ModuleDict()
        for number, name in self.names.items():
            text = unet.get_submodule(name).to_k
            keys, values = (nn.Linear(text.in_features, text.out_features, bias=False) for _ in range(2))
            keys.weight.data.copy_(text.weight)
            nn.init.zeros_(values.weight)
            self.ip_adapter[number] = nn.ModuleDict({"to_k_ip": keys, "to_v_ip": values})

    def forward(self, embeddings: Tensor) -> dict[str, Tensor]:
        """(B,P,A) -> keys and values (B,P·4,2C) by attention, for `fast_forward`."""
        tokens = self.image_proj(embeddings.flatten(0, 1)).unflatten(0, embeddings.shape[:2]).flatten(1, 2)
        return {
            IMAGE_KEYS_VALUES + self.names[number]: torch.cat([kv["to_k_ip"](tokens), kv["to_v_ip"](tokens)], -1)
            for number, kv in self.ip_adapter.items()
        }


def train_adapter(
    model: LatentModel, scenes: np.ndarray, latents: np.ndarray, embeddings: Tensor, work: Path, settings: Settings,
    say: Callable[[str], None],
) -> Adapter:  # fmt: skip
    """The U-Net's loss on a scene of a subject, told its caption and what one or two photos of it say."""
    torch.manual_seed(settings.seed)
    unet, schedule, device = model.unet.requires_grad_(False), model.schedule, model.device
    adapter = Adapter(unet, embeddings.shape[1]).to(device)

    def loss(step: int) -> Tensor:
        rows = sample_rows(step, ADAPTER_BATCH, len(scenes), seed=settings.seed, purpose="image adapter")
        g = rng.generator(settings.seed, "image adapter", step)
        mean, std = torch.from_numpy(latents[rows.numpy()]).float().unbind(1)
        z0, eps = mean + std * torch.randn(mean.shape, generator=g), torch.randn(mean.shape, generator=g)
        t = noisy_timesteps(len(rows), schedule.T, g)
        drop, count = torch.rand(len(rows), generator=g), 1 + step % PHOTOS
        read = embeddings[rows[:, None] // VIEWS * PHOTOS + torch.arange(count)].float()
        read = read * (drop >= BOTH_DROPOUT).view(-1, 1, 1)
        texts = ["" if d < BOTH_DROPOUT + TEXT_DROPOUT else _caption(k, step) for k, d in zip(rows.tolist(), drop)]
        with torch.no_grad():
            text = model.encode_prompts(texts)["text"]
        z_t, target = schedule.add_noise(z0, eps, t).to(device), schedule.target(z0, eps, t).to(device)
        out = fast_forward(unet, z_t, t.to(device), text, prepared=adapter(read.to(device)))
        weight = 1 + SUBJECT_WEIGHT * masks(scenes, rows, z0.shape[-1]).to(device)
        return losses.denoising_loss(out, target, weight).mean()

    train_stage(adapter, loss, work / "adapter.safetensors", steps=settings.adapter_steps, lr=2e-3, muon=False,
        ema_decay=0.99, say=loss_logger("image adapter", settings.adapter_steps, say))  # fmt: skip
    return adapter.eval().requires_grad_(False)


def noisy_timesteps(B: int, T: int, g: torch.Generator) -> Tensor:
    """(B,) in T/4..T-1, one in each Bth part, more of the noisier: where z_t shows the colours itself, photos add nothing."""
    u = (torch.arange(B) + torch.rand(B, generator=g)) / B
    return (T * (1 - 0.75 * u.pow(1.5))).long().clamp(max=T - 1)


def _caption(k: int, step: int) -> str:
    """A wording for the scene k that leaves the subject's colour to the photos."""
    scene = view_scene(k)
    named = f"{colour_word(scene.subject.body)} {scene.subject.class_word}"
    texts = (caption(scene, (step << 24) + k * 16 + n) for n in itertools.count())
    return next(text for text in texts if named not in text)


def export(out: Path, encoder: nn.Module, adapter: Adapter) -> None:
    """As h94/IP-Adapter has it: the encoder's folder, the colours it reads, and the adapter's file, in half precision."""
    encoder.cpu().half().save_pretrained(out / ENCODER)
    write_json(out / ENCODER / LOOK, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    names = {"image_proj.image_embeds": "image_proj.proj"}
    state = {
        next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name): value
        for name, value in adapter.state_dict().items()
    }
    save_tensors(out / FILE, {name: value.cpu().half().contiguous() for name, value in state.items()})
