"""Which latents of a VAE are used, and what they cost; N images, C channels, h w latent size."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personalize.common.files import read_json, write_json
from personalize.core import elbo

IMAGES = 4096  # enough for a variance over the images


def vae_usage(mean: Tensor, std: Tensor) -> dict:
    """Posteriors (N,C,h,w), not scaled to unit deviation -> numbers of latents and, channel by channel, what they cost.

    active: their means differ from image to image; used: by the rule of the linear VAE (`elbo.used_directions`). Where it is
    linear the two are the same ones, and kl_bits is linear_bits.
    """
    mean, std = mean.double(), std.double()
    bits = elbo.latent_term(mean, std) / math.log(2)
    by_channel = {
        "kl_bits": bits.mean((0, 2, 3)),
        "linear_bits": -0.5 * std.square().mean(0).log2().mean((1, 2)),
        "std": std.square().mean((0, 2, 3)).sqrt(),
    }
    counts = {"latents": mean[0].numel(), "active": elbo.active_units(mean).sum().item()}
    counts |= {"used": elbo.used_directions(std).sum().item()}
    return counts | {name: [round(x, 4) for x in values.tolist()] for name, values in by_channel.items()}


def keep_usage(path: Path, latents: np.ndarray, say: Callable[[str], None]) -> dict:
    """`vae_usage` of the first of `stages.latents` (N,2,C,h,w), kept in `path` and said once."""
    if not path.exists():
        usage = vae_usage(*torch.from_numpy(latents[:IMAGES].astype(np.float32)).unbind(1))
        write_json(path, usage)
        cost = sum(usage["kl_bits"]) / len(usage["kl_bits"])
        say(f"vae: {usage['active']} of {usage['latents']} latents are active, {cost:.2f} bits each")
    return read_json(path)
