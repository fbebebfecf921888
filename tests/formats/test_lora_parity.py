"""LoRA files of ours in the hands of diffusers and PEFT."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_releases as tiny
import torch
from adapters_made import ATTENTION, adapter, kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_releases import same

from personalize.formats import lora, single_file
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers.loaders import lora_conversion_utils as theirs
    from diffusers.utils import state_dict_utils


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_converts_our_kohya_file_to_the_same_layers(path, family):
    made = adapter(family)
    tensors = kohya(path, made, family)
    if family == "sdxl":
        assert any("input_blocks_4_1_transformer_blocks_0_attn1_to_q" in key for key in tensors)
        tensors = theirs._maybe_map_sgm_blocks_to_diffusers(dict(tensors), SimpleNamespace(layers_per_block=2))
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(dict(tensors))
    for part in tiny.layers(family):
        own = {key.removeprefix(f"{part}."): v for key, v in converted.items() if key.startswith(f"{part}.")}
        if part == "unet":
            state = state_dict_utils.convert_unet_state_dict_to_peft(own)
        else:
            state = state_dict_utils.convert_state_dict_to_peft(state_dict_utils.convert_state_dict_to_diffusers(own))
        mine = {key: v for key, v in made.tensors.items() if key.startswith(f"{part}.")}
        assert same(
            {lora._diffusers_key(f"{part}.{key}"): v for key, v in state.items()},
            {lora._diffusers_key(k): mine[k] for k in mine},
        )
    assert sorted(alphas.values()) == sorted(made.alphas.values())


PLAIN_DIFFUSERS = """
import sys
import peft
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
base, lora, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(lora)
found = {}
for part in ("unet", "text_encoder", "text_encoder_2"):
    for name, module in getattr(pipeline, part, None).named_modules() if hasattr(pipeline, part) else ():
        if hasattr(module, "lora_A"):
            (key,) = module.lora_A
            down, up = module.lora_A[key].weight.detach(), module.lora_B[key].weight.detach()
            found[f"{part}.{name}"] = module.scaling[key] * up.flatten(1) @ down.flatten(1)
save_file(found, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_itself_loads_what_we_write(tmp_path, family, form):
    """`load_lora_weights` of a process that never saw this package adds our alpha / rank * up @ down to every layer.

    All alphas are equal: diffusers 0.42 mixes up unequal ones in kohya's files, not in its own.
    """
    made = adapter(family, where=ATTENTION, rank=lambda k: 4, alpha=lambda k: 6.0)
    folder, path = tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    kohya(path, made, family) if form == "kohya" else lora.write_diffusers(path, made)
    file = tmp_path / "base.safetensors"
    save_file(tiny.tensors(family), file)
    tiny.vocabulary(file.parent / "tokenizer")
    single_file.unpack_single_file(file, tmp_path / "base")
    arguments = [str(place) for place in (tmp_path / "base", folder, tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out")
    assert set(found) == set(made.ranks) and len(found) > 80
    for name, delta in found.items():
        down, up = made.tensors[f"{name}.lora_A.weight"], made.tensors[f"{name}.lora_B.weight"]
        torch.testing.assert_close(delta, 6 / 4 * up @ down)


def test_peft_reads_our_header_as_its_own_settings(path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    made = adapter("sd1", where=r"unet\..*(attn|conv1|proj_in)", dora=True)
    lora.write_diffusers(path, made)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    unet = copy.deepcopy(tiny.models("sd1")["unet"])
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in header.items()})
    inject_adapter_in_model(config, unet)
    unet.peft_config = {"default": config}
    found = set_peft_model_state_dict(unet, {k.removeprefix("unet."): v for k, v in load_file(path).items()})
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora" in key]
    for name in made.ranks:
        layer = unet.get_submodule(name.removeprefix("unet."))
        assert layer.scaling["default"] == made.alphas[name] / made.ranks[name]
        assert torch.equal(layer.lora_magnitude_vector["default"].weight, made.tensors[f"{name}.lora_magnitude_vector"])
