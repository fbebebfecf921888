"""Reading a stranger's `.safetensors` by the library, and writing one that is the same bytes each time.

The format: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {}}`,
then the tensors' bytes, without holes (github.com/huggingface/safetensors, README).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import writing
from personalize.common.finite import require_finite
from personalize.common.tensor_file import DTYPES, write_tensors
from personalize.common.untrusted import require_regular

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")
Header = dict[str, Any]


def refuse_pickle(path: Path, kind: str) -> None:
    """UserError for a pickle by its ending; `kind` is what the file was given as, such as "a LoRA"."""
    if Path(path).suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, so it is not read as {kind}. Use the .safetensors "
            "of the same model, or convert it on a machine you trust with diffusers: "
            "from_single_file(...).save_pretrained(..., safe_serialization=True)."
        )


def read_header(path: Path) -> Header:
    """{"tensors": {name: (dtype, shape)}, "metadata": {name: text}} of a `.safetensors`; only its header is read.

    The library holds the header against the file: every byte after it belongs to exactly one tensor. UserError names a
    file that is damaged, and a dtype that is not in DTYPES.
    """
    with _damage_as_user_error(path), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        metadata = file.metadata() or {}
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name[:80]!r} has dtype {dtype}; known are {', '.join(DTYPES)}.")
    return {"tensors": tensors, "metadata": metadata}


def load_tensors(path: Path, kind: str = "a model") -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, on the CPU in their own dtypes. UserError as in `read_header`, and for NaN."""
    refuse_pickle(path, kind)
    read_header(path)
    with _damage_as_user_error(path):
        tensors = load_file(path)
    for name, tensor in tensors.items():
        require_finite(tensor, f"{path}: tensor {name[:80]!r}")
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` atomically, its metadata sorted: the library writes them in an order of chance."""
    with writing(path) as temporary:
        save_unsynced(temporary, tensors, metadata)


def save_unsynced(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As `save_tensors`, straight to `path`: for files inside a folder that is itself being written."""
    write_tensors(path, tensors, metadata)


@contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    require_regular(path, ".safetensors file")
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole .safetensors file: {error}. Download it again.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
