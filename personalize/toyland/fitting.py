"""One resumable optimisation loop for every stage of pretraining."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalize.files import writing

SAVE_SECONDS = 120.0


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
) -> None:
    """Trains `model` by AdamW on loss(step), cosine to zero after a warm-up of 4 %, bf16 compute; ends with its average.

    state: a .safetensors file, written about every two minutes and read first, so the same call goes on where it stopped.
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
        if time.monotonic() - saved > SAVE_SECONDS or step + 1 == steps:
            _save(state, model, optimizer, average, step + 1)
            saved = time.monotonic()
    if ema:
        for p, mean in zip(model.parameters(), average, strict=True):
            p.data.copy_(mean)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor], step: int) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{i}": v for i, v in enumerate(average)}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
    with writing(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()} | {"step": torch.tensor(step)}, temporary)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> int:
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for i, mean in enumerate(average):
        mean.copy_(tensors[f"average.{i}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(tensors["step"])
