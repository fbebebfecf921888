"""glibc's malloc in CPU training: freed memory is kept for the next step, not given back to the system."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
SMALL = 200_000_000  # bytes of weights up to which the memory that is kept costs little
MB = 1 << 20


def keep_freed_memory(weights: int) -> bool:
    """Keeps freed blocks of up to 32 MB in this process, where it has few weights and the C library is glibc -> whether.

    weights: bytes. Otherwise glibc gives the end of its heap back at each step, and the next step has the system clear the
    same pages again: 1,400 page faults and 5 ms of a step of Toyland's network on one core.
    """
    return weights <= SMALL and set_malloc({MMAP_THRESHOLD: 32 * MB, TRIM_THRESHOLD: 1024 * MB, TOP_PAD: 64 * MB})


def keep_freed_memory_for(model):
    """`keep_freed_memory` for a `LatentModel` that computes on the CPU -> the model. malloc has no part in a GPU's memory."""
    if model.device.type == "cpu":
        networks = (*model.networks.values(), model.vae)
        keep_freed_memory(sum(p.nbytes for network in networks for p in network.parameters()))
    return model


def set_malloc(options: dict[int, int]) -> bool:
    """glibc's mallopt for each option -> whether the C library has it."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    for option, value in options.items():
        libc.mallopt(option, value)
    return True
