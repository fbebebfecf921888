"""A denoising diffusion GAN on Toyland's latents: its networks, its losses' parts, its sampler.

Xiao et al. 2112.07804: a step from z_t to z_s draws q(z_s | z_t, z0 = G(z_t, zlat, t)), and D(z_s, z_t, t) tells such pairs
from real ones. G begins as the base's U-Net, with its own latent zlat through a mapping network added to the time embedding; D
as the encoder half of the U-Net, with a head at each depth. Both are told the caption. Real pairs come from real latents, so
what guidance would do is in G already, and it is drawn without. `benchmarks.ddgan_training` trains it.

B images, C channels, h w latent size, P patches that D judges, Z width of zlat, E of the time embedding.
Not the paper's: G reads z_T as if from t = `FIRST_READ`, where the base takes noise for a scene; at T - 1 it ignores it. D sees
patches, at each depth.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common import checkpoint
from personalize.core import rng
from personalize.core.samplers import OnStep
from personalize.core.schedule import Schedule

FIRST_READ = 600
Z = 64
STATE = "ddgan.safetensors"


class Mapping(nn.Module):
    """zlat (B,Z) -> what is added to the time embedding (B,E). Without biases, so that zlat = 0 is the base."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((Z, width), (width, width), (width, out)))

    def forward(self, zlat: Tensor) -> Tensor:
        h = zlat
        for layer in self.layers[:-1]:
            h = F.leaky_relu(layer(h), 0.2) * 2
        return self.layers[-1](h) / 4  # at first a small part of the time embedding


def generator(unet: nn.Module) -> nn.Module:
    """A trainable copy of the base's U-Net that takes zlat as `class_labels`, whose embedding diffusers adds to that of t."""
    from diffusers.models.attention_processor import AttnProcessor

    network = copy.deepcopy(unet).float().requires_grad_(True)
    network.class_embedding = Mapping(256, network.time_embedding.linear_2.out_features)
    network.set_attn_processor(AttnProcessor())  # torch's own is slow backwards for so few tokens
    return network


def read_as(t: int, schedule: Schedule) -> int:
    return FIRST_READ if t == schedule.T - 1 else t


def generate_z0(network: nn.Module, schedule: Schedule, z_t: Tensor, t: int | list[int], text: Tensor, zlat: Tensor) -> Tensor:
    """z_t (B,C,h,w), its t (one, or B), text (B,L,D), zlat (B,Z) -> ẑ0 (B,C,h,w)."""
    times = [t] * len(z_t) if isinstance(t, int) else t
    rows = torch.tensor([read_as(each, schedule) for each in times], device=z_t.device)
    return schedule.to_z0(z_t, network(z_t, rows, text, class_labels=zlat, return_dict=False)[0], rows)


def posterior_draw(schedule: Schedule, z0: Tensor, z_t: Tensor, t: int, s: int, eps: Tensor) -> Tensor:
    """A draw of q(z_s | z_t, z0) from eps ~ N(0, 1), all (B,C,h,w)."""
    mean, variance = schedule.posterior(z0, z_t, t, s)
    return mean + math.sqrt(variance) * eps


class Discriminator(nn.Module):
    """z_s, z_t (B,C,h,w), s, t (B,), text -> logits (B,P): each patch, at each depth of the U-Net's encoder half.

    It begins as the base's features of z_s at noise level s; z_t and t enter through weights that begin as zeros.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        from diffusers.models.attention_processor import AttnProcessor

        unet = copy.deepcopy(unet).float().requires_grad_(True)
        unet.set_attn_processor(AttnProcessor())  # fused attention has no second derivative, which R1 takes
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.conv_in, self.down_blocks, self.mid_block = unet.conv_in, unet.down_blocks, unet.mid_block
        old, channels = self.conv_in.weight.data, unet.config.in_channels
        self.conv_in.weight = nn.Parameter(torch.cat([old, torch.zeros_like(old)], 1))
        self.conv_in.in_channels = 2 * channels
        width = self.time_embedding.linear_2.out_features
        self.before = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.before.weight)
        self.heads = nn.ModuleList(_head(n) for n in (*unet.config.block_out_channels, unet.config.block_out_channels[-1]))

    def forward(self, z_s: Tensor, z_t: Tensor, s: Tensor, t: Tensor, text: Tensor) -> Tensor:
        at_s, at_t = (self.time_embedding(self.time_proj(each).to(z_s.dtype)) for each in (s, t))
        emb = at_s + self.before(at_t)
        h, depths = self.conv_in(torch.cat([z_s, z_t], 1)), []
        for block in self.down_blocks:
            words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            h, skips = block(h, emb, **words)
            depths.append(skips[len(block.resnets) - 1])
        depths.append(self.mid_block(h, emb, encoder_hidden_states=text))
        logits = [head(h).flatten(1) for head, h in zip(self.heads, depths, strict=True)]
        most = max(each.shape[1] for each in logits)  # each depth weighs the same
        return torch.cat([each.repeat_interleave(most // each.shape[1], 1) for each in logits], 1)


def _head(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(8, channels), nn.Conv2d(channels, 96, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(96, 1, 1)
    )


def r1(critic: Callable[[Tensor], Tensor], z_s: Tensor) -> Tensor:
    """critic (B,...) -> logits (B,P); real z_s -> (B,): the squared gradient of each image's mean logit (1801.04406, eq. 9)."""
    z_s = z_s.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(z_s).mean(1).sum(), z_s, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def make_sampler(network: nn.Module, text: Tensor):
    """G for the prompts whose text (B,L,D) is given, as a row of SAMPLERS; the base's prediction is not asked."""

    def sample(
        guided,
        noise: Tensor,
        schedule: Schedule,
        steps: int,
        *,
        generators: list[torch.Generator],
        on_step: OnStep | None = None,
    ) -> Tensor:
        z, times = noise, schedule.timesteps(steps).tolist()
        for k, (t, s) in enumerate(zip(times, [*times[1:], -1], strict=True)):
            zlat = rng.normal(generators, (Z,)).to(z)
            z0 = generate_z0(network, schedule, z, t, text, zlat)
            z = posterior_draw(schedule, z0, z, t, s, rng.normal(generators, z.shape[1:]).to(z) if s >= 0 else z)
            if on_step is not None:
                on_step(k)
        return z

    return sample


def load(model, work: Path) -> nn.Module:
    """G's EMA as `train` left it in `work`."""
    parts, _ = checkpoint.load_state(work / STATE)
    network = generator(model.unet)
    network.load_state_dict(parts["ema"])
    return network.eval().requires_grad_(False)
