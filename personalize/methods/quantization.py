"""The frozen base under adapters in 8 bits (LLM.int8(), Dettmers et al. 2208.07339) or 4 (NF4, QLoRA, 2305.14314).

Written with bitsandbytes' layers, because diffusers' own quantized loading refuses to work without a GPU.
"""

from torch import nn

from personalize.common.errors import UserError

# What tells every layer the timestep and the image size: few weights, and an error there spreads everywhere.
WHOLE = ("time_embedding", "time_emb_proj", "add_embedding")


def quantize(network: nn.Module, bits: str) -> None:
    """Replaces the linear layers of a frozen network, except those of WHOLE, with "8bit" or "4bit" ones, which PEFT adapts too.

    They compute in the dtype of their input. Convolutions stay as they are: bitsandbytes has none. UserError where it
    is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"train.quantize = {bits!r} needs bitsandbytes: pip install bitsandbytes") from error
    make_layer = {"8bit": _eight, "4bit": _four}[bits]
    for name in quantized_layers(network):
        parent, _, leaf = name.rpartition(".")
        layer = network.get_submodule(name)
        setattr(network.get_submodule(parent), leaf, _with_bias(make_layer(bitsandbytes.nn, layer), layer))
    setattr(network, f"is_loaded_in_{bits}", True)  # PEFT looks here


def quantized_layers(network: nn.Module) -> list[str]:
    """The names of the layers that are quantized, without the layers, so that each is freed when it is replaced."""
    layers = (name for name, layer in network.named_modules() if type(layer) is nn.Linear)
    return [name for name in layers if not set(WHOLE) & set(name.split("."))]


def _eight(bnb, layer: nn.Linear) -> nn.Linear:
    fresh = bnb.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False, device="meta"
    )
    # It is quantized on its way from the CPU to a device, and only then.
    fresh.weight = bnb.Int8Params(layer.weight.data.cpu(), requires_grad=False).to(layer.weight.device)
    return fresh


def _four(bnb, layer: nn.Linear) -> nn.Linear:
    fresh = bnb.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type="nf4",
        device="meta",
        compute_dtype=layer.weight.dtype,
    )
    fresh.weight = bnb.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=fresh)
    fresh.weight = fresh.weight.to(layer.weight.device)
    # Otherwise a CPU with AVX-512 repacks the weight for good at the first sampling, and no gradient passes after that.
    fresh.support_avx512bf16_for_cpu = False
    return fresh


def _with_bias(fresh: nn.Linear, layer: nn.Linear) -> nn.Linear:
    fresh.bias = layer.bias
    fresh.requires_grad_(False)
    return fresh.train(layer.training)
