"""Several processes of one run, as `accelerate launch` or `torchrun` starts them: rank, process group, sums.

Each process takes its rows of every global batch, and gradients are summed, so their number does not change a run.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from personalize.common.errors import UserError

LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside WORLD_SIZE
PATIENCE = timedelta(hours=12)  # the first process may draw and score alone for longer than NCCL's own ten minutes
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
_device_group: distributed.ProcessGroup | None = None  # of NCCL, inside `process_group`; None: the group of the hosts serves


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process groups: gloo for values of the hosts, and NCCL for tensors where each process has a GPU of its own.

    device: of `models.devices.choose_device`. None for one process. UserError for sharding.
    """
    global _device_group
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
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        if device.type == "cuda":
            cards: list = [None] * world_size()
            distributed.all_gather_object(cards, str(torch.cuda.get_device_properties(device).uuid))
            if len(set(cards)) == len(cards):  # NCCL refuses two processes on one GPU
                _device_group = distributed.new_group(backend="nccl", timeout=PATIENCE)
        yield
    finally:  # the groups' threads must end before Python does
        _device_group = None
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
    for work in [distributed.all_reduce(p.grad, group=_device_group, async_op=True) for p in params]:
        work.wait()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(values, group=_device_group)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. It goes from host to host, and waits for no GPU."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    distributed.all_reduce(flags)
    return bool(flags)


def broadcast_from_rank0(value):
    """The first process's value, in all processes, whose hosts wait for each other here: what one wrote before, all read."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.barrier()  # a broadcast alone does not hold up the process that sends
    distributed.broadcast_object_list(box, src=0)
    return box[0]
