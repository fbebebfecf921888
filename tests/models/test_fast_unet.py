"""Our forward pass of a U-Net is the library's: outputs, gradients, adapters, checkpointing, kept keys and values."""

import pytest
import torch
from bases import sd1, sd2, sdxl
from diffusers import UNet2DConditionModel

from personalize import models
from personalize.generation import sampling
from personalize.models import fast_unet

KINDS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "toyland": None}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    make = KINDS[request.param]
    name = str(make(tmp_path_factory.mktemp(request.param) / "base")) if make else request.param
    return models.load_model(name, device="cpu", dtype="float32", say=lambda line: None)


def inputs(model, count=3):
    g = torch.Generator().manual_seed(0)
    side = 16
    z = torch.randn(count, model.latent_channels, side, side, generator=g)
    with torch.no_grad():
        cond = sampling.encode_texts(model, ["a dog", "a photo of a cat", ""][:count])
    return z, torch.tensor([0, 500, 999])[:count], cond


def library(model, z, t, cond):
    return model.unet(z, t, return_dict=False, **model.family.unet_arguments(cond, 16 * model.downscale))[0]


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-7


def test_it_predicts_what_the_library_predicts(model):
    z, t, cond = inputs(model)
    assert model.uses_fast_unet
    with torch.no_grad():
        assert close(model.predict(z, t, cond), library(model, z, t, cond))


def test_many_at_once_with_the_channels_last_are_the_same(model):
    z, t, cond = (
        torch.cat([x] * 4) if torch.is_tensor(x) else {k: torch.cat([v] * 4) for k, v in x.items()} for x in inputs(model)
    )
    with torch.no_grad():
        out = model.predict(z, t, cond)
        assert len(z) > 8 and out.is_contiguous() and close(out, library(model, z, t, cond))


def test_kept_keys_and_values_change_nothing_and_are_used(model):
    z, t, cond = inputs(model)
    prepared = model.prepare(cond)
    kept = prepared.keys() - cond.keys()
    assert len(kept) == sum(name.endswith(".attn2") for name, _ in model.unet.named_modules())
    with torch.no_grad():
        plain = model.predict(z, t, cond)
        assert close(model.predict(z, t, prepared), plain)
        wrong = prepared | {name: torch.zeros_like(prepared[name]) for name in kept}
        assert not close(model.predict(z, t, wrong), plain)


@pytest.mark.parametrize("count", [3, 4])
def test_rows_of_the_same_z_and_t_are_computed_once_until_the_text_enters(model, monkeypatch, count):
    z, t = torch.randn(count, model.latent_channels, 16, 16), torch.full((count,), 500)
    with torch.no_grad():
        both = sampling.encode_texts(model, [""] * count + ["a dog"] * count, draws=True)
        twice = model.predict(torch.cat([z, z]), t.repeat(2), both)
        rows, resnet = [], fast_unet._resnet
        monkeypatch.setattr(fast_unet, "_resnet", lambda part, x, emb: rows.append(len(x)) or resnet(part, x, emb))
        once = model.predict(z, t, both)
    kinds, layers = model.unet.config.down_block_types, model.unet.config.layers_per_block
    alone = 1 + layers * [kind.startswith("CrossAttn") for kind in kinds].index(True)
    alone = 0 if model.family.HAS_SIZES else alone  # SDXL's text is in the time embedding too
    assert rows == [count] * alone + [2 * count] * (len(rows) - alone) and len(rows) > alone
    assert close(once, twice) and not close(once[:count], once[count:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_librarys(model, checkpointing):
    z, t, cond = inputs(model, 2)
    model.unet.requires_grad_(True)
    params = list(model.unet.parameters())
    theirs = torch.autograd.grad(library(model, z, t, cond).square().mean(), params)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    try:
        ours = torch.autograd.grad(model.predict(z, t, cond).square().mean(), params)
    finally:
        model.unet.disable_gradient_checkpointing()
        model.unet.eval().requires_grad_(False)
    assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-7 for a, b in zip(ours, theirs))


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTERS = {
    "plain": {"target_modules": ATTENTION, "lora_alpha": 3},
    "DoRA": {"target_modules": ATTENTION, "use_dora": True},
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.5},
    "bias": {"target_modules": ATTENTION, "lora_bias": True},
    "convolutions": {"target_modules": ["proj_in", "proj_out", "conv1", "conv_shortcut"]},
}


@pytest.fixture
def adapted(request, tmp_path):
    import peft

    model = models.load_model(str(sd1(tmp_path / "base")), device="cpu", dtype="float32", say=lambda line: None)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[request.param]), model.unet)
    return model.unet.eval() and model


