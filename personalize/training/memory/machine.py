"""How fast this machine is, measured in less than a second, and how much memory is free on it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from personalize.training.memory.counter import Work

SIDE, CHANNELS = 32, 320  # of the convolution that stands for all: Stable Diffusion's commonest
MOVED = 16_000_000  # bytes of the tensor whose sum stands for all other work


@dataclass(frozen=True)
class MachineSpeed:
    """flops and moved: FLOP and bytes a second; call: seconds that any operator takes, however small."""

    flops: float
    moved: float
    call: float

    def seconds(self, work: Work) -> float:
        """How long this work takes if every operator is as fast as the measured ones: right to a factor of two."""
        return max(work.flops / self.flops + work.moved / self.moved, work.calls * self.call)


def measure_speed(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Measures a device that computes in a dtype."""
    with torch.inference_mode():
        x = torch.ones(1, CHANNELS, SIDE, SIDE, device=device, dtype=dtype)
        weight = torch.ones(CHANNELS, CHANNELS, 3, 3, device=device, dtype=dtype)
        convolution = _time(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)
        large, small = torch.ones(MOVED // dtype.itemsize, device=device, dtype=dtype), torch.ones(8, device=device)
        moving, calling = _time(lambda: large + large, device), _time(lambda: small + small, device)
    return MachineSpeed(2 * 9 * CHANNELS**2 * SIDE**2 / convolution, 3 * MOVED / moving, calling)


def free_bytes(device: torch.device) -> int:
    """Memory that a process could still take on a device: for a CPU, what the system and this process's cgroup leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits = [int(row.split()[1]) * 1024 for row in meminfo.read_text().splitlines() if row.startswith("MemAvailable")]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        limits.append(int(limit.read_text()) - int(used.read_text()))
    return min(limits)


def _time(run: Callable[[], object], device: torch.device, *, budget: float = 0.15) -> float:
    """Median seconds of one run, of as many as fit in the budget."""
    run()
    times, end = [], time.monotonic() + budget
    while time.monotonic() < end or len(times) < 3:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
