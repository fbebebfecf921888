"""Headers of strangers: nothing they claim is believed or allocated."""

import json
import struct

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from personalize.common import tensor_file
from personalize.common.errors import UserError
from personalize.formats import safetensors_io

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def written(path, header, data=b"\0" * 24, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def twice(one, other):
    """A header with one name for two tensors."""
    return f'{{"a": {json.dumps(F32 | one)}, "a": {json.dumps(F32 | other)}}}'.encode()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_the_header_tells_names_dtypes_shapes_and_metadata(path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"x": "y"})
    header = safetensors_io.read_header(path)
    assert header == {"tensors": {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}, "metadata": {"x": "y"}}


@pytest.mark.parametrize(
    "header",
    [
        {"a": F32 | {"data_offsets": [0, 20]}},
        {"a": F32 | {"shape": [2, 4]}},
        {"a": F32 | {"shape": [-2, -3]}},
        {"a": F32 | {"shape": [2.0, 3]}},
        {"a": F32 | {"shape": [True, 6]}},
        {"a": F32 | {"shape": 6}},
        {"a": F32 | {"shape": [1 << 40, 1 << 40]}},
        {"a": F32 | {"data_offsets": [24, 0]}},
        {"a": F32 | {"data_offsets": [0, 24, 48]}},
        {"a": F32 | {"data_offsets": [8, 32]}},
        {"a": F32, "b": F32},
        {"a": F32 | {"data_offsets": [24, 48]}},
        {"a": F32 | {"dtype": "F99"}},
        {"a": F32 | {"dtype": 7}},
        {"a": F32 | {"dtype": ["F32"]}},
        {"a": F32 | {"dtype": "F4", "shape": [48]}},
        {"a": 1},
        {"a": {}},
        {},
        [],
        {"a": F32, "__metadata__": {"x": 1}},
        {"a": F32, "__metadata__": ["x"]},
        b'{"a": 1, "a": 2}',
        twice({"data_offsets": [0, 12], "shape": [3]}, {"data_offsets": [12, 24], "shape": [3]}),
        twice({"data_offsets": [0, 24]}, {"data_offsets": [0, 12], "shape": [3]}),
        b'{"a": NaN}',
        b"\xff\xfe{}",
        b"[" * 50_000,
        b"1" * 5000,
        b"not json",
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_header_that_does_not_fit_its_file_is_refused_by_name(path, header):
    written(path, header)
    with pytest.raises(UserError, match="a.safetensors"):
        safetensors_io.read_header(path)
    with pytest.raises(UserError, match="a.safetensors"):
        safetensors_io.load_tensors(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, tensor_file.LONGEST_HEADER + 1, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_never_read(path, length):
    with pytest.raises(UserError, match="a.safetensors is not a whole .*header.* Download it again"):
        safetensors_io.read_header(written(path, {"a": F32}, length=length))


def test_what_is_odd_in_a_header_but_fits_its_file_is_read(path):
    written(path, {"a": F32 | {"shape": [1] * 40 + [6], "more": 1}})
    assert safetensors_io.read_header(path)["tensors"] == {"a": ("F32", (*[1] * 40, 6))}
    assert safetensors_io.load_tensors(path)["a"].numel() == 6
    written(path, twice({}, {}))
    assert safetensors_io.read_header(path)["tensors"] == {"a": ("F32", (2, 3))}


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7])
def test_an_empty_or_torn_file_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a whole"):
        safetensors_io.read_header(path)


def test_bytes_after_the_last_tensor_are_refused(path):
    with pytest.raises(UserError, match="a.safetensors is not a whole .*not fully covered"):
        safetensors_io.read_header(written(path, {"a": F32}, data=b"\0" * 25))


def test_a_missing_file_and_a_folder_are_errors_of_the_user(tmp_path):
    for path, fault in ((tmp_path / "none.safetensors", "cannot read"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(UserError, match=fault):
            safetensors_io.read_header(path)


@pytest.mark.parametrize("ending", [".ckpt", ".bin", ".pt", ".pth", ".pkl", ".CKPT"])
def test_a_pickle_is_not_opened(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    with pytest.raises(UserError, match="is a pickle.*not read as a LoRA.*save_pretrained"):
        safetensors_io.refuse_pickle(path, "a LoRA")
    with pytest.raises(UserError, match="is a pickle"):
        safetensors_io.load_tensors(path)


def test_what_is_saved_is_what_safetensors_loads(path):
    tensors = {
        "half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "one": torch.tensor(2.5),
        "none": torch.zeros(0, 4), "int": torch.arange(5), "bool": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).T, "ünï": torch.randn(2), "byte": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    safetensors_io.save_tensors(path, tensors, {"b": "1", "a": 'with "quotes"'})
    for found in (load_file(path), safetensors_io.load_tensors(path)):
        assert set(found) == set(tensors)
        assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": 'with "quotes"', "b": "1"}
    assert safetensors_io.read_header(path)["tensors"]["turned"] == ("F32", (6, 4))


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {f"t{k}": torch.full((2,), float(k)) for k in range(20)}
    said = {f"m{k}": str(k) for k in range(20)}
    safetensors_io.save_tensors(tmp_path / "a", tensors, said)
    safetensors_io.save_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(said.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
