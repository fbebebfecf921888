"""The recipe's optimizer at each group's rate, with the gradients clipped by their joint norm before it."""

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe_sections import Train
from personalize.training.split_weights import flat

FUSED = ("cpu", "cuda")  # where torch's fused AdamW takes its rate as a tensor


def make_optimizer(groups: list[dict], train: Train) -> Optimizer:
    """The optimizer that `train.optimizer` names, ready for steps. UserError where its package is not installed.

    The learning rates of the fused AdamW are tensors, as its step counts are, so that a captured step reads them anew.
    """
    row, kind = OPTIMIZERS[train.optimizer], optimizer_class(train.optimizer)
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    options = {**row.options, "weight_decay": train.weight_decay}
    if row.has_betas:
        options["betas"] = train.beta1, train.beta2
    device = groups[0]["params"][0].device
    if kind is torch.optim.AdamW and device.type in FUSED:  # the CPU's kernel reads float64, a GPU's only float32
        lr = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        groups = [{**group, "lr": lr.clone()} for group in groups]
    with redirect_stdout(io.StringIO()):  # Prodigy prints how it decays weights
        optimizer = (_in_any_layout(kind) if row.package == "bitsandbytes" else kind)(groups, **options)
    if row.averages:
        optimizer.train()
    return optimizer


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of an optimizer, imported now. UserError, with what pip installs, where its package is not there."""
    row = OPTIMIZERS[name]
    module, _, kind = row.place.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise UserError(
            f"train.optimizer = {name!r} needs {row.package}: pip install {row.package}, or use --set train.optimizer=adamw"
        ) from error


def keeps_small_whole(train: Train) -> bool:
    """Whether the optimizer keeps the state of small parameters in 32 bits, as bitsandbytes does."""
    return OPTIMIZERS[train.optimizer].package == "bitsandbytes"


@torch.no_grad()
def averaged_weights(optimizer: Optimizer) -> list[Tensor]:
    """A schedule-free optimizer's x of each parameter, by its z and the y that trains (Defazio et al. 2405.15682, eq. 5).

    Copies: its own `eval` changes the weights in place, and back they are others by rounding, so that a run would depend on
    when it was saved, scored or drawn.
    """
    averages = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            z = optimizer.state[p].get("z") if p in optimizer.state else None
            averages.append(p.detach().clone() if z is None else p.lerp(z, 1 - 1 / group["betas"][0]))
    return averages


def _in_any_layout(kind: type[Optimizer]) -> type[Optimizer]:
    """An optimizer of bitsandbytes that leaves channels-last weights so: it makes each contiguous, by a copy of its own.

    It is handed the weight, its gradient and so its state as they lie in memory, one number after the other.
    """

    class InAnyLayout(kind):
        def init_state(self, group, p, gindex, pindex):
            with _flat(p):
                super().init_state(group, p, gindex, pindex)

        def update_step(self, group, p, gindex, pindex):
            with _flat(p):
                super().update_step(group, p, gindex, pindex)

    return InAnyLayout


@contextmanager
def _flat(p: nn.Parameter) -> Iterator[None]:
    """Inside, a parameter that is not contiguous, and its gradient, are (N,) views of their memory in the same order."""
    if p.is_contiguous():
        yield
        return
    data, grad = p.data, p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
    p.grad, p.data = None, flat(data)
    p.grad = flat(grad)
    try:
        yield
    finally:
        p.grad, p.data = None, data
        p.grad = grad


def set_learning_rates(optimizer: Optimizer, scale: float) -> float:
    """Sets every group's learning rate to its own × scale -> the first group's, × the d of Prodigy."""
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * scale
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(min(lr, torch.finfo(group["lr"].dtype).max))
        else:
            group["lr"] = lr
    first = optimizer.param_groups[0]
    return first["initial_lr"] * scale * first.get("d", 1.0)


def gradient_norm(params: list[Tensor]) -> Tensor:
    """The joint norm () of all gradients, in float32 whatever their dtype; 0 where there are none."""
    norms = _norms([p for p in params if not distributed.is_shard(p)])
    if shards := _norms([p for p in params if distributed.is_shard(p)]):
        norms.append(distributed.sum_over_ranks(torch.stack(shards).square().sum()).sqrt())
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clipped_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, *, norm: Tensor, limit: float) -> None:
    """One update by unscaled gradients whose joint norm is `norm`, as if torch's `clip_grad_norm_` came first.

    limit 0: no clipping. On a GPU nothing waits for the norm.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if limit and isinstance(optimizer, torch.optim.AdamW):
        # Divided, not multiplied by the inverse as torch does it: to the bit what runs of earlier versions computed.
        torch._foreach_div_(_gradients(params), ((norm + 1e-6) / limit).clamp(min=1))
    elif limit:
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm, foreach=True)
    scaler.step(optimizer)
    scaler.update()


def _norms(params: list[Tensor]) -> list[Tensor]:
    """The norm () of each gradient, of sharded parameters that of this process's part."""
    grads = _gradients(params)
    return list(torch._foreach_norm(grads, 2, torch.float32)) if grads else []


def _gradients(params: list[Tensor]) -> list[Tensor]:
    """Of sharded parameters what this process has."""
    return distributed.local_shards([p.grad for p in params if p.grad is not None])
