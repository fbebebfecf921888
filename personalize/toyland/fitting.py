"""One resumable optimisation loop for every stage of pretraining."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize import checkpoint


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    state: Path,
    *,
    steps: int,
    lr: float,
    say: Callable[[int, float], None],
    weight_decay: float = 0.01,
    ema: float = 0.0,
    save_seconds: float = 120.0,
) -> None:
    """Trains `model` by AdamW on loss(step), cosine to zero after a warm-up of 4 %, bf16 compute; ends with its average.

    state: a .safetensors file, written every `save_seconds` and read first, so the same call goes on where it stopped.
    loss must take its randomness from the step alone. say(step, loss) is called once a step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average = [p.detach().clone() for p in model.parameters()] if ema else []
    start = _restore(state, model, optimizer, average) if state.exists() else 0
    device = next(model.parameters()).device
    saved = time.monotonic()
    for step in range(start, steps):
        rise, fall = min(1.0, (step + 1) / (0.04 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, list(model.parameters()), 1 - decay)
        say(step + 1, value.item())
        if time.monotonic() - saved > save_seconds or step + 1 == steps:
            _save(state, model, optimizer, average, step + 1)
            saved = time.monotonic()
    if ema:
        for p, mean in zip(model.parameters(), average, strict=True):
            p.data.copy_(mean)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor], step: int) -> None:
    parts = {"trained": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
    checkpoint.save(path, parts | {"average": {str(i): v for i, v in enumerate(average)}}, step)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> int:
    parts, step = checkpoint.load(path)
    model.load_state_dict(parts["trained"])
    checkpoint.restore_optimizer(optimizer, parts["optimizer"])
    for i, mean in enumerate(average):
        mean.copy_(parts["average"][str(i)])
    return step
