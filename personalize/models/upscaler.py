"""The upscaler beside a base's U-Net: pixels twice as many, by diffusion over what bicubic interpolation misses.

B images, h w size of the small image, px; pixels in [-1,1]. z0 (B,12,h,w) is the large image less the bicubic one, each
2×2 px as channels (pixel-unshuffle; Shi et al. 1609.05158), so that it lies on the small image's own pixels, which the U-Net
is given beside z_t (super-resolution by concatenation: Rombach et al. 2112.10752, section 4.4). There is no VAE in between:
one with a quarter of the edges loses more of 128 px than bicubic interpolation of 64 px does (docs/upscale.md).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.core.schedule import Schedule
from personalize.models import loading
from personalize.models.config_schema import UPSCALER
from personalize.models.lazy_imports import lazy_imports
from personalize.models.locate import weight_files

FOLDER = "upscaler"  # of a base that has one
FACTOR = 2
COLOURS = 3
NOISE_BETAS = (1000, 1e-4, 0.02)  # scaled_linear, as low_res_scheduler of the released x4 upscaler
DETAIL_SCALE = 8.0  # of z0 against pixels: gives it a deviation of about one


@dataclass(frozen=True)
class Upscaler:
    """unet: UNet2DModel, (B,15,h,w), timesteps and noise levels (B,) -> v. noise: the schedule by which small images are
    made noisy, whose timestep is the noise level; at level 0 they are not."""

    unet: nn.Module
    schedule: Schedule
    noise: Schedule

    @property
    def size(self) -> int:
        """Edge of the small image, px."""
        return self.unet.config.sample_size

    @property
    def levels(self) -> int:
        """How many noise levels it knows, 0 among them."""
        return self.unet.config.num_class_embeds

    def noisy(self, small: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        """(B,3,h,w), (B,), noise (B,3,h,w) -> what the U-Net is shown: after pixels are in [-1,1], here and in training."""
        return torch.where(level.view(-1, 1, 1, 1) > 0, self.noise.add_noise(small, eps, level), small)

    def predict(self, z_t: Tensor, t: Tensor, shown: Tensor, level: Tensor) -> Tensor:
        """(B,12,h,w), (B,), `noisy` (B,3,h,w), (B,) -> v (B,12,h,w)."""
        return self.unet(torch.cat([z_t, shown], 1), t, class_labels=level).sample


def bicubic(small: Tensor) -> Tensor:
    """(B,3,h,w) -> (B,3,2h,2w), as Pillow interpolates."""
    return F.interpolate(small, scale_factor=FACTOR, mode="bicubic", antialias=True)


def detail(large: Tensor, small: Tensor) -> Tensor:
    """(B,3,2h,2w), (B,3,h,w) -> z0 (B,12,h,w)."""
    return DETAIL_SCALE * F.pixel_unshuffle(large - bicubic(small), FACTOR)


def with_detail(small: Tensor, z0: Tensor) -> Tensor:
    """(B,3,h,w), z0 (B,12,h,w) -> (B,3,2h,2w). The inverse of `detail`."""
    return bicubic(small) + F.pixel_shuffle(z0 / DETAIL_SCALE, FACTOR)


def load_upscaler(base: Path, name: str, device: torch.device) -> tuple[Upscaler, dict]:
    """The upscaler of the base in a folder -> itself; its record: the hash of its weights.

    UserError where the base has none, or one that is damaged or of another family.
    """
    with lazy_imports():
        from diffusers.models.unets.unet_2d import UNet2DModel
    folder = base / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"base {name!r} has no upscaler: there is no folder {FOLDER} in it. Use --base toyland, or make one for a Toyland "
            "of your own: personalize pretrain BASE --part upscaler."
        )
    if (index := folder / "model_index.json").exists():
        kind = str(read_json(index).get("_class_name"))[:60]
        raise UserError(
            f"{folder} is a {kind!r}, an upscaler of another family, which is not read here. Use it by diffusers, or make one "
            "of this package: personalize pretrain BASE --part upscaler."
        )
    read_json(folder / "unet" / "config.json", UPSCALER)
    unet = loading.load_network(UNet2DModel, folder, "unet", torch.float32).to(device)
    schedules = (loading.load_schedule(folder, part).to(device) for part in ("scheduler", "low_res_scheduler"))
    upscaler = Upscaler(unet, *schedules)
    if upscaler.levels > upscaler.noise.T:
        raise UserError(
            f"{folder} knows {upscaler.levels} noise levels, and its low_res_scheduler has {upscaler.noise.T}. "
            f"{UPSCALER.remedy}"
        )
    return upscaler, {"sha256": content_hash(weight_files(folder / "unet")[0])}
