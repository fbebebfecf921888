"""Weights that are no numbers: one NaN draws black images without a word."""

import torch
from torch import Tensor

from personalize.common.errors import UserError


def require_finite(tensor: Tensor, what: str, remedy: str = "Download the file again, or make it anew.") -> None:
    """UserError where a tensor of any shape holds NaN or infinity; `what` names the file and the tensor."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.sum(dtype=torch.float32).isfinite():
        raise UserError(f"{what} holds a value that is not a finite number. {remedy}")
