"""Configs told from shapes, and configs that a stranger's file carries in its header."""

import json
from pathlib import Path

import pytest
import tiny_releases as tiny
import torch

from personalize.common.errors import UserError
from personalize.formats import infer_config, ldm, reference_configs, stored_config


def changed(part, **more):
    return lambda kept: kept["parts"][part].update(more)


@pytest.mark.parametrize(
    "spoil",
    [
        changed("unet", block_out_channels=[16, 16, 32, 64]),
        changed("unet", cross_attention_dim=17),
        changed("unet", layers_per_block=10**8),
        changed("unet", attention_head_dim=[8]),
        changed("unet", attention_head_dim=0),
        changed("unet", _class_name="SomethingElse"),
        changed("unet", _name_or_path="/etc/passwd"),
        changed("unet", extra={"a": 1}),
        changed("unet", extra=[[[1]]]),
        changed("unet", extra="x" * 1000),
        changed("unet", norm_num_groups=0),
        changed("vae", norm_num_groups=3),
        changed("vae", scaling_factor="1"),
        changed("vae", scaling_factor=-1),
        changed("text_encoder", hidden_act="os.system"),
        changed("vae", latent_channels=5),
        changed("vae", layers_per_block=1),
        changed("text_encoder", attn_implementation="somebody/kernels"),
        changed("text_encoder", auto_map={"AutoModel": "x.py"}),
        changed("text_encoder", num_attention_heads=3),
        changed("text_encoder", hidden_size=32),
        changed("text_encoder", num_hidden_layers=10**9),
        changed("text_encoder", model_type="llama"),
        lambda kept: kept["parts"].pop("vae"),
        lambda kept: kept.update(family="sdxl"),
        lambda kept: kept.update(parts=[]),
        lambda kept: kept["parts"].update(unet=3),
        lambda kept: kept.pop("scheduler"),
        lambda kept: kept["scheduler"].update(_class_name="os.system"),
    ],
)
def test_configs_in_a_strangers_header_must_agree_with_the_file(spoil):
    shapes = {key: tuple(v.shape) for key, v in tiny.tensors("sd1").items()}
    inferred = infer_config.infer_configs(shapes, "sd1", prediction="epsilon")
    kept = json.loads(stored_config.packed("sd1", tiny.configs("sd1"), reference_configs.SCHEDULERS["sd1"]))
    assert stored_config.unpacked(json.dumps(kept), "sd1", inferred, Path("m.safetensors"))[0]["unet"]["norm_num_groups"] == 16
    spoil(kept)
    with pytest.raises(UserError):
        found = stored_config.unpacked(json.dumps(kept), "sd1", inferred, Path("m.safetensors"))[0]
        ldm.from_ldm(tiny.tensors("sd1"), "sd1", found)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"parts": 1}', "x" * 2_000_000], ids=lambda t: t[:12])
def test_a_header_entry_that_is_no_configs_is_refused(text):
    with pytest.raises(UserError, match="not the configs of a sd1 model"):
        stored_config.unpacked(text, "sd1", {"unet": {}}, Path("m.safetensors"))


def test_configs_keep_plain_values_only():
    assert all(map(stored_config.plain, [None, True, 3, 0.5, "x", [1, [2, 3]], []]))
    assert not any(map(stored_config.plain, [{}, float("nan"), float("inf"), "x" * 201, [[[1]]], [{}], object(), [0] * 1001]))


def test_the_widths_of_the_releases_give_their_heads():
    assert infer_config._heads("sd1", [320, 640, 1280, 1280], [320, 640, 1280, 1280]) == 8
    assert infer_config._heads("sd2", [320, 640, 1280, 1280], [320, 640, 1280, 1280]) == [5, 10, 20, 20]
    assert infer_config._heads("sdxl", [320, 640, 1280], [640, 1280, 1280]) == [5, 10, 20]
    assert infer_config._groups([320, 640, 1280]) == infer_config._groups([128, 256, 512, 512]) == 32
    assert [width // infer_config._head_width([width]) for width in (768, 1024, 1280)] == [12, 16, 20]


RELEASED = {
    "sd1": dict(tiny.UNETS["sd1"], block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768),
    "sd2": dict(tiny.UNETS["sd2"], block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=1024)
    | {"attention_head_dim": [5, 10, 20, 20]},
    "sdxl": dict(tiny.UNETS["sdxl"], block_out_channels=[320, 640, 1280], cross_attention_dim=2048)
    | {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}
    | {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}


@pytest.mark.parametrize("family, tensors_in_it", [("sd1", 686), ("sd2", 686), ("sdxl", 1680)])
def test_the_released_unets_are_told_from_their_shapes(family, tensors_in_it):
    known, kind = RELEASED[family], type(tiny.models(family)["unet"])
    with torch.device("meta"):
        state = kind(**known).state_dict()
    assert len(state) == tensors_in_it
    table = ldm.names("unet", family, known)
    shapes = {table[key]: tuple(v.shape) for key, v in state.items()}
    shapes |= {key: tuple(v.shape) for key, v in tiny.tensors(family).items() if key not in shapes}
    shapes["conditioner.embedders.1.model.text_projection"] = (32, 1280)
    found = infer_config.infer_configs(shapes, family, prediction="v_prediction" if family == "sd2" else "epsilon")["unet"]
    for key, value in (known | {"norm_num_groups": 32, "in_channels": 4, "layers_per_block": 2}).items():
        assert found[key] == (list(value) if isinstance(value, tuple) else value), key
