"""The part `upscaler`: 64 px to 128 px, learned from scenes that are drawn at both (`models.upscaler` has its maths).

B images. Half of the small images are as drawn, half as the base's VAE shows them, because those are what the base draws.
Of each batch a share is pure noise, from which the best answer is the mean of all that may be there: one step of sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personalize.common.files import make_folder, writing
from personalize.common.settings import setting
from personalize.core import losses, rng
from personalize.core.schedule import from_betas, scaled_linear
from personalize.models.upscaler import COLOURS, FACTOR, NOISE_BETAS, Upscaler, detail
from personalize.toyland.pretraining import networks, pipeline, stages
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import sample_scene

SEED = 1 << 30  # of the first scene
LEVELS = 101  # noise levels of the small image, 0 (none) to 100 (a deviation of 0.17)
CHANNELS = (32, 64, 96)


@dataclass(frozen=True)
class Settings:
    pictures: int = setting(6_000, "scenes drawn at both sizes")
    steps: int = setting(1_200, "steps")
    batch: int = setting(8, "images of a step")
    lr: float = setting(5e-3, "learning rate of the matrices, by Muon", least=0)
    mean_share: float = setting(0.5, "of a batch that is pure noise", least=0, most=1)
    noisy_share: float = setting(0.3, "of a batch whose small image is made noisy", least=0, most=1)
    subject_weight: float = setting(0.5, "by how much more than the backdrop the subject counts; its accessory thrice")
    ema: float = setting(0.998, "decay of the EMA, which is what ships")
    seed: int = setting(0, "seed of all randomness")


def network(size: int = networks.SIZE, channels: tuple[int, ...] = CHANNELS):
    """UNet2DModel without attention, whose last layer is zero: at the last timestep it begins as bicubic interpolation."""
    from diffusers import UNet2DModel

    details = COLOURS * FACTOR**2
    unet = UNet2DModel(
        sample_size=size, in_channels=details + COLOURS, out_channels=details, block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
        layers_per_block=1, norm_num_groups=8, add_attention=False, num_class_embeds=LEVELS,
    )  # fmt: skip
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def train(model, out: Path, work: Path, settings: Settings, say: Callable[[str], None]) -> None:
    """Draws, shows the small images to the VAE of the base `model`, trains, and writes `out`."""
    torch.manual_seed(settings.seed)
    size = model.size
    large = pipeline.render_all(work / "large.npy", _scene, settings.pictures, FACTOR * size, say)
    small = pipeline.render_all(work / "small.npy", _scene, settings.pictures, size, say)
    shown = _through_vae(work / "decoded.npy", small, model, say)
    unet = network(size).to(model.device)
    upscaler = Upscaler(unet, networks.forward_process(), from_betas(scaled_linear(*NOISE_BETAS)))

    def loss(step: int) -> Tensor:
        rows = stages.sample_rows(step, settings.batch, len(large), seed=settings.seed, purpose="upscaler")
        return batch_loss(upscaler, _pair(large, small, shown, rows, step, settings), settings, step).mean()

    log = stages.loss_logger("upscaler", settings.steps, say)
    options = {"steps": settings.steps, "lr": settings.lr, "ema_decay": settings.ema, "save_seconds": 60.0}
    train_stage(unet, loss, work / "upscaler.safetensors", **options, say=log)
    export(out, unet.eval())


def batch_loss(upscaler: Upscaler, pair: tuple[Tensor, Tensor, Tensor], settings: Settings, step: int) -> Tensor:
    """Large (B,3,2h,2w), small (B,3,h,w), weights (B,1,h,w) -> (B,)."""
    large, small, weight = pair
    g = rng.generator(settings.seed, "upscaler/noise", step)
    z0, B = detail(large, small), len(large)
    eps, blur = torch.randn(z0.shape, generator=g), torch.randn(small.shape, generator=g)
    t = stages.stratified_timesteps(B, upscaler.schedule.T, g)
    t[torch.rand(B, generator=g) < settings.mean_share] = upscaler.schedule.T - 1
    level = torch.randint(1, upscaler.levels, (B,), generator=g) * (torch.rand(B, generator=g) < settings.noisy_share)
    z_t, target = upscaler.schedule.add_noise(z0, eps, t), upscaler.schedule.target(z0, eps, t)
    device = next(upscaler.unet.parameters()).device
    inputs = (z_t, t, upscaler.noisy(small, level, blur), level)
    out = upscaler.predict(*(x.to(device) for x in inputs))
    return losses.denoising_loss(out, target.to(device), weight.to(device))


def _scene(k: int):
    return sample_scene(SEED + k)


def _pair(large, small, shown, rows: Tensor, step: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    cpu = torch.device("cpu")
    decoded = torch.rand(len(rows), generator=rng.generator(settings.seed, "upscaler/decoded", step)) < 0.5
    low = torch.where(decoded.view(-1, 1, 1, 1), stages.pixels(shown, rows, cpu), stages.pixels(small, rows, cpu))
    weight = 1 + settings.subject_weight * stages.masks(small, rows, small.shape[1])
    return stages.pixels(large, rows, cpu), low, weight


def _through_vae(path: Path, images: np.ndarray, model, say: Callable[[str], None]) -> np.ndarray:
    """uint8 (N,h,w,4) -> (N,h,w,3), encoded and decoded, kept in `path`."""
    if not path.exists():
        parts = []
        for rows in torch.arange(len(images)).split(64):
            z0, _ = model.encode_images(stages.pixels(images, rows, torch.device("cpu")))
            decoded = model.decode_latents(z0).cpu().permute(0, 2, 3, 1)
            parts.append(((decoded + 1) * 127.5).round().clamp(0, 255).byte().numpy())
        with writing(path) as temporary:
            np.save(temporary, np.concatenate(parts))
        say(f"showed {len(images)} images to the VAE")
    return np.load(path, mmap_mode="r")


def export(out: Path, unet) -> None:
    """unet/, scheduler/ and low_res_scheduler/, as of diffusers; weights in half precision."""
    import copy

    from diffusers import DDPMScheduler

    make_folder(out)
    copy.deepcopy(unet).cpu().half().save_pretrained(out / "unet", max_shard_size=stages.MAX_SHARD_SIZE)
    networks.scheduler().save_pretrained(out / "scheduler")
    T, start, end = NOISE_BETAS
    low_res = DDPMScheduler(num_train_timesteps=T, beta_schedule="scaled_linear", beta_start=start, beta_end=end)
    low_res.save_pretrained(out / "low_res_scheduler")
