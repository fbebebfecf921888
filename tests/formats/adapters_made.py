"""Random LoRAs for the tiny releases."""

import re

import tiny_releases as tiny
import torch
from safetensors.torch import load_file

from personalize.formats import lora

FAMILY = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
ATTENTION = re.compile(r"attn\d\.to_|self_attn\.")


def module(family, name):
    part, _, layer = name.partition(".")
    return tiny.models(family)[part].get_submodule(layer)


def adapter(family, *, where=".", dora=False, rank=lambda k: 2 + k % 3, alpha=lambda k: [1.0, 2.0, 4.5][k % 3]):
    """A random LoRA on the layers whose names match, of unequal ranks and alphas."""
    torch.manual_seed(1)
    names = sorted(f"{part}.{layer}" for part, layers in tiny.layers(family).items() for layer in layers)
    tensors, ranks, alphas = {}, {}, {}
    for k, name in enumerate(name for name in names if re.search(where, name)):
        weight = module(family, name).weight
        ranks[name], alphas[name] = rank(k), alpha(k)
        tensors[f"{name}.lora_A.weight"] = torch.randn(ranks[name], *weight.shape[1:])
        tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], ranks[name], *[1] * (weight.ndim - 2))
        if dora:
            shape = (-1,) if weight.ndim == 2 else (1, -1, 1, 1)
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(weight.shape[0]).reshape(shape)
    return lora.Adapter(tensors, ranks, alphas)


def kohya(path, made, family):
    lora.write_kohya(path, made, family=FAMILY[family], unet=tiny.layers(family)["unet"])
    return load_file(path)
