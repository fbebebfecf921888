"""How one optimizer step runs: eager, with autocast, loss scaling for float16, parts of a batch, one joint clip.

B pictures of the global batch; z0 eps (B,C,h,w), t (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalize import latent, processes
from personalize.config import Recipe
from personalize.core.guidance import Cond
from personalize.core.losses import dreambooth_loss
from personalize.errors import UserError
from personalize.models.base import LatentModel


@dataclass
class Batch:
    """One optimizer step's pictures. is_prior (B,) bool on the CPU; cond(rows) gives the conditioning of those rows.

    goal (B,C,h,w): what the base should give; None: what the schedule says. mask (B,1,h,w): weights of the loss.
    """

    z0: Tensor
    eps: Tensor
    t: Tensor
    is_prior: Tensor
    cond: Callable[[slice], Cond]
    goal: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Engine:
    """The optimizer, and `step`, which is all that the training loop calls."""

    model: LatentModel
    recipe: Recipe
    groups: list[dict]
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    params: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.params = [p for group in self.groups for p in group["params"]]
        self.optimizer = make_optimizer(self.groups, self.recipe)
        half = self.model.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=half)

    def step(self, batch: Batch, *, scale: float) -> dict[str, Tensor]:
        """One update at learning rate × `scale` -> loss, subject, prior, norm (before clipping), each () on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        totals = self.backward(batch)
        processes.sum_gradients(self.params)
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.train.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.params, limit, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {**dict(zip(("loss", "subject", "prior"), totals, strict=True)), "norm": norm}

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradient of this process's rows, in `train.accumulate` parts -> (3,): loss, subject, prior of all rows."""
        train, device = self.recipe.train, self.model.device
        counts = (int((~batch.is_prior).sum()), int(batch.is_prior.sum()))
        totals = torch.zeros(3, device=device)
        mine = processes.share(len(batch.z0))
        size = -(-len(batch.z0) // train.accumulate)
        for start in range(mine.start, mine.stop, size):
            rows = slice(start, min(start + size, mine.stop))
            with torch.autocast(device.type, self.model.dtype, enabled=self.model.dtype != torch.float32):
                per_image = latent.per_image_loss(
                    self.model, batch.z0[rows], batch.cond(rows), t=batch.t[rows], eps=batch.eps[rows],
                    goal=None if batch.goal is None else batch.goal[rows],
                    mask=None if batch.mask is None else batch.mask[rows],
                    snr_gamma=train.snr_gamma,
                )  # fmt: skip
            is_prior = batch.is_prior[rows].to(device)
            parts = dreambooth_loss(per_image, is_prior, train.prior_weight, counts=counts)
            self.scaler.scale(parts[0]).backward()
            totals += torch.stack(parts).detach()
        return processes.total(totals)


def make_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, fused, or bitsandbytes' with its state in 8 bits. UserError where that is not installed."""
    train = recipe.train
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    options = {"betas": (train.beta1, train.beta2), "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer = 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or use --set train.optimizer=adamw"
        ) from error
    return AdamW8bit(groups, **options)


def rate(recipe: Recipe, step: int) -> float:
    """The factor on every learning rate at a step 0…steps-1: warm-up from 0, then constant, cosine or linear to 0."""
    import math

    train = recipe.train
    rise = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    left = 1 - max(0, step - train.warmup) / max(1, train.steps - train.warmup)
    falls = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}
    return rise * falls[train.lr_schedule]
