"""Boxes that say what is to be where, beside the prompt: further input channels of a Toyland's U-Net.

B images, K classes, h w latent size. A plane (K,h,w) of a class is 1 where a box of it covers a latent cell, and a share where
it covers a part of the cell. The planes are concatenated to z_t (Rombach et al. 2112.10752, section 4.3.2, for maps of
classes); their weights begin at zero, so that the U-Net begins as the base exactly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from personalize.common.errors import UserError
from personalize.common.files import content_hash, read_json
from personalize.common.untrusted import Many, Table, Text
from personalize.formats.safetensors_io import load_tensors
from personalize.models.interface import LatentModel

FOLDER = "layout"  # of a base that has one
CONV_IN = "conv_in.safetensors"  # (C,K,3,3), the weights of the planes
LORA = "pytorch_lora_weights.safetensors"  # of the U-Net, beside it
PLANES = "layout.json"  # the classes of the planes, in their order
_PLANES = Table({"classes": Many(Text(most=60), 1, 1000)}, needs=("classes",))


def open_layout(model: LatentModel) -> tuple[Path, list[str], str]:
    """The layout part of a base -> its folder, the classes of its planes, and a hash. UserError where it has none."""
    folder = model.folder / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"base {model.name!r} reads no layout: there is no folder {FOLDER} in it. Toyland has one; for a "
            "Toyland of your own: personalize pretrain BASE --part layout."
        )
    return folder, read_json(folder / PLANES, _PLANES)["classes"], content_hash(folder / LORA)


def put_planes(model: LatentModel, folder: Path, classes: Sequence[str]) -> None:
    """Widens the U-Net's first layer for the planes. UserError where their weights are missing or of another base."""
    path, conv = folder / CONV_IN, model.unet.conv_in
    weight = load_tensors(path, "the weights of a layout").get("weight")
    expected = (conv.out_channels, len(classes), *conv.kernel_size)
    if weight is None or tuple(weight.shape) != expected:
        has = "none" if weight is None else f"the shape {tuple(weight.shape)}"
        raise UserError(f"{path} has weights of {has}, expected is {expected}. Make the part again: personalize pretrain.")
    model.unet.conv_in = widen(conv, weight)


class Box(NamedTuple):
    """Edges as shares of the image's width and height."""

    name: str
    x0: float
    y0: float
    x1: float
    y1: float


def planes(boxes: Sequence[Box], classes: Sequence[str], cells: tuple[int, int]) -> Tensor:
    """Boxes -> (K,h,w), for `cells` h and w."""
    out = torch.zeros(len(classes), *cells)
    for box in boxes:
        down, across = _covered(box.y0, box.y1, cells[0]), _covered(box.x0, box.x1, cells[1])
        k = classes.index(box.name)
        out[k] = torch.maximum(out[k], down[:, None] * across)
    return out


def _covered(low: float, high: float, cells: int) -> Tensor:
    """(cells,): the share of each that lies between two edges."""
    left = torch.arange(cells) / cells
    return (torch.minimum(torch.tensor(high), left + 1 / cells) - left.clamp(min=low)).clamp(min=0) * cells


def widen(conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """A first layer that also takes K planes, by their weights (C,K,3,3)."""
    K = weight.shape[1]
    wide = nn.Conv2d(conv.in_channels + K, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    both = torch.cat([conv.weight.detach(), weight.to(conv.weight)], 1)
    wide.weight, wide.bias = nn.Parameter(both, requires_grad=False), conv.bias
    return wide.to(conv.weight.device)
