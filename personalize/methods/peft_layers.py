"""One PEFT adapter in one network: injecting it, its tensors, its weight, and merging it.

An adapter's tensors have the names they have in files, "<layer>.lora_A.weight": without the adapter's own name, and
without the wrappers of other adapters.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from personalize.common.errors import UserError


def import_peft() -> ModuleType:
    """PEFT, and what it names of torch without importing it, which else only bitsandbytes imports."""
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed.tensor")
    with without_bitsandbytes():
        import peft
    return peft


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Inside, PEFT finds no bitsandbytes, unless it is imported already, as for a quantized base.

    PEFT would import it for every adapter, and it makes functions by `torch.compile`, which imports the whole compiler: most of
    the CPU time before the first step of a LoRA.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # so that neither `import` nor `find_spec` finds it
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        if "peft" in sys.modules:  # what it found is kept, and the next base may be quantized
            from peft import import_utils

            import_utils.is_bnb_available.cache_clear(), import_utils.is_bnb_4bit_available.cache_clear()


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers by their names in the bare network, whatever adapters are on them."""
    layers, inside = {}, "?"
    for name, module in network.named_modules():
        if name.startswith(inside):
            continue
        if hasattr(module, "base_layer"):
            layers[name], inside = module.get_base_layer(), f"{name}."
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            layers[name] = module
    return layers


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's weight, (out,in[,k,k]), also where it is quantized."""
    return {
        name: (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
        for name, layer in adaptable_layers(network).items()
    }


def norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The norms with weights by their names."""
    kinds = (nn.LayerNorm, nn.GroupNorm)
    return {name: m for name, m in network.named_modules() if isinstance(m, kinds) and m.weight is not None}


def add_differences(network: nn.Module, differences: dict[str, Tensor], weight: float, *, what: str) -> None:
    """Adds `weight` times each difference {"layer.weight" or "layer.bias": tensor} to the network's own parameters.

    UserError, which `what` begins, for a layer without such a parameter, or of another shape; and for a quantized one.
    """
    layers = {**adaptable_layers(network), **norm_layers(network)}
    for key, difference in differences.items():
        name, _, end = key.rpartition(".")
        p = getattr(layers[name], end)
        if p is None:
            raise UserError(f"{what}: it changes the {end} of {name}, which has none.")
        if not p.is_floating_point():
            raise UserError(f"{what}: it changes {key} itself, which is quantized. Load it into the plain base.")
        if p.shape != difference.shape:
            shape = tuple(difference.shape)
            raise UserError(f"{what}: its change of {key} has the shape {shape}, expected is {tuple(p.shape)}.")
        p.data = (p.data.float() + weight * difference.to(p.device).float()).to(p.dtype)


def matching_layers(network: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The layers that targets name: each is a layer's name or the end of it, from a dot on."""
    suffixes = tuple(f".{target}" for target in targets)
    return {name: layer for name, layer in adaptable_layers(network).items() if name in targets or name.endswith(suffixes)}


def inject_adapter(network: nn.Module, config, *, name: str, what: str) -> list[nn.Parameter]:
    """Injects a fresh adapter into the layers of a PEFT config -> its parameters, in float32 whatever the network's dtype.

    UserError where no layer matches; `what` begins its sentence.
    """
    assert name not in getattr(network, "peft_config", {}), name
    before = {id(p) for p in network.parameters()}
    try:
        with without_bitsandbytes():
            import_peft().inject_adapter_in_model(config, network, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from error
    fresh = [p for p in network.parameters() if id(p) not in before]
    for p in fresh:
        p.data = p.data.float()
    for module in network.modules():
        if name in getattr(module, "lora_magnitude_vector", ()):
            _norm_in_float32(module.lora_magnitude_vector[name], module.get_base_layer())
        if name in getattr(module, "boft_s", ()) and not hasattr(module, "float32_hook"):
            # PEFT takes the bias from the layer's output, scales and adds it again, which in half precision rounds twice.
            module.float32_hook = module.base_layer.register_forward_hook(_to_float32)
    return fresh


def _to_float32(layer: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return out.float()


def _norm_in_float32(dora: nn.Module, base: nn.Module) -> None:
    """Makes a fresh DoRA the identity in half precision too: PEFT rounds the magnitude, then divides by another rounding."""
    from peft.utils.integrations import dequantize_module_weight

    norm = dora.get_weight_norm

    def in_float32(weight, lora_weight, scaling, **options) -> Tensor:
        return norm(weight.float(), lora_weight.float(), scaling, **options)

    dora.get_weight_norm = in_float32
    weight = dequantize_module_weight(base).detach()
    dora.weight.data = in_float32(weight, torch.zeros_like(weight), 1.0)


def adapter_tensors(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's live tensors: a value copied into them takes effect."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    return {key.replace(".base_layer.", "."): value for key, value in tensors.items()}


def put_factors(network: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Makes these the factors of a LoKr or LoHa, {"<layer>.lokr_w1": tensor}, whatever form its config gave the layers."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for path, layer in network.named_modules():
        if not isinstance(layer, LycorisLayer) or name not in layer.r:
            continue
        device = layer.get_base_layer().weight.device
        for role in layer.adapter_layer_names:
            factors, value = getattr(layer, role), tensors.get(f"{path.replace('.base_layer', '')}.{role}")
            if name in factors:
                del factors[name]
            if value is not None:
                factors[name] = nn.Parameter(value.to(device), requires_grad=False)


def set_adapter_scale(network: nn.Module, name: str, weight: float) -> None:
    """All adapters of the network act, this one `weight` times (of DoRA the direction, not the magnitude)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(network.peft_config))
            if weight != 1:
                layer.set_scale(name, weight)


def take_adapters(network: nn.Module) -> tuple[dict[str, nn.Module], dict]:
    """Takes all adapters out of a network, which is bare again -> PEFT's layers by name, and its configs."""
    layers = {name: m for name, m in network.named_modules() if hasattr(m, "base_layer") and not name.endswith(".base_layer")}
    put_layers(network, {name: _innermost(layer) for name, layer in layers.items()})
    return layers, network.__dict__.pop("peft_config", {})


def _innermost(layer: nn.Module) -> nn.Module:
    return _innermost(layer.base_layer) if hasattr(layer, "base_layer") else layer


def put_adapters(network: nn.Module, layers: dict[str, nn.Module], configs: dict) -> None:
    """Puts back what `take_adapters` took."""
    put_layers(network, layers)
    if configs:
        network.peft_config = configs


def put_layers(network: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Makes these the network's layers of those names."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer)


def merge_adapter(network: nn.Module) -> None:
    """Merges every adapter into its layer's weight: the bare network is left, and its output is the same."""
    for name, layer in list(network.named_modules()):
        if not hasattr(layer, "base_layer") or name.endswith(".base_layer"):
            continue
        wrappers = [layer]
        while hasattr(wrappers[-1].base_layer, "base_layer"):
            wrappers.append(wrappers[-1].base_layer)
        for wrapper in reversed(wrappers):
            wrapper.merge()
            if hasattr(wrapper, "float32_hook"):
                wrapper.float32_hook.remove()
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
