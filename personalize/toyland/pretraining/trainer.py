"""One resumable optimisation loop for every stage of pretraining."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common import checkpoint, malloc
from personalize.models.devices import bfloat16_autocast

FIRST_AND_LAST = ("conv_in", "conv_out", "quant_conv", "patch_embedding", "projection")


def train_stage(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    state: Path,
    *,
    steps: int,
    lr: float,
    say: Callable[[int, float], None],
    muon: bool = True,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    save_seconds: float = 120.0,
) -> None:
    """Trains `model` on loss(step), cosine to zero after a warm-up of 4 %, in bfloat16 where the device has it; ends with the
    exponential moving average (EMA) of its weights where `ema_decay` is above 0.

    muon: for the matrices, at `lr`, and AdamW at a third of it for the rest; or AdamW at `lr` for all.
    state: a .safetensors file, written every `save_seconds` and read first, so the same call goes on where it stopped.
    loss must take its randomness from the step alone. say(step, loss) is called once a step.
    """
    matrices, optimizers = _optimizers(model, lr, weight_decay, muon)
    ema = [p.detach().clone() for p in model.parameters()] if ema_decay else []
    start = _restore(state, model, optimizers, ema) if state.exists() else 0
    device = next(model.parameters()).device
    if device.type == "cpu":  # saves 40,000 page faults and a sixth of the time of a step of the U-Net
        malloc.keep_freed_memory(sum(p.nbytes for p in model.parameters()))
    last_save = time.monotonic()
    for step in range(start, steps):
        warmup, cosine = min(1.0, (step + 1) / (0.04 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * warmup * cosine
        with bfloat16_autocast(device):
            loss_value = loss(step)
        loss_value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p, matrix in matrices:
            matrix.grad = p.grad.reshape(matrix.shape)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if ema_decay:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, list(model.parameters()), 1 - decay)
        say(step + 1, loss_value.item())
        if time.monotonic() - last_save > save_seconds or step + 1 == steps:
            _save(state, model, optimizers, ema, step + 1)
            last_save = time.monotonic()
    if ema_decay:
        for p, ema_parameter in zip(model.parameters(), ema, strict=True):
            p.data.copy_(ema_parameter)


def _optimizers(model: nn.Module, lr: float, weight_decay: float, muon: bool):
    """Muon (Jordan et al. 2024) takes matrices, a convolution as the matrix of its filters, but not the first and the last.

    Returns pairs of a parameter and the matrix that shares its memory, and the optimizers.
    """
    hidden = {
        m.weight
        for name, m in model.named_modules()
        if muon and isinstance(m, (nn.Linear, nn.Conv2d)) and not name.endswith(FIRST_AND_LAST)
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in parameters if p in hidden]
    rest = [p for p in parameters if p not in hidden]
    optimizers = [torch.optim.AdamW(rest, lr=lr / 3 if muon else lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)]
    if muon:
        weights = [matrix for _, matrix in matrices]
        optimizers.append(torch.optim.Muon(weights, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return matrices, optimizers


def _save(path: Path, model: nn.Module, optimizers, ema: list[Tensor], step: int) -> None:
    parts = {f"optimizer{k}": checkpoint.optimizer_tensors(o) for k, o in enumerate(optimizers)}
    # "trained" and "average" are the keys of work folders that exist
    parts |= {"trained": model.state_dict(), "average": {str(i): v for i, v in enumerate(ema)}}
    checkpoint.save_state(path, parts, step)


def _restore(path: Path, model: nn.Module, optimizers, ema: list[Tensor]) -> int:
    parts, step = checkpoint.load_state(path)
    model.load_state_dict(parts["trained"])
    for k, optimizer in enumerate(optimizers):
        checkpoint.restore_optimizer(optimizer, parts[f"optimizer{k}"])
    for i, ema_parameter in enumerate(ema):
        ema_parameter.copy_(parts["average"][str(i)])
    return step
