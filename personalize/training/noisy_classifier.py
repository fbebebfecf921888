"""A classifier of noisy latents, log p(class | z_t), for classifier guidance (Dhariwal & Nichol 2105.05233): seconds to train.

B images, C latent channels, h w latent size, K classes; z_t (B,C,h,w), t (B,), logits (B,K).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.core import rng
from personalize.core.schedule import Schedule
from personalize.core.steering import Gradient, ascent
from personalize.formats.safetensors_io import load_tensors, read_header, save_tensors
from personalize.models.devices import to_device

STEPS, WIDTH, LR = 300, 32, 2e-3
ROWS = (40, 24)  # class images and photos of a step
SUBJECT = 1  # its place among the two classes
MAP = 4  # cells a side that the head reads, whatever the size of the latents
EMBEDDED = 64  # numbers that t is written as
Group = tuple[Tensor, Tensor | None]  # latents of a class: mean (N,C,h,w) and, where it is known, standard deviation


class NoisyClassifier(nn.Module):
    """(B,C,h,w), t (B,) -> logits (B,K). No layer mixes rows, so that a row's gradient does not depend on its batch."""

    def __init__(self, channels: int, classes: int, width: int = WIDTH):
        super().__init__()
        widths = [channels, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (k > 0), 1) for k, (a, b) in enumerate(zip(widths, widths[1:])))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.films = nn.ModuleList(nn.Linear(EMBEDDED, 2 * b) for b in widths[1:])
        self.head = nn.Linear(widths[-1] * MAP**2, classes)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        x = z_t.float()
        rates = torch.exp(torch.arange(EMBEDDED // 2, device=x.device) * (-math.log(10_000) / (EMBEDDED // 2)))
        angles = t.float()[:, None] * rates
        time = torch.cat([angles.sin(), angles.cos()], 1)
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            gain, shift = film(time)[:, :, None, None].chunk(2, 1)
            x = F.silu(norm(conv(x)) * (1 + gain) + shift)
        return self.head(F.adaptive_avg_pool2d(x, MAP).flatten(1))


def train_classifier(
    groups: Sequence[Group], schedule: Schedule, *, rows: Sequence[int], seed: int, advance: Callable, steps: int = STEPS,
    width: int = WIDTH,
) -> NoisyClassifier:  # fmt: skip
    """K groups of latents on one device -> their classifier there; step k and the start are functions of `seed` alone.

    rows: images of each class in a step. Cross-entropy, t stratified; latents are shifted by up to a cell, for a handful of
    photos has few places.
    """
    device, channels = groups[0][0].device, groups[0][0].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.generator(seed, "classifier").initial_seed())
        network = NoisyClassifier(channels, len(groups), width)
    network = network.to(device).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    wanted = torch.cat([torch.full((count,), k) for k, count in enumerate(rows)]).to(device)
    for step in range(steps):
        g = rng.generator(seed, "classifier/step", step)
        z0 = torch.cat([_draw(group, count, g) for group, count in zip(groups, rows, strict=True)])
        B, T = len(z0), schedule.T
        t = ((torch.randperm(B, generator=g) + torch.rand(B, generator=g)) * (T / B)).long().clamp(max=T - 1)
        t, eps = to_device(t, device), to_device(torch.randn(z0.shape, generator=g), device)
        optimizer.zero_grad()
        F.cross_entropy(network(schedule.add_noise(z0, eps, t), t), wanted).backward()
        optimizer.step()
        advance()
    return network.eval().requires_grad_(False)


def _draw(group: Group, count: int, g: torch.Generator) -> Tensor:
    """`count` latents of a class, each from its posterior and shifted by -1, 0 or 1 cells along both sides."""
    mean, std = group
    which = torch.randint(0, len(mean), (count,), generator=g)
    shifts = torch.randint(-1, 2, (count, 2), generator=g).tolist()
    noise = to_device(torch.randn((count, *mean.shape[1:]), generator=g), mean.device)
    which = to_device(which, mean.device)
    z0 = mean[which] if std is None else mean[which] + std[which] * noise
    return torch.stack([z.roll(shift, (-2, -1)) for z, shift in zip(z0, shifts, strict=True)])


def log_probability(network: NoisyClassifier, z_t: Tensor, t: float, wanted: int | Tensor) -> Tensor:
    """(B,C,h,w), one t, a class or (B,) classes -> (B,) log p(wanted | z_t), float32."""
    scores = network(z_t, torch.full((len(z_t),), float(t), device=z_t.device)).log_softmax(-1)
    return scores[:, wanted] if isinstance(wanted, int) else scores.gather(1, wanted[:, None])[:, 0]


def class_gradient(network: NoisyClassifier, wanted: int | Tensor) -> Gradient:
    """What `core.steering.classified` takes: the gradient of log p(wanted | z_t)."""
    return ascent(lambda z_t, t: log_probability(network, z_t, t, wanted))


def save_classifier(path: Path, network: NoisyClassifier, key: str) -> None:
    """One `.safetensors` file. key: of all that it was trained on."""
    tensors = {name: weight.cpu().contiguous() for name, weight in network.state_dict().items()}
    save_tensors(path, tensors, {"format": "pt", "personalize": "classifier", "key": key})


def load_classifier(path: Path, key: str, device: torch.device) -> NoisyClassifier | None:
    """The classifier saved with this key; None where there is none, or one of other photos. UserError for a damaged file."""
    if not path.exists():
        return None
    try:
        if read_header(path)["metadata"].get("key") != key:
            return None
        tensors = load_tensors(path, "a classifier")
        network = NoisyClassifier(tensors["convs.0.weight"].shape[1], len(tensors["head.bias"]), len(tensors["convs.0.bias"]))
        network.load_state_dict(tensors)
    except (UserError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is no classifier of --like ({error}). Delete it, and it is trained again.") from None
    return network.to(device).eval().requires_grad_(False)
