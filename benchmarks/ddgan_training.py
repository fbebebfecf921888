"""Trains `benchmarks.ddgan` on Toyland's latents.    python -m benchmarks.ddgan_training WORK LATENTS.npy [--steps N]

The same command goes on where it was stopped. Not the paper's: z_T at zero terminal SNR says nothing of z0 and is hidden from
D, which would else forbid G to use it as noise; real pairs with another image's caption are for D as false as drawn ones; and
beside the transitions of two steps the one from noise to clean data is trained, so that one step can be drawn too.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ddgan import STATE, Discriminator, Z, generate_z0, generator, posterior_draw, r1
from personalize.common import checkpoint, malloc
from personalize.common.terminal import SILENT
from personalize.core import rng
from personalize.core.schedule import Schedule

TRANSITIONS = ((999, 499), (999, -1), (499, -1))  # (t, s) of two steps of the trailing thousand, and of one


@dataclass(frozen=True)
class Settings:
    steps: int = 740  # of `batch` images
    batch: int = 18  # a third for each of TRANSITIONS
    lr: float = 1e-4  # of G's U-Net; its mapping network and D's heads at `fresh_lr`
    critic_lr: float = 4e-4
    fresh_lr: float = 1e-3
    gamma: float = 0.05  # of R1
    r1_every: int = 8  # steps, R1 being as much heavier (Karras et al. 1912.04958, appendix B)
    mismatched: float = 0.5  # weight in D's loss of real pairs with another's caption (Reed et al. 1605.05396)
    ema: float = 0.99
    seed: int = 0


@dataclass
class Batch:
    """Rows in the order of TRANSITIONS. z_t as D sees it: zeros where it says nothing."""

    z_t: Tensor
    shown: Tensor
    real: Tensor  # z_s
    text: Tensor
    other: Tensor  # another row's text
    zlat: Tensor
    eps: Tensor

    @property
    def parts(self) -> list[tuple[tuple[int, int], slice]]:
        each = len(self.z_t) // len(TRANSITIONS)
        return [(step, slice(k * each, (k + 1) * each)) for k, step in enumerate(TRANSITIONS)]

    def times(self, which: int) -> Tensor:
        return torch.tensor([max(step[which], 0) for step, rows in self.parts for _ in range(rows.stop - rows.start)])


def make_batch(model, latents: np.ndarray, captions: Callable[[int, int], str], settings: Settings, step: int) -> Batch:
    """latents (N,2,C,h,w): means and deviations; captions: (row, step) -> text."""
    g, B = rng.generator(settings.seed, "ddgan", step), settings.batch
    picked = torch.randint(0, len(latents), (B,), generator=g)
    mean, std = torch.from_numpy(latents[picked.numpy()].astype(np.float32)).unbind(1)
    z0, eps, more, own = (torch.randn(mean.shape, generator=g) for _ in range(4))
    z0 = mean + std * z0
    with torch.no_grad():
        text = model.encode_prompts([captions(int(k), step) for k in picked])["text"].clone()
    batch = Batch(eps, eps, eps, text, text.roll(1, 0), torch.randn(B, Z, generator=g), own)
    z_t, real = [], []
    for (t, s), rows in batch.parts:
        z_t.append(model.schedule.add_noise(z0[rows], eps[rows], t))
        real.append(posterior_draw(model.schedule, z0[rows], z_t[-1], t, s, more[rows]))
    batch.z_t, batch.real = torch.cat(z_t), torch.cat(real)
    batch.shown = batch.z_t * (batch.times(0) < model.schedule.T - 1).view(-1, 1, 1, 1)
    return batch


def fake_pairs(network: nn.Module, schedule: Schedule, batch: Batch) -> Tensor:
    z0 = generate_z0(network, schedule, batch.z_t, batch.times(0).tolist(), batch.text, batch.zlat)
    parts = [posterior_draw(schedule, z0[r], batch.z_t[r], t, s, batch.eps[r]) for (t, s), r in batch.parts]
    return torch.cat(parts)


class Game:
    """G, D, their optimizers and G's EMA, with one step of both and its state in a file."""

    def __init__(self, model, settings: Settings):
        self.schedule, self.settings = model.schedule, settings
        torch.manual_seed(settings.seed)
        self.g, self.d = generator(model.unet), Discriminator(model.unet)
        self.ema = copy.deepcopy(self.g).requires_grad_(False)
        self.optimizers = {
            "optimizer_g": _adam(self.g, "class_embedding.", settings.lr, settings.fresh_lr),
            "optimizer_d": _adam(self.d, ("heads.", "before."), settings.critic_lr, settings.fresh_lr),
        }

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        settings = self.settings
        warm = min(1, (number + 1) / 30) * min(1, (settings.steps - number) / (0.3 * settings.steps))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warm
        s, t = batch.times(1), batch.times(0)
        fake = fake_pairs(self.g, self.schedule, batch)
        third = slice(None, None, 3)  # of the real pairs, which is enough of those with another's caption
        pairs = [(batch.real, batch.shown, s, t, batch.text), (fake.detach(), batch.shown, s, t, batch.text),
                 tuple(each[third] for each in (batch.real, batch.shown, s, t, batch.other))]  # fmt: skip
        judged = self.d(*(torch.cat(each) for each in zip(*pairs, strict=True)))
        real, false, other = judged.split([len(pair[0]) for pair in pairs])
        losses = {"real": F.softplus(-real).mean(), "fake": F.softplus(false).mean()}
        losses["other"] = F.softplus(other).mean()
        total = losses["real"] + (losses["fake"] + settings.mismatched * losses["other"]) / (1 + settings.mismatched)
        if number % settings.r1_every == 0:
            losses["r1"] = r1(lambda z: self.d(z, batch.shown, s, t, batch.text), batch.real).mean()
            total = total + settings.gamma / 2 * settings.r1_every * losses["r1"]
        self._update("optimizer_d", self.d, total)
        self.d.requires_grad_(False)
        losses["g"] = F.softplus(-self.d(fake, batch.shown, s, t, batch.text)).mean()
        self._update("optimizer_g", self.g, losses["g"])
        self.d.requires_grad_(True)
        decay = min(settings.ema, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.g.parameters()), 1 - decay)
        return {name: value.item() for name, value in losses.items()}

    def _update(self, name: str, network: nn.Module, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    def save(self, path: Path, step: int) -> None:
        parts = {"g": self.g.state_dict(), "d": self.d.state_dict(), "ema": self.ema.state_dict()}
        parts |= {name: checkpoint.optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        checkpoint.save_state(path, parts, step)

    def restore(self, path: Path) -> int:
        parts, step = checkpoint.load_state(path)
        for name in ("g", "d", "ema"):
            getattr(self, name).load_state_dict(parts[name])
        for name, optimizer in self.optimizers.items():
            checkpoint.restore_optimizer(optimizer, parts[name])
        return step


def _adam(network: nn.Module, fresh: str | tuple[str, ...], lr: float, fresh_lr: float) -> torch.optim.Optimizer:
    named = list(network.named_parameters())
    groups = [{"params": [p for n, p in named if n.startswith(fresh) == new], "lr": rate, "peak": rate}
              for new, rate in ((False, lr), (True, fresh_lr))]  # fmt: skip
    return torch.optim.AdamW(groups, betas=(0.5, 0.9), weight_decay=0.0, fused=True)


def train(model, latents: np.ndarray, captions, work: Path, settings: Settings, say: Callable[[str], None]) -> nn.Module:
    """Returns G's EMA. What `work` holds is gone on with."""
    game, state, recent = Game(model, settings), work / STATE, []
    start = game.restore(state) if state.exists() else 0
    malloc.keep_freed_memory(sum(p.nbytes for p in game.g.parameters()))
    last = began = time.monotonic()
    for step in range(start, settings.steps):
        recent.append(game.step(make_batch(model, latents, captions, settings, step), step))
        if (step + 1) % 25 == 0 or step + 1 == settings.steps:
            names = dict.fromkeys(name for row in recent for name in row)
            means = {n: np.mean([row[n] for row in recent if n in row]) for n in names}
            pace = (time.monotonic() - began) / (step + 1 - start)
            say(f"{step + 1}: " + ", ".join(f"{n} {v:.3f}" for n, v in means.items()) + f", {pace:.2f} s a step")
            recent.clear()
        if time.monotonic() - last > 120 or step + 1 == settings.steps:
            game.save(state, step + 1)
            last = time.monotonic()
    return game.ema.eval()


def main(work: Path, latents: Path, steps: int = Settings.steps) -> None:
    """latents: (N,2,4,16,16), posterior means and deviations of scenes 10,000,000 + k of subjects k // 4."""
    from personalize.commands.session import open_base, resolve
    from personalize.toyland.world.scenes import caption, sample_scene, sample_subject

    def caption_of(k: int, step: int) -> str:
        return caption(sample_scene(10_000_000 + k, subject=sample_subject(k // 4)), step * 64 + k)

    work.mkdir(parents=True, exist_ok=True)
    model = open_base(resolve(None, ()), SILENT)
    train(model, np.load(latents, mmap_mode="r"), caption_of, work, Settings(steps=steps), lambda line: print(line, flush=True))


if __name__ == "__main__":
    typer.run(main)
