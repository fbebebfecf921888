"""Reading a stranger's `.safetensors` with its header checked first, and writing one that is the same bytes each time.

The format: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {}}`,
then the tensors' bytes, without holes (github.com/huggingface/safetensors, README).
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import explained, writing

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
Header = dict[str, Any]


def refuse_pickle(path: Path, what: str) -> None:
    """UserError for a pickle by its ending; `what` says what the file was given as, such as "a LoRA"."""
    if Path(path).suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, so it is not read as {what}. Use the .safetensors "
            "of the same model, or convert it on a machine you trust with diffusers: "
            "from_single_file(...).save_pretrained(..., safe_serialization=True)."
        )


def read_header(path: Path) -> Header:
    """{"tensors": {name: (dtype, shape)}, "metadata": {name: text}} of a `.safetensors`; only its header is read.

    UserError names the file where the header is not one, or claims more than the file holds.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise _damaged(path, f"its header would be {length} bytes of a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    header = _json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a list of texts")
    spans = [(*_span(path, name, entry), name) for name, entry in header.items()]
    _without_holes(path, spans, size - 8 - length)
    return {"tensors": {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}, "metadata": metadata}


def load_tensors(path: Path, what: str = "a model") -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, on the CPU in their own dtypes, after its header was found sound."""
    refuse_pickle(path, what)
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` atomically. The library writes several metadata in an order of chance; here they are sorted."""
    with writing(path) as temporary:
        save_unsynced(temporary, tensors, metadata)


def save_unsynced(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As `save`, straight to `path`: for files inside a folder that is itself being written."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first keeps all of them aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LONGEST_HEADER:
        raise UserError(f"{path} would need a header of {len(raw)} bytes, more than the format allows ({LONGEST_HEADER}).")
    with explained(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def _json(path: Path, raw: bytes) -> dict:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a name comes twice")
        return made

    def constant(word: str):
        raise ValueError(f"{word} is no JSON")

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last. UserError where they do not fit its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"its entry {name[:80]!r} is not one of dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name[:80]!r} has dtype {str(dtype)[:20]!r}; known are {', '.join(DTYPES)}.")
    if not _counts(shape) or not _counts(span) or len(span) != 2 or len(shape) > 16:
        raise _damaged(path, f"tensor {name[:80]!r} has shape {str(shape)[:40]} at {str(span)[:40]}")
    if math.prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise _damaged(path, f"tensor {name[:80]!r} of shape {str(shape)[:40]} does not fill the bytes {span}")
    return span[0], span[1]


def _counts(values: Any) -> bool:
    """Whether a value is a list of integers from 0 to 2^63."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _without_holes(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise _damaged(path, f"tensor {name[:80]!r} begins at byte {start}, where {at} was due")
        at = end
    if at != size:
        raise _damaged(path, f"its tensors take {at} bytes, but {size} follow the header")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a whole .safetensors file: {why}. Download it again.")
