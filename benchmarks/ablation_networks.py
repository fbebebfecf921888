"""The networks of `benchmarks.ablation`: a quarter of Toyland's U-Net, and what some papers changed in one.

B images, C latent channels, h w latent size; z0 z_t known (B,C,h,w), t (B,) int64, text (B,L,D). They are here and not in the
package because plain diffusers draws with none of them but the first.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Generator, Tensor, nn

from benchmarks.ablation_data import Batch
from personalize.core import losses, rng
from personalize.core.guidance import Cond, Guided, cfg
from personalize.core.schedule import Schedule
from personalize.models.fast_unet import repeated
from personalize.toyland.pretraining import networks

CHANNELS = (48, 80, 80)  # half of Toyland's


class Plain(nn.Module):
    """The U-Net as it ships, but smaller."""

    CHANGES: ClassVar[dict[str, Any]] = {}

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        with torch.device("meta"):
            config = {key: value for key, value in networks.unet().config.items() if not key.startswith("_")}
        self.unet = UNet2DConditionModel(**config | {"block_out_channels": CHANNELS, "norm_num_groups": 16} | self.CHANGES)
        self.unet.set_attn_processor(AttnProcessor())

    def forward(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z_t, t, text).sample

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """(B,), of each image. generator: of what the network itself draws."""
        return losses.denoising_loss(self(batch.z_t, batch.t, batch.text), batch.target)

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What a step of sampling would use, if it were the only one."""
        return self(z_t, t, text)

    def guided(self, text: Tensor, empty: Tensor, scale: float) -> Guided:
        return cfg(self._predict, {"text": text}, {"text": empty}, scale)

    def _predict(self, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows = len(cond["text"])
        return self(repeated(z, rows), repeated(t, rows), cond["text"])


class SelfConditioned(Plain):
    """The z0 predicted before is 4 more input channels, zero where there is none (Chen et al. 2208.04202, section 3.1)."""

    CHANGES: ClassVar = {"in_channels": 2 * networks.LATENT_CHANNELS}
    known: Tensor | None = None

    def forward(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        known = torch.zeros_like(z_t) if self.known is None else repeated(self.known, len(z_t))
        return self.unet(torch.cat([z_t, known], 1), t, text).sample

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """In half of the steps z0 is predicted first, without gradient."""
        if torch.rand(1, generator=generator).item() < 0.5:
            return super().loss(batch, generator)
        with torch.no_grad():
            self.known = self.schedule.to_z0(batch.z_t, self(batch.z_t, batch.t, batch.text), batch.t)
        out = super().loss(batch, generator)
        self.known = None
        return out

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Twice, so that the steps stay a Markov chain, of which there is a bound."""
        self.known = self.schedule.to_z0(z_t, self(z_t, t, text), t)
        out, self.known = self(z_t, t, text), None
        return out

    def guided(self, text: Tensor, empty: Tensor, scale: float) -> Guided:
        plain, self.known = super().guided(text, empty, scale), None

        def guided(z: Tensor, t: Tensor | float) -> Tensor:
            out = plain(z, t)
            self.known = self.schedule.to_z0(z, out, t)
            return out

        return guided


class LinearAttention(Plain):
    """Self-attention whose cost is linear in tokens: q's softmax over features, k's over tokens (Shen et al. 1812.01243)."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        own = {name: part if "attn2" in name else _linear_attention for name, part in self.unet.attn_processors.items()}
        for name, part in self.unet.named_modules():
            if isinstance(part, Attention):
                part.processor = own[f"{name}.processor"]


def _linear_attention(attention: Attention, tokens: Tensor, **ignored) -> Tensor:
    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in layers)
    out = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


class LearnedVariance(Plain):
    """Variances between the smallest and the largest (Nichol & Dhariwal 2102.09672, eq. 15 and 16), the hybrid loss."""

    CHANGES: ClassVar = {"out_channels": 2 * networks.LATENT_CHANNELS}
    WEIGHT = 1e-3  # of the whole bound, which one timestep stands for T times

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        abar = schedule.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        beta = 1 - abar / before
        posterior = (1 - before) / (1 - abar) * beta
        posterior[0] = posterior[1]  # it is 0, of which there is no logarithm
        self.logs = torch.stack([posterior.log(), beta.log(), (before.sqrt() * beta / (1 - abar)).log()]).float()

    def forward(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z_t, t, text).sample.chunk(2, 1)[0]

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """The mean takes no gradient from the bound."""
        out, share = self.unet(batch.z_t, batch.t, batch.text).sample.chunk(2, 1)
        error = self.schedule.to_z0(batch.z_t, out.detach(), batch.t) - batch.z0
        bound = self._terms(error, share, batch.t).flatten(1).mean(1)
        return losses.denoising_loss(out, batch.target) + self.WEIGHT * self.schedule.T * bound

    def _terms(self, error: Tensor, share: Tensor, t: Tensor) -> Tensor:
        """Error of z0 and the network's v in [-1,1] -> nats of each latent of the step that leaves t; L_0 where t is 0."""
        smallest, largest, to_clean = (log[t].view(-1, 1, 1, 1) for log in self.logs)
        log_variance = torch.lerp(smallest, largest, (share + 1) / 2)
        square = error.square() * (2 * to_clean - log_variance).exp()
        first = 0.5 * (square + log_variance + math.log(2 * math.pi))
        later = 0.5 * (square + (smallest - log_variance).exp() - 1 + log_variance - smallest)
        return torch.where(t.view(-1, 1, 1, 1) == 0, first, later)

    def bound_terms(self, z0: Tensor, text: Tensor, timesteps: Sequence[int]) -> Tensor:
        """(B,) bits of a latent, of all steps by those that start at `timesteps`: (t + 1) L_t is straight over log(t + 1)."""
        generators, terms = [rng.generator(0, "ablation/variance", k) for k in range(len(z0))], []
        for t in timesteps:
            z_t, rows = self.schedule.add_noise(z0, rng.normal(generators, z0.shape[1:]), t), torch.full((len(z0),), t)
            out, share = self.unet(z_t, rows, text).sample.chunk(2, 1)
            terms.append(self._terms(self.schedule.to_z0(z_t, out, t) - z0, share, rows).double().flatten(1).mean(1))
        return sum_of_terms(timesteps, torch.stack(terms), self.schedule.T) / math.log(2)


class LearnedSinusoids(Plain):
    """The frequencies of the time embedding are learned, from a Gaussian (as in 2208.04202's code); t is 0 to 1."""

    CHANGES: ClassVar = {"time_embedding_type": "fourier", "time_embedding_dim": 4 * CHANNELS[0]}

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        self.unet.time_proj.weight.requires_grad_()

    def forward(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z_t, t / self.schedule.T, text).sample


def sum_of_terms(timesteps: Sequence[int], terms: Tensor, T: int) -> Tensor:
    """Terms (K,B) of K timesteps, the first of which is 0 -> (B,): that of t = 0 and the sum of those of 1 to T - 1."""
    known, wanted = np.log1p(timesteps[1:]), np.log1p(np.arange(1, T))
    columns = (terms[1:] * (torch.tensor(timesteps[1:])[:, None] + 1)).T.numpy()
    return terms[0] + torch.tensor([(np.interp(wanted, known, column) / np.arange(2, T + 1)).sum() for column in columns])
