"""Several processes of one run, as `accelerate launch` or `torchrun` starts them: rank, process group, sums.

Each process takes its rows of every global batch, and gradients are summed, so their number does not change a run.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from personalize.common.errors import UserError

LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside WORLD_SIZE
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group, by NCCL on GPUs and gloo elsewhere; none for one process. UserError for sharding."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"{name} shards the weights over processes, which train does not do. Start it with plain "
                "`accelerate launch --multi_gpu`; to save memory: train.optimizer=adamw8bit, train.gradient_checkpointing=true."
            )
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, and {missing[0]} is not: start several processes by torchrun or "
            "`accelerate launch`, or unset WORLD_SIZE."
        )
    # Imported later, its functions would keep this group, whose threads would then outlive Python.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:  # the group's threads must end before Python does
        distributed.destroy_process_group()


def local_rows(count: int) -> slice:
    """This process's consecutive rows of `count`; the shares of two processes differ by one row at most."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def sum_gradients(params: Sequence[Tensor]) -> None:
    """Sum every parameter's gradient over all processes in place; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for work in [distributed.all_reduce(p.grad, async_op=True) for p in params]:
        work.wait()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return flag if world_size() == 1 else bool(sum_over_ranks(torch.tensor(int(flag), device=device)))


def broadcast_from_rank0(value):
    """The first process's value, in all processes, which wait for each other here."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
