"""One table of names, both ways: parity with diffusers' converters on the full layouts, bit for bit."""

import pytest
import tiny_releases as tiny
import torch
from tiny_releases import FAMILIES, same

from personalize.common.errors import UserError
from personalize.formats import ldm
from personalize.formats.ldm_unet import unet_layers, unet_names
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers.loaders import single_file_utils as theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_from_ldm_undoes_to_ldm_bit_for_bit(family):
    back = ldm.from_ldm(tiny.tensors(family), family, tiny.configs(family))
    assert set(back) == set(tiny.states(family))
    for part, state in tiny.states(family).items():
        assert same(back[part], state), part


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_our_networks_as_the_originals(family):
    unet = theirs.convert_ldm_unet_checkpoint(dict(tiny.tensors(family)), tiny.models(family)["unet"].config)
    assert same(unet, tiny.states(family)["unet"])
    vae = theirs.convert_ldm_vae_checkpoint(dict(tiny.tensors(family)), tiny.models(family)["vae"].config)
    assert same(vae, tiny.states(family)["vae"])


@pytest.mark.parametrize(
    "family, part, prefix",
    [("sd2", "text_encoder", "cond_stage_model.model."), ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.")],
)
def test_diffusers_reads_our_openclip_as_the_original(family, part, prefix):
    converted = theirs.convert_open_clip_checkpoint(tiny.models(family)[part], dict(tiny.tensors(family)), prefix=prefix)
    assert same(converted, tiny.states(family)[part])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_our_clip_as_the_original(family):
    assert same(theirs.convert_ldm_clip_checkpoint(dict(tiny.tensors(family))), tiny.states(family)["text_encoder"])


@pytest.mark.parametrize("family, kind", [("sd1", "v1"), ("sd2", "v2"), ("sdxl", "xl_base")])
def test_the_keys_by_which_diffusers_tells_families_are_there(family, kind):
    mark = theirs.CHECKPOINT_KEY_NAMES[kind].replace("resblocks.9", "resblocks.1")  # ours are two layers deep
    assert mark in tiny.tensors(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_weight_once(family):
    for part, state in tiny.states(family).items():
        table = ldm.names(part, family, tiny.configs(family)[part])
        assert set(table) == set(state)
        packed = [key for key in table.values() if "in_proj" in key]
        assert len(set(table.values())) == len(table) - len(packed) * 2 // 3


def test_uneven_structures_have_names_too():
    """Other numbers of blocks, resnets and transformers than any release: shortcuts are where the networks have them."""
    with lazy_imports():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=(1, 3), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(2, 1),
    )  # fmt: skip
    table = unet_names(dict(unet.config))
    assert set(table) == set(unet.state_dict()) and len(set(table.values())) == len(table)
    assert table["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.3.2.conv.bias"
    assert table["down_blocks.1.resnets.2.conv2.weight"] == "input_blocks.5.0.out_layers.3.weight"


def test_names_of_layers_alone_are_enough():
    """A LoRA knows the base's layers, not its config."""
    unet = tiny.models("sdxl")["unet"]
    layers = {name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    table = unet_names(dict(unet.config))
    assert unet_layers(layers) == {layer: table[f"{layer}.weight"].removesuffix(".weight") for layer in layers}
    assert unet_layers(layers | {"encoder_hid_proj", "down_blocks.9.resnets.x.conv1"}) == unet_layers(layers)


def test_files_of_others_may_spell_and_carry_more():
    sd1 = {}
    for key, value in tiny.tensors("sd1").items():
        value = value[:, :, 0, 0] if ".mid.attn_1." in key and value.ndim == 4 else value  # some are matrices already
        sd1[key.replace("transformer.text_model.", "transformer.")] = value  # as in 2022
    clip = "cond_stage_model.transformer."
    sd1 |= {clip + "text_model.embeddings.position_ids": torch.arange(12), clip + "text_projection.weight": torch.zeros(2, 2)}
    sd1 |= {"model_ema.decay": torch.ones(1), "betas": torch.ones(9), "first_stage_model.loss.x": torch.ones(1)}
    back = ldm.from_ldm(sd1, "sd1", tiny.configs("sd1"))
    assert all(same(back[part], tiny.states("sd1")[part]) for part in back)


def test_the_last_layer_of_sd2s_openclip_is_left_out():
    last = {f"cond_stage_model.model.transformer.resblocks.23.ln_{k}.weight": torch.ones(16) for k in (1, 2)}
    more = {"cond_stage_model.model.text_projection": torch.ones(16, 16), "cond_stage_model.model.logit_scale": torch.ones(())}
    back = ldm.from_ldm(tiny.tensors("sd2") | last | more, "sd2", tiny.configs("sd2"))
    assert same(back["text_encoder"], tiny.states("sd2")["text_encoder"])


def test_a_file_of_sd2_has_what_old_loaders_expect_of_openclip():
    """As sd-scripts writes it: block 23 is block 22 again, a square projection of ones; nobody's image depends on them."""
    states, configs = dict(tiny.states("sd2")), dict(tiny.configs("sd2"))
    text, depth = states["text_encoder"], ldm.SD2_LAYERS
    layers = {key: v for key, v in text.items() if ".layers.0." in key}
    text = {key: v for key, v in text.items() if ".layers." not in key}
    text |= {key.replace(".0.", f".{k}."): v + k for key, v in layers.items() for k in range(depth)}
    configs["text_encoder"] = configs["text_encoder"] | {"num_hidden_layers": depth}
    file = ldm.to_ldm(states | {"text_encoder": text}, "sd2", configs)
    prefix = "cond_stage_model.model."
    blocks = [
        {key.split(f"resblocks.{k}.")[1]: v for key, v in file.items() if f"{prefix}transformer.resblocks.{k}." in key}
        for k in (depth - 1, depth)
    ]
    assert same(*blocks) and len(blocks[0]) == 12
    width = configs["text_encoder"]["hidden_size"]
    assert torch.equal(file[f"{prefix}text_projection"], torch.ones(width, width)) and file[f"{prefix}logit_scale"] == 1
    assert same(ldm.from_ldm(file, "sd2", configs)["text_encoder"], text)
    assert not any("logit_scale" in key for family in ("sd1", "sdxl") for key in tiny.tensors(family))


def test_state_dicts_of_other_versions_are_tidied():
    clip = {"embeddings.position_ids": torch.ones(3), "encoder.layers.0.mlp.fc1.bias": torch.ones(1)}
    assert set(ldm.tidy("text_encoder", clip)) == {"text_model.encoder.layers.0.mlp.fc1.bias"}
    old = {"encoder.mid_block.attentions.0.query.weight": torch.ones(2, 2, 1, 1)}
    old |= {"encoder.mid_block.attentions.0.proj_attn.bias": torch.ones(2)}
    new = ldm.tidy("vae", old)
    assert {key: tuple(v.shape) for key, v in new.items()} == {
        "encoder.mid_block.attentions.0.to_q.weight": (2, 2),
        "encoder.mid_block.attentions.0.to_out.0.bias": (2,),
    }


def test_missing_strange_and_misshapen_weights_are_refused():
    whole, known = tiny.tensors("sd1"), tiny.configs("sd1")
    conv, attention = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.mid.attn_1.q.weight"
    with pytest.raises(UserError, match="unet lacks 1 of .*input_blocks.0.0.weight"):
        ldm.from_ldm({key: v for key, v in whole.items() if key != conv}, "sd1", known)
    with pytest.raises(UserError, match="unet has 1 weights beside.*motion"):
        ldm.from_ldm(whole | {"model.diffusion_model.motion.weight": torch.ones(1)}, "sd1", known)
    with pytest.raises(UserError, match="is not a matrix"):
        ldm.from_ldm(whole | {attention: torch.ones(16, 16, 3, 3)}, "sd1", known)
    packed = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    for bad in (torch.ones(()), torch.ones(47)):
        with pytest.raises(UserError, match="is not 3 layers in one"):
            ldm.from_ldm(tiny.tensors("sd2") | {packed: bad}, "sd2", tiny.configs("sd2"))
    unet = tiny.states("sd1")["unet"]
    with pytest.raises(UserError, match="unet has 1 weights beside"):
        ldm.to_ldm(tiny.states("sd1") | {"unet": unet | {"adapter.weight": torch.ones(1)}}, "sd1", known)


@pytest.mark.parametrize(
    "more",
    [
        {"block_out_channels": "wide"}, {"block_out_channels": []}, {"block_out_channels": [0] * 4}, {"layers_per_block": 1e9},
        {"layers_per_block": 10**9}, {"layers_per_block": [2]}, {"transformer_layers_per_block": [[1, 2]] * 4},
        {"down_block_types": ["AttnDownBlock2D"] * 4}, {"up_block_types": 7}, {"mid_block_type": "UNetMidBlock2D"},
        {"reverse_transformer_layers_per_block": [True] * 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_without_a_single_file_layout_is_refused(more):
    with pytest.raises(UserError):
        unet_names(tiny.configs("sd1")["unet"] | more)


def test_a_vae_or_text_config_that_is_none_is_refused():
    for bad in ({"block_out_channels": [0]}, {"layers_per_block": "2"}, {"down_block_types": ["X"]}, {"up_block_types": 3}):
        with pytest.raises(UserError):
            ldm.vae_names(bad)
    for depth in (0, "2", 10**9):
        with pytest.raises(UserError):
            ldm.text_names({"num_hidden_layers": depth}, openclip=True, projection=True)
