"""What glibc's malloc does with memory that is freed: keep it for the next step, or give it back to the system.

A process has one heap; the first of these two calls decides, and later ones do nothing.
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
SMALL = 200_000_000  # bytes of weights up to which a heap that is kept costs little
MB = 1 << 20
_decided = ""


def keep_freed_memory(weights: int) -> bool:
    """Keeps freed blocks of up to 32 MB in this process, where it has few weights and the C library is glibc -> whether.

    weights: bytes. Else glibc gives the end of its heap back at each step, and the next step has the system clear the same
    pages again: 1,400 page faults and 5 ms of a step of Toyland's network on one core.
    """
    if weights > SMALL:
        return False
    return _decide("keep", {MMAP_THRESHOLD: 32 * MB, TRIM_THRESHOLD: 1024 * MB, TOP_PAD: 64 * MB})


def keep_freed_memory_for(model):
    """`keep_heap` for a `LatentModel` that computes on the CPU -> the model. A GPU's memory is not the heap's."""
    if model.device.type == "cpu":
        networks = (*model.networks.values(), model.vae)
        keep_freed_memory(sum(p.nbytes for network in networks for p in network.parameters()))
    return model


def steady_heap() -> bool:
    """Lets blocks of 2 MB and more leave this process as soon as they are freed, where the C library is glibc -> whether.

    Else glibc keeps blocks of up to 32 MB once it has seen such, in pieces that rarely fit again: a run at full size
    holds 15 to 25 % more than its tensors. Costs system time, 8 % of a step of Stable Diffusion 1.5 and none of Toyland.
    """
    return _decide("steady", {MMAP_THRESHOLD: 2 * MB, TRIM_THRESHOLD: 64 * MB})


def _decide(way: str, options: dict[int, int]) -> bool:
    global _decided
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    if not _decided:
        _decided = way
        for option, value in options.items():
            libc.mallopt(option, value)
    return _decided == way
