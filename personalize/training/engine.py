"""How one optimizer step runs: eager, captured or compiled, with autocast, loss scaling for float16, parts of a batch.

B images of the global batch; z0 eps (B,C,h,w), t (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from personalize.common import distributed
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import Train
from personalize.core import bf16_split
from personalize.core.losses import dreambooth_loss
from personalize.data.batch import Batch
from personalize.models.devices import to_device
from personalize.models.fast_unet import has_dropout
from personalize.models.interface import LatentModel
from personalize.training import cuda_graph
from personalize.training.compile import CompiledStep
from personalize.training.loss import per_image_loss
from personalize.training.optimizer import (
    averaged_weights,
    clipped_step,
    gradient_norm,
    keeps_small_whole,
    make_optimizer,
    set_learning_rates,
)
from personalize.training.split_weights import SplitWeights

LR_END = 1e-7  # of the polynomial schedule, as in diffusers


@dataclass
class Engine:
    """The optimizer, and `step`, which is all that the training loop calls. `say` is told how steps run.

    A captured step keeps the addresses of the weights and of the optimizer's state: from then on they may be overwritten,
    not replaced.
    """

    model: LatentModel
    recipe: Recipe
    groups: list[dict]
    say: Callable[[str], None] = lambda line: None
    step_ended: Callable[[], None] = lambda: None  # called after each step
    split_weights: SplitWeights | None = field(init=False)  # of split parameters; the optimizer has their masters
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    params: list[Tensor] = field(init=False)
    lr: float = field(init=False, default=0.0)  # of the first group, at the latest step, with what Prodigy found

    def __post_init__(self) -> None:
        self.params = [p for group in self.groups for p in group["params"]]
        train, is_split = self.recipe.train, hasattr(self.params[0], bf16_split.LOW)
        self.split_weights = SplitWeights(self.groups, small_apart=keeps_small_whole(train)) if is_split else None
        self.optimizer = make_optimizer(self.split_weights.groups if is_split else self.groups, train)
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=self.model.dtype == torch.float16)
        self._run = self._choose_engine()

    def step(self, batch: Batch, *, scale: float) -> dict[str, Tensor]:
        """One update at learning rate × `scale` -> loss, subject, prior, norm (before clipping), each () on the device."""
        return self._step(lambda: self._run(batch), scale)

    def step_by_gradients(self, totals: Tensor, *, scale: float) -> dict[str, Tensor]:
        """As `step`, by the gradients that the parameters have; totals (3,): the loss, subject and prior that they are of."""
        return self._step(lambda: self.descend(totals), scale)

    def _step(self, run: Callable[[], Tensor], scale: float) -> dict[str, Tensor]:
        self.lr = set_learning_rates(self.optimizer, scale)
        values = dict(zip(("loss", "subject", "prior", "norm"), run(), strict=True))
        self.step_ended()
        return values

    def update(self, batch: Batch) -> Tensor:
        """One update at the present learning rates -> (4,): loss, subject, prior, norm. It does not wait for a GPU."""
        try:
            totals = self.backward(batch)
            distributed.sum_gradients(self.params)
            return self.descend(totals)
        finally:
            self.clear()

    def descend(self, totals: Tensor) -> Tensor:
        """The update by the gradients that are there, which it frees -> (4,): `totals` of their loss, and their norm."""
        try:
            with record_function("clip and optimizer"):
                self.scaler.unscale_(self.optimizer)
                norm = gradient_norm(self.params)
                for _ in self.split_weights.open_chunks() if self.split_weights else [None]:
                    clipped_step(self.optimizer, self.scaler, norm=norm, limit=self.recipe.train.clip)
            return torch.cat([totals, norm[None]])
        finally:
            self.clear()

    def averaged(self) -> list[Tensor]:
        """What a schedule-free optimizer has for a result, of each parameter, as copies; [] of all others."""
        return averaged_weights(self.optimizer) if OPTIMIZERS[self.recipe.train.optimizer].averages else []

    def clear(self) -> None:
        """Frees all gradients."""
        for p in self.params:
            p.grad = None

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradients of this process's rows, in `train.accumulate` parts -> (3,): loss, subject, prior of all rows."""
        train, device = self.recipe.train, self.model.device
        totals = torch.zeros(3, device=device)
        local = distributed.local_rows(len(batch.z0))
        size = -(-len(batch.z0) // train.accumulate)
        is_prior = to_device(batch.is_prior, device)
        self.scaler.scale(totals)  # makes the scale also where more processes than rows leave this one none
        for start in range(local.start, local.stop, size):
            rows = slice(start, min(start + size, local.stop))
            with record_function("forward and loss"):
                parts = self._losses(batch, rows, is_prior[rows])
            with record_function("backward"):
                self.scaler.scale(parts[0]).backward()
            totals += torch.stack(parts).detach()
        return distributed.sum_over_ranks(totals)

    def _losses(self, batch: Batch, rows: slice, is_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, subject, prior of some rows of the batch, as parts of those of all rows."""
        train, model = self.recipe.train, self.model
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            per_image = per_image_loss(
                model,
                batch.z0[rows],
                batch.cond(rows),
                **batch.loss_inputs(rows),
                noise=None if batch.noise is None else batch.noise[rows],
                snr_gamma=train.snr_gamma,
            )
        return dreambooth_loss(per_image, is_prior, train.prior_weight, counts=batch.counts)

    def _choose_engine(self) -> Callable[[Batch], Tensor]:
        train = self.recipe.train
        if train.engine == "compiled":
            return CompiledStep(self.update, self.model, steps=train.steps, say=self.say)
        if train.engine == "eager":
            return self.update
        if why := why_not_captured(self.model, self.recipe, self.groups):
            self.say(f"steps run eagerly, not as a CUDA graph: {why}")
            return self.update
        return self.captured_by(cuda_graph.CudaGraphs())

    def captured_by(self, graphs: cuda_graph.Graphs) -> Callable[[Batch], Tensor]:
        """`update`, captured after some steps and then replayed."""
        for group in self.optimizer.param_groups:  # torch requires it; the fused kernel is the same
            group["capturable"] = True
        captured = cuda_graph.CapturedStep(lambda tensors, counts: self.update(Batch.of(tensors, counts)), graphs, say=self.say)
        return lambda batch: captured(batch.tensors(), batch.counts)


def why_not_captured(model: LatentModel, recipe: Recipe, groups: list[dict]) -> str:
    """Why a run's steps cannot be one CUDA graph, or ""."""
    train = recipe.train
    if model.device.type != "cuda":
        return f"the device is {model.device.type}"
    if distributed.world_size() > 1:
        return "several processes"
    if model.dtype == torch.float16:
        return "float16 loss scaling"
    if not (row := OPTIMIZERS[train.optimizer]).captured:
        return row.title
    if train.quantize:
        return "a quantized base"
    if train.gradient_checkpointing and has_dropout(model.unet):
        return "gradient checkpointing with dropout keeps the state of random generators"
    if any(group["name"] != "unet" for group in groups):
        return "text is encoded at each step"
    return ""


def lr_factor(recipe: Recipe, step: int) -> float:
    """The factor on every learning rate at a step 0…steps-1: warm-up from 0, then `train.lr_schedule`.

    After the warm-up it is that of diffusers' get_scheduler to rounding; in it, that of its next step, for its first is at 0.
    """
    train = recipe.train
    warmup = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    left = 1 - max(0, step - train.warmup) / max(1, train.steps - train.warmup)
    return warmup * LR_SCHEDULES[train.lr_schedule](left, train)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _polynomial(left: float, train: Train) -> float:
    end = min(1.0, LR_END / train.lr) if train.lr else 0.0
    return (1 - end) * left**train.lr_power + end


LR_SCHEDULES: dict[str, Callable[[float, Train], float]] = {  # share of the steps that is left -> factor
    "constant": lambda left, train: 1.0,
    "cosine": lambda left, train: _cosine(1 - left),
    "linear": lambda left, train: left,
    "cosine-restarts": lambda left, train: _cosine(train.lr_cycles * (1 - left) % 1.0) if left else 0.0,
    "polynomial": _polynomial,
}
