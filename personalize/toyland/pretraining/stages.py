"""The stages of pretraining: tokenizer, VAE, latents, CLIP pair, identity encoder, U-Net, export.

B images; images are uint8 (N,H,H,4) of 64 or 128 px, colours and the subject's mask (`masks`); latents (N,2,4,16,16):
posterior mean and standard deviation.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from personalize.common.files import writing
from personalize.core import losses, rng
from personalize.core.schedule import Schedule
from personalize.formats.text_encoder import write_released_keys
from personalize.models.devices import bfloat16_autocast
from personalize.toyland.pretraining import networks
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import CLASSES, PLACES, VIEWS, caption, sample_scene, sample_subject

KL_WEIGHT = 1e-4  # of the ELBO, both terms taken as means: a pixel noise of 0.024 where all weigh the same
CAPTION_DROPOUT = 0.1
TEMPERATURE = 0.1
BODY = 85  # of 255, where the mask shows the subject itself; its accessory is 255, so it counts three times
MAX_SHARD_SIZE = "14MB"  # larger weights are written in parts


def tokenizer(settings):
    scenes = range(min(settings.pictures, 20_000))
    return networks.tokenizer([caption(sample_scene(k), k) for k in scenes])


def pixels(images: np.ndarray, rows: Tensor, device: torch.device) -> Tensor:
    """uint8 (N,H,H,4), rows (B,) -> (B,3,H,H) in [-1, 1]."""
    return torch.from_numpy(images[rows.numpy()][..., :3]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def masks(images: np.ndarray, rows: Tensor, cells: int) -> Tensor:
    """uint8 (N,H,H,4), rows (B,) -> (B,1,cells,cells): the subject's share of a cell, its accessory's thrice."""
    shares = torch.from_numpy(images[rows.numpy()][..., 3:]).permute(0, 3, 1, 2).float() / BODY
    return nn.functional.adaptive_avg_pool2d(shares, cells)


def sample_rows(step: int, batch: int, total: int, *, seed: int, purpose: str) -> Tensor:
    return torch.randint(0, total, (batch,), generator=rng.generator(seed, f"{purpose}/rows", step))


def stratified_timesteps(B: int, T: int, g: torch.Generator) -> Tensor:
    """(B,) uniform in 0..T-1, one in each Bth part of it: less chance in the loss (Kingma et al. 2107.00630, section I.1)."""
    return ((torch.arange(B) + torch.rand(B, generator=g)) * (T / B)).long().clamp(max=T - 1)


def vae(work: Path, images: np.ndarray, settings, device: torch.device, say: Callable[[str], None]):
    """The ELBO: squared error of the reconstruction plus KL to N(0, 1); noise is presumed lower where the subject is."""
    model = networks.vae(settings.size).to(device)

    def loss(step: int) -> Tensor:
        rows = sample_rows(step, 16 * settings.times, len(images), seed=settings.seed, purpose="vae")
        x, weight = pixels(images, rows, device), 1 + settings.subject_weight * masks(images, rows, settings.size).to(device)
        posterior = model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng.generator(settings.seed, "vae/noise", step))
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        reconstruction = model.decode(mean + std * noise.to(device)).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return losses.denoising_loss(reconstruction, x, weight).mean() + KL_WEIGHT * kl

    log, steps = loss_logger("vae", settings.vae_steps, say), settings.vae_steps
    train_stage(model, loss, work / "vae.safetensors", steps=steps, lr=8e-3, say=log, weight_decay=0.0, ema_decay=0.995)
    return model.eval()


def clip(work: Path, images: np.ndarray, tokenizer, settings, device: torch.device, say: Callable[[str], None]):
    """Images and captions, contrastively (Radford et al. 2103.00020).

    Two of three batches show one place only, or the backdrop alone would tell most images of a batch apart.
    """
    model = networks.clip(tokenizer, settings.size).to(device)
    places = torch.tensor([list(PLACES).index(sample_scene(k).place) for k in range(len(images))])
    place_rows = [(places == place).nonzero()[:, 0] for place in range(len(PLACES))]

    def loss(step: int) -> Tensor:
        rows = sample_rows(step, 128 * settings.times, len(images), seed=settings.seed, purpose="clip")
        if step % 3:
            same_place = place_rows[int(places[rows[0]])]
            rows = same_place[rows % len(same_place)]
        ids = tokenize(tokenizer, sample_captions(rows, step), device, padding="longest")
        text = model.text_projection(model.text_model(**ids).pooler_output)
        image = model.vision_model(pixel_values=pixels(images, rows, device)).pooler_output
        return contrastive_loss(model.visual_projection(image), text, model.logit_scale.exp())

    train_stage(model, loss, work / "clip.safetensors", steps=settings.clip_steps, lr=5e-3, ema_decay=0.995,
        say=loss_logger("clip", settings.clip_steps, say))  # fmt: skip
    return model.eval()


def contrastive_loss(a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """(B,D), (B,D) -> cross-entropy of finding each row's partner in the other by cosine, both ways, in float32."""
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * nn.functional.normalize(a.float(), dim=1) @ nn.functional.normalize(b.float(), dim=1).T
    partner = torch.arange(len(a), device=a.device)
    return (nn.functional.cross_entropy(logits, partner) + nn.functional.cross_entropy(logits.T, partner)) / 2