@pytest.mark.parametrize("adapted", ADAPTERS, indirect=True)
def test_an_adapted_layer_is_what_peft_says(adapted):
    z, t, cond = inputs(adapted)
    params = [p for p in adapted.unet.parameters() if p.requires_grad]
    ours, theirs = adapted.predict(z, t, cond), library(adapted, z, t, cond)
    assert close(ours, theirs)
    ours, theirs = (torch.autograd.grad(out.square().mean(), params) for out in (ours, theirs))
    # The gradient of a bias sums terms over all positions that nearly cancel, so its rounding goes by their size and not by
    # its own. In float32 the library's own gradients are up to 2e-6 of the whole gradient's norm away from float64's.
    rounding = 3e-6 * torch.stack([b.norm() for b in theirs]).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + rounding


@pytest.mark.parametrize("adapted", ["plain"], indirect=True)
def test_a_second_merged_or_disabled_adapter_is_what_peft_says(adapted):
    import peft

    z, t, cond = inputs(adapted)
    layers = [part for part in adapted.unet.modules() if hasattr(part, "lora_A")]
    with torch.no_grad():
        one = adapted.predict(z, t, cond)
        config = peft.LoraConfig(r=3, init_lora_weights=False, target_modules=ATTENTION)
        peft.inject_adapter_in_model(config, adapted.unet, adapter_name="second")
        for names in (["default", "second"], ["second"]):
            for layer in layers:
                layer.set_adapter(names)
            assert close(adapted.predict(z, t, cond), library(adapted, z, t, cond))
            assert not close(adapted.predict(z, t, cond), one)
        for layer in layers:
            layer.set_adapter("default")
            layer.merge()
        assert (adapted.predict(z, t, cond) - one).abs().max() < 1e-4
        for layer in layers:
            layer.unmerge()
            layer.enable_adapters(False)
        assert close(adapted.predict(z, t, cond), library(adapted, z, t, cond))


def test_a_network_it_does_not_know_goes_through_the_library(tmp_path):
    folder = sd1(tmp_path / "base")
    odd = UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(folder / "unet"), "resnet_time_scale_shift": "scale_shift"}
    )
    assert fast_unet.why_not_fast(odd) == "resnet_time_scale_shift is 'scale_shift'"
    odd.save_pretrained(folder / "unet")
    model = models.load_model(str(folder), device="cpu", dtype="float32", say=lambda line: None)
    z, t, cond = inputs(model)
    with torch.no_grad():
        assert not model.uses_fast_unet and model.prepare(cond) is cond
        assert torch.equal(model.predict(z, t, cond), library(model, z, t, cond))
        twice = model.predict(z, t, {key: torch.cat([value, value]) for key, value in cond.items()})
        assert close(twice, torch.cat([model.predict(z, t, cond)] * 2))


def test_every_setting_that_changes_the_function_is_looked_at():
    """A newer diffusers with a setting we do not know is a failing test, not a wrong image."""
    import inspect

    shape = {
        "sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type",
        "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups", "norm_eps",
        "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "encoder_hid_dim",
        "attention_head_dim", "num_attention_heads", "use_linear_projection", "upcast_attention", "addition_time_embed_dim",
        "time_embedding_dim", "projection_class_embeddings_input_dim", "addition_embed_type", "addition_embed_type_num_heads",
    }  # fmt: skip
    known = inspect.signature(UNet2DConditionModel.__init__).parameters.keys() - {"self"}
    assert known == shape | fast_unet.PLAIN.keys(), known ^ (shape | fast_unet.PLAIN.keys())


OTHER = {  # of what may differ in shape or is a number: a value that is not the tiny base's
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-2, "norm_num_groups": 4,
    "layers_per_block": 2, "transformer_layers_per_block": 2, "use_linear_projection": True, "upcast_attention": True,
    "time_embedding_dim": 64, "attention_head_dim": 2, "cross_attention_dim": 16, "in_channels": 3, "out_channels": 5,
    "block_out_channels": (8, 24), "mid_block_type": "UNetMidBlock2D", "down_block_types": ("DownBlock2D",) * 2,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("field, value", OTHER.items(), ids=OTHER.keys())
def test_a_config_field_is_computed_as_the_library_does_or_refused(tmp_path_factory, field, value):
    folder = tmp_path_factory.getbasetemp() / "any_field"
    config = UNet2DConditionModel.load_config((folder if folder.exists() else sd1(folder)) / "unet")
    torch.manual_seed(0)
    try:
        unet = UNet2DConditionModel.from_config({**config, field: value}).eval()
    except (ValueError, TypeError):
        pytest.skip("the library itself refuses it")
    if fast_unet.why_not_fast(unet):
        return
    z, t, text = (
        torch.randn(2, unet.config.in_channels, 16, 16),
        torch.tensor([10, 700]),
        torch.randn(2, 7, unet.config.cross_attention_dim),
    )
    with torch.no_grad():
        torch.testing.assert_close(fast_unet.fast_forward(unet, z, t, text), unet(z, t, text).sample, rtol=1e-3, atol=1e-4)
