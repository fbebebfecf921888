"""FSDP for full fine-tuning: each process keeps its share of the U-Net, of its gradients and of its optimizer's state.

torch's `fully_shard` gathers a block's weights when the block computes, and sums its gradients on the way back. The variables
are those that accelerate's configuration sets. Text encoders that train are whole in each process: transformers
knows their layers, whose outputs SDXL reads, by class, and `fully_shard` changes a layer's class.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe
from personalize.models import fast_unet
from personalize.models.interface import LatentModel

BLOCKS = {"ResnetBlock2D", "BasicTransformerBlock"}  # gathered one at a time; all else once
REFUSED = {  # what accelerate may ask for besides, and what to do
    "FSDP_OFFLOAD_PARAMS": "weights are not offloaded to the host; set fsdp_offload_params to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set fsdp_activation_checkpointing to false and give train.gradient_checkpointing=true",
}


def check(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """UserError where accelerate's configuration asks for FSDP and the run cannot be sharded."""
    if not distributed.is_sharded():
        return
    if why := _why_not(recipe, dtype):
        raise UserError(f"FSDP is not possible: {why}, or start it with plain `accelerate launch --multi_gpu`.")
    distributed.mesh(device)


def _why_not(recipe: Recipe, dtype: torch.dtype) -> str:
    train, world = recipe.train, distributed.world_size()
    if os.environ.get("FSDP_VERSION", "1") != "2":
        return "only version 2 is known; give --fsdp_version 2, or fsdp_version: 2 in accelerate's configuration"
    for variable, why in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return why
    if train.methods != ("full",):
        return f"{', '.join(train.methods)} trains few weights, of which nothing is saved; use it with train.methods=full"
    if not (row := OPTIMIZERS[train.optimizer]).sharded:
        return f"{row.title} does not know sharded weights; give train.optimizer=adamw"
    if train.masters == "split":
        return "halves of weights are not sharded; give train.masters=float32"
    if train.engine == "compiled":
        return "a compiled step was not tried with it; give train.engine=eager"
    if dtype == torch.float16:
        return "float16 scales the loss, which was not tried with it; give dtype=bfloat16"
    keeps_class = recipe.prior.count and train.prior_weight
    images = train.batch + (train.prior_batch or train.batch if keeps_class else 0)
    if images % world:
        return (
            f"the {images} images of a step are not shared evenly by {world} processes, which must compute in step; change "
            "train.batch or train.prior_batch"
        )
    return ""


def shard(model: LatentModel) -> None:
    """Shards the U-Net, where it is to be; before it is made float32, so that it is never whole in float32.

    Steps then run by the library's own forward pass: a block's weights are gathered when it is called, and the fast one calls
    none.
    """
    if not distributed.is_sharded():
        return
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.mesh(model.device)
    model.unet.to(memory_format=torch.contiguous_format)  # torch shards no other
    for block in [module for module in model.unet.modules() if type(module).__name__ in BLOCKS]:
        fully_shard(block, mesh=mesh, reshard_after_forward=_reshards())
    fully_shard(model.unet, mesh=mesh, reshard_after_forward=False)
    for unit in _units(model.unet):  # sums, not means: each process's loss is a part of the whole batch's
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.uses_fast_unet = False


@contextmanager
def whole(model: LatentModel) -> Iterator[None]:
    """Inside, each process has the whole U-Net, and its forward passes need no other. All processes enter and leave it."""
    if not distributed.is_sharded():
        yield
        return
    units = _units(model.unet)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    model.uses_fast_unet = not fast_unet.why_not_fast(model.unet)
    try:
        yield
    finally:
        model.uses_fast_unet = False
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(_reshards() and unit is not model.unet, recurse=False)


@contextmanager
def released(model: LatentModel) -> Iterator[None]:
    """Frees a sharded U-Net in the end, for it holds the process group, whose threads must end before Python does."""
    try:
        yield
    finally:
        if distributed.is_sharded():
            model.unet = None
            gc.collect()


def _units(network: nn.Module) -> list:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def _reshards() -> bool:
    """Whether gathered weights are freed after the forward pass and gathered again for the gradient."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