def identity(work: Path, pairs: np.ndarray, settings, device: torch.device, say: Callable[[str], None]):
    """Two scenes of one subject against other subjects of its class (InfoNCE, van den Oord et al. 1807.03748)."""
    model = networks.identity_encoder(settings.size).to(device)
    members = {c: [] for c in CLASSES}
    for k in range(len(pairs) // VIEWS):
        members[sample_subject(k).class_word].append(k)

    def loss(step: int) -> Tensor:
        g = rng.generator(settings.seed, "identity", step)
        pool = torch.tensor(members[CLASSES[step % len(CLASSES)]])
        subjects = pool[torch.randperm(len(pool), generator=g)[:64]]
        first = torch.randint(0, VIEWS, (len(subjects),), generator=g)
        other = (first + torch.randint(1, VIEWS, (len(subjects),), generator=g)) % VIEWS
        rows = torch.cat([subjects * VIEWS + first, subjects * VIEWS + other])
        return contrastive_loss(*model(pixels(pairs, rows, device)).last_hidden_state[:, 0].chunk(2), 1 / TEMPERATURE)

    train_stage(model, loss, work / "identity.safetensors", steps=settings.identity_steps, lr=5e-3, ema_decay=0.995,
        say=loss_logger("identity", settings.identity_steps, say))  # fmt: skip
    return model.eval()


@torch.no_grad()
def latents(work: Path, images: np.ndarray, model, device: torch.device, say: Callable[[str], None]):
    """The posterior of every image, (N,2,4,16,16) float16, and the factor that gives means a deviation of one."""
    path = work / "latents.npy"
    if not path.exists():
        start, parts = time.time(), []
        for rows in torch.arange(len(images)).split(256):
            with bfloat16_autocast(device):
                posterior = model.encode(pixels(images, rows, device)).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], 1).half().cpu().numpy())
        with writing(path) as temporary:
            np.save(temporary, np.concatenate(parts))
        say(f"encoded {len(images)} images in {time.time() - start:.0f} s")
    array = np.load(path)
    return array, round(1 / float(array[:, 0].astype(np.float32).std()), 5)


def unet(
    work: Path,
    images: np.ndarray,
    moments: np.ndarray,
    tokenizer,
    text,
    settings,
    device: torch.device,
    say: Callable[[str], None],
):
    """Latent diffusion (Rombach et al. 2112.10752) with caption dropout; `text` is frozen; its EMA is what ships."""
    from diffusers.models.attention_processor import AttnProcessor

    model, text = networks.unet().to(device), text.to(device).requires_grad_(False)
    if device.type == "cpu":
        model.set_attn_processor(AttnProcessor())  # a quarter of a step; torch's own is slow backwards for so few tokens
    schedule = networks.forward_process(settings.betas, settings.prediction)
    batch = partial(_noisy_batch, moments, 1 / float(moments[:, 0].astype(np.float32).std()), schedule, settings)

    def loss(guide, step: int) -> Tensor:
        rows, z_t, t, target, texts = batch(step)
        z_t, target, steps = z_t.to(device), target.to(device), t.to(device)
        with torch.no_grad():
            cond = text(**tokenize(tokenizer, texts, device)).last_hidden_state
        out = model(z_t, steps, cond).sample
        if guide:
            with torch.no_grad():
                guide_out = guide(z_t, steps, cond).sample
            has_caption = torch.tensor([bool(words) for words in texts]).view(-1, 1, 1, 1).to(device)
            target = losses.sharpened(target, out.float(), guide_out.float(), settings.guide_scale * has_caption)
        weight = 1 + settings.subject_weight * masks(images, rows, networks.LATENT).to(device)
        losses_per_image = losses.denoising_loss(out, target, weight)
        if settings.min_snr:
            snr_weight = losses.min_snr_weight(schedule.snr(t), settings.min_snr, settings.prediction)
            losses_per_image = losses_per_image * snr_weight.to(device)
        return losses_per_image.mean()

    def train(name: str, first: int, steps: int, guide=None) -> None:
        train_stage(model, lambda step: loss(guide, first + step), work / f"{name}.safetensors", steps=steps, lr=1e-3,
            muon=False, ema_decay=settings.ema, say=loss_logger(name, steps, say))  # fmt: skip

    guide = None
    if settings.guide_steps:  # the EMA after these guides the rest by its mistakes (`losses.sharpened`)
        train("guide", 0, settings.guide_steps)
        guide = copy.deepcopy(model).requires_grad_(False)
    train("unet", settings.guide_steps, settings.unet_steps, guide)
    return model.eval()


