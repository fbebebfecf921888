"""Weights that are no numbers: one NaN draws black images without a word."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from personalize.common.errors import UserError


def require_finite(tensor: Tensor, what: str, remedy: str = "Download the file again, or make it anew.") -> None:
    """UserError where a tensor of any shape holds NaN or infinity; `what` names the file and the tensor."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.sum(dtype=torch.float32).isfinite():
        raise UserError(f"{what} holds a value that is not a finite number. {remedy}")


def require_finite_file(path: Path) -> None:
    """The same for every tensor of a `.safetensors`; SafetensorError for a damaged one.

    It is mapped for this alone and let go: a network that maps it too goes on taking memory only for what it uses.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            require_finite(file.get_tensor(name), f"{path}: tensor {name[:80]!r}")
