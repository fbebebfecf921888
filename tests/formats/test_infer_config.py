"""Configs of the released models, told from the shapes of their tensors."""

import pytest
import tiny_releases as tiny
import torch

from personalize.formats import infer_config, ldm


def test_the_widths_of_the_releases_give_their_heads():
    assert infer_config._heads("sd1", [320, 640, 1280, 1280], [320, 640, 1280, 1280]) == 8
    assert infer_config._heads("sd2", [320, 640, 1280, 1280], [320, 640, 1280, 1280]) == [5, 10, 20, 20]
    assert infer_config._heads("sdxl", [320, 640, 1280], [640, 1280, 1280]) == [5, 10, 20]
    assert infer_config._heads("sdxl", [768, 1024, 1280], [768, 1024, 1280]) == [12, 16, 20]


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
