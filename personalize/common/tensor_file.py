"""Writing a `.safetensors` tensor by tensor: beside them no more than the largest one is ever held, on any device.

The library's own writer copies all of them to the host first, and wants contiguous ones, which are copies on the device.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import explained

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {
    f"{kind}{bits}": getattr(torch, f"{name}{bits}") for kind, name in (("I", "int"), ("U", "uint")) for bits in (64, 32, 16, 8)
}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes them straight to `path`, the metadata sorted. The same tensors are the same bytes each time."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first keeps all of them aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LONGEST_HEADER:
        raise UserError(f"{path} would need a header of {len(raw)} bytes, more than the format allows ({LONGEST_HEADER}).")
    with explained(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            flat = on_host(tensors[name]).reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def on_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory and contiguous; made so there, not on the device, which may be full."""
    return tensor.detach().cpu().contiguous()
