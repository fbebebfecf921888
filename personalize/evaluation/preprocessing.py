"""Images as an encoder was trained to see them: short side, centre crop, mean and standard deviation.

B images, H W pixels. Public scores differ by what is left unsaid here; this is the published preprocessing of each
encoder (short side 256 for DINO's ViT-S/16, 224 for CLIP; bicubic with antialias; centre crop 224).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Preprocessing:
    """How images are shown to an encoder.

    short       short side in units of `crop`: 256 / 224 leaves a border out, 1 leaves only the longer side's ends out
    mean, std   of each colour, for pixels in [0,1]
    statistics  what mean and std are called
    """

    short: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    statistics: str

    def describe(self, crop: int) -> str:
        return f"short side {round(self.short * crop)} bicubic with antialias, centre crop {crop}, {self.statistics}"

    def square(self, pixels: Tensor, crop: int) -> Tensor:
        """(B,C,H,W) in [0,1]  ->  (B,C,crop,crop)."""
        return center_crop(resize(pixels, round(self.short * crop)), crop)

    def spread(self, squares: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse for marks: (B,C,crop,crop), (H, W)  ->  (B,C,H,W) by the nearest; 0 where `square` sees nothing."""
        height, width = size
        side = round(min(size) / self.short)
        marks = squares.new_zeros(*squares.shape[:2], height, width)
        top, left = (height - side) // 2, (width - side) // 2
        marks[..., top : top + side, left : left + side] = F.interpolate(squares, size=(side, side), mode="nearest-exact")
        return marks


IMAGENET = Preprocessing(256 / 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet mean and std")
OPENAI = Preprocessing(
    1.0, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "OpenAI CLIP mean and std"
)
PLAIN = Preprocessing(1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "mean and std 0.5")


def preprocess(images: Tensor, look: Preprocessing, crop: int) -> Tensor:
    """(B,3,H,W) in [-1,1]  ->  (B,3,crop,crop) normalised; float32 on the device of the images."""
    pixels = look.square((images.float() + 1) / 2, crop)
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (look.mean, look.std))
    return (pixels - mean) / std


def resize(pixels: Tensor, short: int) -> Tensor:
    """(B,3,H,W) in [0,1]  ->  the same with min(H,W) = short; bicubic with antialias as Pillow's, clipped to [0,1]."""
    height, width = pixels.shape[-2:]
    if min(height, width) == short:
        return pixels
    size = (max(short, height * short // width), max(short, width * short // height))
    out = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    # what is guided by an encoder keeps its gradient where bicubic overshoots; where nothing is, the bits are the clamp's
    return out + (out.clamp(0, 1) - out).detach() if out.requires_grad else out.clamp(0, 1)


def center_crop(pixels: Tensor, side: int) -> Tensor:
    """(B,3,H,W) with H, W >= side  ->  (B,3,side,side) from the middle."""
    height, width = pixels.shape[-2:]
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[..., top : top + side, left : left + side]
