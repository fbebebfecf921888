"""Images twice as large, by the upscaler of a base. B images, h w their size, px; pixels in [-1,1]."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from personalize.common.errors import UserError
from personalize.common.image_size import in_words
from personalize.core import rng
from personalize.core.samplers import ddim
from personalize.models.interface import LatentModel
from personalize.models.upscaler import FACTOR, Upscaler, load_upscaler, with_detail

STEPS = 1  # gives the mean of what may be there, which is the closest; more draw one of them, and are less close
AT_ONCE = 16  # images
PURPOSE = "upscale"  # of its random numbers


@dataclass(frozen=True)
class Upscaling:
    """An upscaler and how it is used. level: of noise that the small image gets before it is read, below `upscaler.levels`;
    0, none, was the best for each kind of image (docs/upscale.md)."""

    upscaler: Upscaler
    record: dict
    level: int = 0
    steps: int = STEPS

    @property
    def identity(self) -> dict:
        """All of it that decides an image, for its name and parameters."""
        noise = {"noise": self.level} if self.level else {}
        return {"upscale": {"factor": FACTOR, "steps": self.steps, **noise, **self.record}}

    def require_size(self, size: tuple[int, int], what: str) -> None:
        """UserError for an image whose width and height, px, are not those it was trained at."""
        edge = self.upscaler.size
        if size != (edge, edge):
            raise UserError(
                f"{what} is {size[0]}×{size[1]} px, and the upscaler takes {in_words((edge, edge))} px. Crop or shrink it to "
                "that, or use an image of this base."
            )

    def enlarge(self, images: Tensor, generators: list[Generator]) -> Tensor:
        """(B,3,h,w), a generator for each -> (B,3,2h,2w), by DDIM; image i depends on generator i alone."""
        parts = [slice(k, k + AT_ONCE) for k in range(0, len(images), AT_ONCE)]
        return torch.cat([self._at_once(images[rows], generators[rows]) for rows in parts])

    @torch.inference_mode()
    def _at_once(self, small: Tensor, generators: list[Generator]) -> Tensor:
        up = self.upscaler
        small = small.to(next(up.unet.parameters()).device, torch.float32)
        blur, noise = (rng.normal(generators, (c, *small.shape[-2:])).to(small) for c in (3, 3 * FACTOR**2))
        level = torch.full((len(small),), self.level, device=small.device)
        shown = up.noisy(small, level, blur)

        def guided(z: Tensor, t: float) -> Tensor:
            return up.predict(z, torch.full((len(z),), t, device=z.device), shown, level)

        return with_detail(small, ddim(guided, noise, up.schedule, self.steps)).clamp(-1, 1)


def open_upscaling(model: LatentModel, size: tuple[int, int]) -> Upscaling:
    """By the upscaler of a base, for images of this size that it draws. UserError where it has none, or for another size."""
    upscaling = Upscaling(*load_upscaler(model.folder, model.name, model.device))
    upscaling.require_size(size, "an image drawn at this --size")
    return upscaling
