"""Several processes of one run, as `accelerate launch` or `torchrun` starts them: who am I, and sums over all.

Each takes its rows of every global batch, and gradients are summed, so that the number of processes does not change a run.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from personalize.common.errors import UserError

SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside this the processes know each other, over NCCL for GPUs and gloo otherwise. UserError for what cannot work."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"{name} shards the weights over processes, which train does not do. Start it with plain "
                "`accelerate launch --multi_gpu`; to save memory: train.optimizer=adamw8bit, train.gradient_checkpointing=true."
            )
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    # Its functions keep the group there is when they are imported, whose threads would then outlive Python: now there is none.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:  # its threads must end before Python does
        distributed.destroy_process_group()


def local_rows(count: int) -> slice:
    """This process's rows of `count`: neighbours, and as many as the others' give or take one."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def sum_gradients(params: Sequence[Tensor]) -> None:
    """Adds up every parameter's gradient over all processes; one that got none here counts as zero."""
    if world_size() == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for work in [distributed.all_reduce(p.grad, async_op=True) for p in params]:
        work.wait()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return flag if world_size() == 1 else bool(sum_over_ranks(torch.tensor(int(flag), device=device)))


def broadcast_from_rank0(value):
    """The first process's value, for everyone. A plain value; it is also where they wait for each other."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
