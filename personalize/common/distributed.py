"""Several processes of one run, as `accelerate launch` or `torchrun` starts them: rank, process group, sums.

Each process takes its rows of every global batch, and gradients are summed, so their number does not change a run. With FSDP
each also keeps its share of the U-Net only; see `training.sharding`.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from personalize.common.errors import UserError

LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside WORLD_SIZE
PATIENCE = timedelta(hours=12)  # the first process may draw and score alone for longer than NCCL's own ten minutes
_device_group: distributed.ProcessGroup | None = None  # of NCCL, inside `process_group`; None: the group of the hosts serves
_mesh = None  # that `mesh` made, inside `process_group`


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_sharded() -> bool:
    """Whether trained weights are sharded over processes: FSDP, as accelerate's configuration puts it into the environment."""
    return world_size() > 1 and _is_set("ACCELERATE_USE_FSDP")


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process groups: gloo for values of the hosts, and NCCL for tensors where each process has a GPU of its own.

    device: of `models.devices.choose_device`. None for one process. UserError for DeepSpeed.
    """
    global _device_group, _mesh
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed shards the weights over processes in a way that train does not know. Start it with plain "
            "`accelerate launch --multi_gpu`, or with FSDP: `accelerate launch --use_fsdp --fsdp_version 2`."
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
        if _mesh is not None:  # torch's caches keep it
            getattr(_mesh, "_pg_registry", {}).clear()
        _device_group = _mesh = None
        distributed.destroy_process_group()


def local_rows(count: int) -> slice:
    """This process's consecutive rows of `count`; the shares of two processes differ by one row at most."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def sum_gradients(params: Sequence[Tensor]) -> None:
    """Sum every parameter's gradient over all processes in place. One that any process has counts as zero where it is missing.

    What no process has stays missing, or weight decay would move what nothing reads. Those of sharded weights were summed on
    the way back.
    """
    if world_size() == 1:
        return
    params = [p for p in params if not is_shard(p)]
    has_gradient = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    distributed.all_reduce(has_gradient, op=distributed.ReduceOp.MAX)  # from host to host
    params = [p for p, has in zip(params, has_gradient.tolist(), strict=True) if has]
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


def rank0_decides(flag: bool) -> bool:
    """The first process's flag where weights are sharded, so that all do together what needs all of them; else one's own."""
    return broadcast_from_rank0(flag) if is_sharded() else flag


def mesh(device: torch.device):
    """All processes as torch's DeviceMesh, for sharded tensors. UserError where processes share a GPU, which NCCL refuses."""
    global _mesh
    from torch.distributed.device_mesh import DeviceMesh

    if device.type != "cpu" and _device_group is None:
        raise UserError(
            f"FSDP needs a CUDA GPU for each process, and on {device} there is none: start as many as there are GPUs."
        )
    if _mesh is None:
        _mesh = DeviceMesh.from_group(_device_group or distributed.group.WORLD, device.type)
    return _mesh


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of sharded tensors, in the same memory; all others themselves."""
    return [tensor.to_local() if is_shard(tensor) else tensor for tensor in tensors]


def shard_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as `tensor` is; itself where that is not sharded."""
    if not is_shard(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors whole, in the first process's host memory, one after the other; {} in others. All processes call it."""
    if not is_sharded():
        return dict(tensors)
    whole = {}
    for name, tensor in tensors.items():
        value = tensor.detach().full_tensor() if is_shard(tensor) else tensor
        if rank() == 0:
            whole[name] = value.cpu()
    return whole


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes."""
    if not is_sharded():  # importing it takes a while
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")
