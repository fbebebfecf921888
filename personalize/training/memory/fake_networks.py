"""Networks without content, for `footprint.counting`: what their folder or a quantized layer would take, nothing is read.

N rows of an input, D D' widths of a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common.files import read_json
from personalize.formats.safetensors_io import read_header
from personalize.methods import quantization
from personalize.models.locate import weight_files
from personalize.training.memory.counter import present

BITS = {"8bit": 8, "4bit": 4}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BLOCK = 64  # weights of NF4 that share a float32 scale


def fake_network(kind, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """For `models.parts.network`: the network that the config in folder/part describes, frozen.

    A file whose weights are in `dtype` already is mapped, not copied, so each takes memory from when it is first used.
    """
    config = read_json(folder / part / "config.json")
    files = weight_files(folder / part)
    stored = {kind for file in files[:1] for kind, _ in read_header(file)["tensors"].values() if kind in NAMES.values()}
    with present().mapping() if stored == {NAMES[dtype]} else nullcontext(), _default(dtype):
        module = kind(kind.config_class(**config)) if hasattr(kind, "config_class") else kind.from_config(config)
    return module.eval().requires_grad_(False)


def fake_quantize(module: nn.Module, how: str) -> None:
    """For `methods.quantized.quantize`: its layers, which bitsandbytes cannot make of fake tensors."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and not set(quantization.WHOLE) & set(name.split(".")):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, Packed(layer, how))


class Packed(nn.Linear):
    """A frozen linear layer whose weights are packed, 8 bits and a scale a row, or 4 and one each BLOCK."""

    def __init__(self, layer: nn.Linear, how: str):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        size, self.keeps_input = layer.weight.numel(), how == "8bit"
        packed = torch.empty(size * BITS[how] // 8, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = torch.empty(layer.out_features if how == "8bit" else size // BLOCK, device=layer.weight.device)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, self.out_features, self.keeps_input)


class _Product(torch.autograd.Function):
    """(…,D) -> (…,D'); whole weights are there while a gradient is computed. LLM.int8() keeps its input for nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, bias: Tensor | None, width: int, keeps_input: bool) -> Tensor:
        ctx.kept = x if keeps_input else None
        ctx.shape = width, x.shape[-1]
        if keeps_input:
            x.new_empty(x.shape, dtype=torch.int8)
        return torch.nn.functional.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ grad.new_empty(ctx.shape), None, None, None, None


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
