"""Out of memory is an answer: what does not fit at once is done in halves, and one image that does not fit is a UserError."""

from collections.abc import Callable, Iterator

import torch

from personalize.common.errors import UserError

WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # of MPS, and of torch's allocator for the CPU


class DoesNotFit(UserError):
    """What was asked for needs more memory than the device has left."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch or of a library says that memory is used up."""
    known = isinstance(error, torch.OutOfMemoryError | DoesNotFit | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS))


def halved(run: Callable[[slice], object], count: int, at_once: int, *, smaller: Callable[[int], None]) -> Iterator:
    """`run` for the rows of range(count), `at_once` or fewer of them at a time -> what it returns for each part.

    A part that does not fit is tried again as two, after `smaller` was told how many rows a part has now. DoesNotFit is
    raised for a single row.
    """
    start = 0
    while start < count:
        stop, failed = min(start + at_once, count), ""
        try:
            out = run(slice(start, stop))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = str(error).splitlines()[0]
        if not failed:
            yield out
            start = stop
        elif stop - start == 1:
            raise DoesNotFit(failed)
        else:  # outside of `except`, whose traceback holds what filled the memory
            at_once = (stop - start + 1) // 2
            smaller(at_once)


def free_cache(device: torch.device) -> None:
    """Gives back what torch keeps of a GPU's memory for later."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