def _noisy_batch(moments: np.ndarray, scale: float, schedule: Schedule, settings, step: int):
    """A step of the U-Net -> rows (B,), z_t (B,4,16,16), t (B,), target (B,4,16,16), captions; all on the CPU."""
    rows = sample_rows(step, 64 * settings.times, len(moments), seed=settings.seed, purpose="unet")
    g = rng.generator(settings.seed, "unet/noise", step)
    mean, std = torch.from_numpy(moments[rows.numpy()]).float().unbind(1)
    z0 = scale * (mean + std * torch.randn(mean.shape, generator=g))
    eps, t = torch.randn(mean.shape, generator=g), stratified_timesteps(len(rows), schedule.T, g)
    keep_caption = torch.rand(len(rows), generator=g) >= CAPTION_DROPOUT
    texts = [text if keep else "" for text, keep in zip(sample_captions(rows, step), keep_caption, strict=True)]
    return rows, schedule.add_noise(z0, eps, t), t, schedule.target(z0, eps, t), texts


def sample_captions(rows: Tensor, step: int) -> list[str]:
    """Worded anew at every step."""
    return [caption(sample_scene(k), (step << 8) + i) for i, k in enumerate(rows.tolist())]


def tokenize(tokenizer, texts: list[str], device: torch.device, padding: str = "max_length") -> dict[str, Tensor]:
    ids = tokenizer(texts, padding=padding, truncation=True, max_length=networks.MAX_LENGTH, return_tensors="pt")
    return {"input_ids": ids["input_ids"].to(device)}


def loss_logger(stage: str, steps: int, say: Callable[[str], None], every: int = 50) -> Callable[[int, float], None]:
    """A callback that logs the mean loss, the seconds a step and the time left every `every` steps."""
    recent: list[float] = []
    start = [time.time()]

    def log(step: int, loss: float) -> None:
        recent.append(loss)
        if step % every == 0 or step == steps:
            seconds, mean = (time.time() - start[0]) / len(recent), sum(recent) / len(recent)
            say(f"{stage} {step}/{steps}  loss {mean:.4f}  {seconds:.2f} s/step  {seconds * (steps - step):.0f} s left")
            recent.clear()
            start[0] = time.time()

    return log


def export(out: Path, settings, tokenizer, vae, text, unet, clip, identity) -> None:
    """A diffusers folder in half precision, no file above PART, and encoders/clip, encoders/identity beside it."""
    from diffusers import StableDiffusionPipeline

    for model in (vae, text, unet, clip, identity):
        model.cpu().half()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=networks.scheduler(settings.betas, settings.prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)
    write_released_keys(out / "text_encoder")
    for name, model in (("clip", clip), ("identity", identity)):
        model.save_pretrained(out / "encoders" / name)
    for folder in (out / "text_encoder", out / "encoders" / "clip", out / "encoders" / "identity"):
        _load_as_float32(folder / "config.json")
    tokenizer_files(out / "tokenizer", tokenizer)


def _load_as_float32(config: Path) -> None:
    """Half precision on disk only: transformers loads a model in the type that its config names."""
    import json

    text = json.loads(config.read_text())
    config.write_text(json.dumps(text | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def tokenizer_files(folder: Path, tokenizer) -> None:
    """vocab.json and merges.txt, which other tools read and transformers 5 no longer writes."""
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
