"""Devices and dtypes: CUDA, Apple MPS or the CPU, in that order; moving tensors to them."""

from collections.abc import Callable

import torch
from torch import Tensor

from personalize.common import distributed
from personalize.common.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is the best one of this machine. UserError for one that it does not have.

    A GPU has an index: its own, else the number of this process on its machine. It is the current one from here on, which
    kernels, streams, `synchronize` and peak memory go by. The only place where a device is chosen.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or not (index or "0").isdigit():
        raise UserError(f"device {name!r} is not known. Use auto, cpu, cuda, cuda:1 or mps.")
    if int(index or 0) >= counts[kind]:
        present = ", ".join(kind for kind, count in counts.items() if count)
        raise UserError(f"device {name!r} is not on this machine, which has {present}. Use --device auto.")
    if kind != "cuda":
        return torch.device(name)
    number = int(index) if index else distributed.local_rank()
    if number >= counts[kind]:
        raise UserError(
            f"process {number} of this machine (LOCAL_RANK) has no GPU: there are {counts[kind]}. Start as many processes as "
            "GPUs; --device cuda:0 makes all share the first one, through the slower gloo."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def dtype_for(device: torch.device, name: str, say: Callable[[str], None]) -> torch.dtype:
    """The dtype to compute in: bfloat16 where the GPU has it, float16 on older ones, float32 on MPS and CPU."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float32
    dtype = DTYPES[name]
    if device.type == "cpu" and dtype == torch.float16:
        say("float16 is slow and incomplete on the CPU: computing in bfloat16 instead.")
        return torch.bfloat16
    return dtype


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself (AVX512_BF16, AMX); elsewhere that is slower than float32.

    A torch that cannot tell counts as no.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def bfloat16_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16; of no effect on a CPU that has to emulate it, where a convolution took 40 times as long."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16())


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is one of PyTorch's fake tensors, which have a shape and no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, by way of pinned memory: from any other, the copy to a GPU waits for all work before it."""
    if device.type != "cuda" or tensor.device.type != "cpu" or type(tensor) is not Tensor:  # a fake has no memory to pin
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def take_rows(table: Tensor, rows: list[int]) -> Tensor:
    """`table[rows]`, with the row numbers moved by `to_device`."""
    return table[to_device(torch.tensor(rows), table.device)]
