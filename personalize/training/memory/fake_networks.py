"""Fake networks for `counter.counting`: they take what those of a folder, or quantized layers, would take; nothing is read.

D D' widths of a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from personalize.common.files import read_json
from personalize.data.inpainting_masks import Masks, encode_versions
from personalize.formats.safetensors_io import read_header
from personalize.methods import quantization
from personalize.models.interface import LatentModel
from personalize.models.locate import weight_files
from personalize.training.memory.counter import current_counter

BITS = {"8bit": 8, "4bit": 4}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ENCODERS = {  # what the configs of DINO ViT-S/16 and CLIP ViT-B/32 say beside the libraries' defaults
    "dino": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "clip": {},
}
BLOCK = 64  # weights of NF4 that share a float32 scale


def fake_network(kind, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """In place of `models.loading.load_network`: the network that the config in folder/part describes, frozen.

    A file whose weights are in `dtype` already is mapped, not copied, so each takes memory from when it is first used.
    """
    config = read_json(folder / part / "config.json")
    files = weight_files(folder / part)
    stored = {name for file in files[:1] for name, _ in read_header(file)["tensors"].values() if name in NAMES.values()}
    with current_counter().mapping() if stored == {NAMES[dtype]} else nullcontext(), _default_dtype(dtype):
        module = kind(kind.config_class(**config)) if hasattr(kind, "config_class") else kind.from_config(config)
    return module.eval().requires_grad_(False)


def fake_encoder(source, kind, wanted: str, device: torch.device, **options) -> tuple[nn.Module, str]:
    """In place of what loads an encoder in `evaluation.encoders`: of a folder's config, or of those that all bases share."""
    file = Path(source.place) / "config.json"
    config = kind.config_class(**(read_json(file) if file.exists() else ENCODERS[source.kind]))
    # Of fakes a ViT's own initialization would redraw numbers for ever: each that is asked for is out of bounds.
    outline = type(kind.__name__, (kind,), {"_init_weights": lambda self, module: None})
    return outline(config, **options).to(device).eval().requires_grad_(False), source.place


def fake_quantize(module: nn.Module, bits: str) -> None:
    """In place of `methods.quantization.quantize`: bitsandbytes cannot make its layers of fake tensors."""
    for name in quantization.quantized_layers(module):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, Packed(module.get_submodule(name), bits))


def fake_versions(
    model: LatentModel, pixels: Callable[[int], Tensor], masks: Masks, versions: int, advance: Callable[[], None]
) -> Tensor:  # fmt: skip
    """In place of `data.inpainting_masks.encode_versions`: one is encoded, for all take the same, and all are kept."""
    one = encode_versions(model, pixels, replace(masks, count=1), 1, advance)
    return one.new_zeros(masks.count, versions, *one.shape[2:])


class Packed(nn.Linear):
    """A frozen linear layer whose weights are packed, 8 bits and a scale a row, or 4 and one each BLOCK."""

    def __init__(self, layer: nn.Linear, bits: str):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        size, self.keeps_input = layer.weight.numel(), bits == "8bit"
        packed = torch.empty(size * BITS[bits] // 8, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = torch.empty(layer.out_features if bits == "8bit" else size // BLOCK, device=layer.weight.device)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, self.out_features, self.keeps_input)


class _Product(torch.autograd.Function):
    """(…,D) -> (…,D'); whole weights exist while a gradient is computed. LLM.int8() keeps its input, although unused."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, bias: Tensor | None, width: int, keeps_input: bool) -> Tensor:
        ctx.input = x if keeps_input else None
        ctx.shape = width, x.shape[-1]
        if keeps_input:
            x.new_empty(x.shape, dtype=torch.int8)
        return torch.nn.functional.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ grad.new_empty(ctx.shape), None, None, None, None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
