"""The LoRA family: what is adapted, what is refused, and a user's adapters side by side or merged."""

import copy

import pytest
import torch
from method_cases import (
    ALPHA,
    CONV,
    LORA,
    MARKS,
    NOISE,
    OPTIONS,
    PLAIN,
    QUANTIZED,
    RANK,
    TEXT,
    Case,
    altered,
    attached,
    base,
    battery,
    learned,
    predicted,
    read,
    saved,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from personalize import methods
from personalize.commands.export import targets
from personalize.common.errors import UserError
from personalize.core import rng
from personalize.formats import lora
from personalize.methods import peft_layers, textual_inversion
from personalize.methods.lora import CONVOLUTIONS, fuse_adapters, load_adapter


@battery([case for case in PLAIN if case.methods[0] not in ("full", "custom-diffusion")])
def test_a_fused_model_is_plain_and_draws_the_same(folder, case):
    trained = learned(folder, case).model
    model, bare = copy.deepcopy(trained, {id(trained.family): trained.family}), read(folder, "float32")
    fuse_adapters(model)
    textual_inversion.fuse_embeddings(model)
    for part, network in model.networks.items():
        plain, fused = bare.networks[part].state_dict(), network.state_dict()
        assert plain.keys() == fused.keys() and {type(m) for m in network.modules()} == {
            type(m) for m in bare.networks[part].modules()
        }
        assert all(plain[k].shape == fused[k].shape for k in plain if "token_embedding" not in k)
        if part != "unet":
            assert (
                len(fused[next(k for k in plain if "token_embedding" in k)])
                == len(model.tokenizers[part])
                == network.config.vocab_size
            )
    assert (predicted(model, case.prompts()[:2]) - predicted(trained, case.prompts()[:2])).abs().max() < 1e-5


def test_lora_adds_alpha_over_rank_times_b_a_in_float64(tiny_sd, tmp_path):
    case, doubled = Case(("lora",), (TEXT,)), base(tiny_sd)
    saved(tiny_sd, case, tmp_path)
    methods.load(doubled, tmp_path, case.recipe())
    file, merged = load_file(tmp_path / LORA), base(tiny_sd)
    for key in [k for k in file if k.endswith(".lora_A.weight")]:
        part, _, layer = key.removesuffix(".lora_A.weight").partition(".")
        target = merged.networks[part].double().get_submodule(layer.removeprefix("text_model."))
        a, b = file[key].double(), file[key.replace("lora_A", "lora_B")].double()
        assert a.shape[0] == b.shape[1] == RANK
        target.weight.data += ALPHA / RANK * (b @ a)
    outputs = []
    for each in (doubled, merged):
        each.dtype = torch.float64
        for network in each.networks.values():
            network.double()
        with torch.no_grad():
            outputs.append(each.predict(NOISE.double(), torch.tensor([40, 700]), each.encode_prompts(case.prompts()[:2])))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6  # timestep embeddings are float32 in both


def test_convolutions_of_the_blocks_are_adapted_and_no_others(tiny_sd, tiny_sdxl):
    for folder in (tiny_sd, tiny_sdxl):
        layers = peft_layers.adaptable_layers(read(folder, "float32").unet)
        blocks = {k for k, v in layers.items() if isinstance(v, torch.nn.Conv2d) and k.startswith(("down", "mid", "up"))}
        found = set(peft_layers.matching_layers(read(folder, "float32").unet, list(CONVOLUTIONS)))
        assert found == {k for k in blocks if not k.endswith(("proj_in", "proj_out"))} and len(found) > 10


def test_oft_turns_inputs_and_keeps_their_lengths(tiny_sd):
    """W R (W R)^T = W W^T for a rotation R, also far from the identity, where a truncated series would be none."""
    model, case = base(tiny_sd), Case(("oft",))
    attached(model, case.recipe())
    bare = {k: v.weight.clone() for k, v in peft_layers.matching_layers(model.unet, list(case.recipe().lora.targets)).items()}
    for tensor in methods.state(model, case.recipe()).values():
        tensor.copy_(torch.randn(tensor.shape, generator=rng.generator(0, "turn")))
    fuse_adapters(model)
    for name, weight in bare.items():
        turned = model.unet.get_submodule(name).weight
        assert not torch.allclose(turned, weight, atol=0.01)
        assert torch.allclose(turned @ turned.T, weight @ weight.T, atol=1e-5)


@pytest.mark.parametrize("more", [(), (CONV,)], ids=["linear", "convolutions"])
def test_a_fresh_dora_is_the_identity_in_bfloat16(tiny_sd, more):
    """In PEFT's own rounding every magnitude is up to 0.4 % off, and an image moves by 1 %."""
    model, prompts = base(tiny_sd, "bfloat16"), ["a", "b"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = predicted(read(tiny_sd, "bfloat16"), prompts)
        attached(model, Case(("lora",), ("lora.dora=true", *more)).recipe())
        difference = (predicted(model, prompts) - expected).norm() / expected.norm()
    assert difference < 2e-3
    for module in model.unet.modules():
        for dora in getattr(module, "lora_magnitude_vector", {}).values():
            exact = module.get_base_layer().weight.float().flatten(1).norm(dim=1)
            torch.testing.assert_close(dora.weight.flatten(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [(), (CONV,)], ids=["linear", "convolutions"])
def test_a_fresh_boft_is_the_identity_in_bfloat16_and_leaves_plain_layers_when_merged(tiny_sd, more):
    """PEFT takes a bias away and adds it again, which alone moves an image by 1 %."""
    model, prompts = base(tiny_sd, "bfloat16"), ["a", "b"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = predicted(read(tiny_sd, "bfloat16"), prompts)
        attached(model, Case(("boft",), more).recipe())
        assert torch.equal(predicted(model, prompts), expected)
        fuse_adapters(model)
        assert torch.equal(predicted(model, prompts), expected)
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_boft_on_convolutions_changes_nothing_when_fresh_and_oft_is_refused_there(tiny_sd):
    model = base(tiny_sd)
    attached(model, Case(("boft",), (CONV,)).recipe())
    assert torch.equal(predicted(model, ["a", "b"]), predicted(read(tiny_sd, "float32"), ["a", "b"]))
    with pytest.raises(UserError, match="lora.conv = true does not go with oft"):
        attached(base(tiny_sd), Case(("oft",), (CONV,)).recipe())


WRONG = {
    "width": lambda t: {k: torch.zeros(v.shape[0], 99) if "attn2.to_k.lora_A" in k else v for k, v in t.items()},
    "name": lambda t: {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in t.items()},
    "half": lambda t: dict(list(t.items())[:-1]),
    "fewer": lambda t: {k: v for k, v in t.items() if "mid_block" not in k},
    "rank": lambda t: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_lora_for_another_base_or_of_another_rank_is_refused(tiny_sd, tmp_path, name):
    case = Case(("lora",))
    recipe = saved(tiny_sd, case, tmp_path)
    altered(tmp_path / LORA, WRONG[name])
    with pytest.raises(UserError, match="another base|not whole|expected|only one half"):
        methods.load(base(tiny_sd), tmp_path, recipe)


def test_an_adapter_of_another_rank_kind_or_layers_than_the_recipe_is_refused(tiny_sd, tiny_sdxl, tmp_path):
    lora_case = Case(("lora",))
    saved(tiny_sd, lora_case, tmp_path)
    for setting, said in (
        ("lora.rank=5", "lora.rank = 3, expected is the recipe's 5"), ("lora.alpha=1", "alpha 7.5, expected is the recipe's 1"),
        ("lora.dora=true", "lora.dora = False, expected is the recipe's True"),
        ("lora.targets=to_q", "expected are names such as"),
        (TEXT, "has adapters of unet, expected are text_encoder and unet"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            methods.load(base(tiny_sd), tmp_path, lora_case.recipe(setting))
    with pytest.raises(UserError, match="made for another base"):
        methods.load(base(tiny_sdxl), tmp_path, lora_case.recipe())
    saved(tiny_sd, Case(("lokr",)), tmp_path / "lokr")
    with pytest.raises(UserError, match="is a lokr, but train.methods has lora"):
        methods.start_from(
            attached(base(tiny_sd), lora_case.recipe()).model, lora_case.recipe(f"train.init_from={tmp_path}/lokr")
        )


@pytest.mark.parametrize("kind", ["lokr", "loha", "oft", "boft"])
def test_a_peft_folder_for_another_base_or_rank_is_refused(tiny_sd, tiny_sdxl, tmp_path, kind):
    recipe = saved(tiny_sd, Case((kind,)), tmp_path)
    with pytest.raises(UserError, match="another base.*expected"):
        methods.load(base(tiny_sdxl), tmp_path, recipe)
    altered(tmp_path / "unet_adapter" / "adapter_model.safetensors", lambda t: {k: v[..., :1] for k, v in t.items()})
    with pytest.raises(UserError, match="another base.*expected"):
        methods.load(base(tiny_sd), tmp_path, recipe)


def test_targets_and_blocks_that_fit_no_layer_are_named(tiny_sd):
    for settings, said in (
        (["lora.targets=no_such"], "lora.targets = .*'no_such'"),
        (["lora.targets=to_q,to_kk"], "'to_kk'; did you mean 'to_k'"),
        (["lora.targets=attn1"], "'attn1'"),
        (["train.methods=oft", "lora.block=5"], "lora.block = 5 does not divide the width 16"),
        (["train.methods=boft", "lora.block=32"], "Give a divisor of 16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            attached(base(tiny_sd), Case(("lora",)).recipe(*settings))


def deltas(folder, case, place):
    """What a saved adapter adds to every weight of the U-Net."""
    model, bare = base(folder), read(folder, "float32").unet.state_dict()
    load_adapter(model, place, name="alone", weight=1.0)
    fuse_adapters(model)
    return {k: v - bare[k] for k, v in model.unet.state_dict().items()}


def test_adapters_of_several_kinds_add_up_by_their_weights(tiny_sd, tmp_path):
    """A run's own result and two more: W + d + 0.5 d1 - 0.25 d2."""
    cases, weights = [Case(("loha",)), Case(("lora",), (CONV,)), Case(("lokr",))], (1.0, 0.5, -0.25)
    summed, together = base(tiny_sd), base(tiny_sd)
    for i, (case, weight) in enumerate(zip(cases, weights, strict=True)):
        recipe = saved(tiny_sd, case, tmp_path / f"{i}" / "model")
        for key, delta in deltas(tiny_sd, case, tmp_path / f"{i}").items():
            summed.unet.state_dict()[key].add_(weight * delta)
        if i == 0:
            methods.load(together, tmp_path / "0" / "model", recipe)
        else:
            load_adapter(together, tmp_path / f"{i}", name=f"file{i}", weight=weight)
    difference = (predicted(together, ["a", "b"]) - predicted(summed, ["a", "b"])).abs().max()
    assert (
        difference
        < 1e-5
        < 0.01
        < (predicted(together, ["a", "b"]) - predicted(read(tiny_sd, "float32"), ["a", "b"])).abs().max()
    )
    fuse_adapters(together)
    assert (predicted(together, ["a", "b"]) - predicted(summed, ["a", "b"])).abs().max() < 1e-5


@battery([Case(("lora",), (TEXT,)), *(case for case in OPTIONS if case.methods == ("lora",))])
def test_a_kohya_file_is_the_diffusers_file(tiny_sd, tmp_path, case):
    saved(tiny_sd, case, tmp_path)
    names = {part: set(peft_layers.adaptable_layers(network)) for part, network in read(tiny_sd, "float32").networks.items()}
    made = lora.read_lora(tmp_path / LORA, names, "tiny")
    lora.write_kohya(tmp_path / "kohya.safetensors", made, family="sd")
    sources = [tmp_path, tmp_path / LORA, tmp_path / "kohya.safetensors"]
    for source in sources:
        model = base(tiny_sd)
        load_adapter(model, source, name="it", weight=1.0)
        assert (
            predicted(model, case.prompts()[:2]) - predicted(learned(tiny_sd, case).model, case.prompts()[:2])
        ).abs().max() < 1e-5
    engine = attached(base(tiny_sd), case.recipe())
    methods.start_from(engine.model, case.recipe(f"train.init_from={tmp_path / 'kohya.safetensors'}"))
    assert all(
        torch.equal(v, learned(tiny_sd, case).kept[MARKS[-1]][0][k])
        for k, v in methods.state(engine.model, case.recipe()).items()
    )


def test_a_folder_of_peft_is_what_peft_draws(tiny_sd, tmp_path):
    model, theirs = base(tiny_sd), base(tiny_sd)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_v", "conv2"], use_rslora=True, init_lora_weights=False)
    wrapped = get_peft_model(theirs.unet, config)
    wrapped.save_pretrained(tmp_path / "own")
    load_adapter(model, tmp_path / "own", name="it", weight=1.0)
    assert (predicted(model, ["a", "b"]) - predicted(theirs, ["a", "b"])).abs().max() < 1e-5
    assert (predicted(model, ["a", "b"]) - predicted(read(tiny_sd, "float32"), ["a", "b"])).abs().max() > 0.01


@pytest.mark.parametrize("kind", methods.ADAPTERS)
def test_an_adapter_works_on_a_half_precision_base(tiny_sd, tmp_path, kind):
    case = Case((kind,))
    saved(tiny_sd, case, tmp_path)
    model = base(tiny_sd, "bfloat16")
    plain, taught = predicted(model, case.prompts()[:2]).float(), predicted(learned(tiny_sd, case).model, case.prompts()[:2])
    load_adapter(model, tmp_path, name="it", weight=1.0)
    now = predicted(model, case.prompts()[:2]).float()
    assert (now - taught).norm() < 0.5 * (plain - taught).norm()
    fuse_adapters(model)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert (predicted(model, case.prompts()[:2]).float() - taught).norm() < 0.5 * (plain - taught).norm()


def test_adapters_that_cannot_be_weighed_found_or_fused_say_so(tiny_sd, tmp_path):
    saved(tiny_sd, Case(("oft",)), tmp_path / "oft")
    with pytest.raises(UserError, match="is oft, which has no weight"):
        load_adapter(base(tiny_sd), tmp_path / "oft", name="it", weight=0.5)
    with pytest.raises(UserError, match="there is no adapter"):
        load_adapter(base(tiny_sd), tmp_path / "nothing", name="it", weight=1.0)
    with pytest.raises(UserError, match="there is no adapter in it"):
        load_adapter(base(tiny_sd), tiny_sd, name="it", weight=1.0)
    with pytest.raises(UserError, match="is quantized"):
        fuse_adapters(learned(tiny_sd, QUANTIZED[0]).model)


CHANGED = {  # key as LyCORIS and PEFT write it -> the parameter it changes, by name
    "lora_unet_conv_in.diff": ("unet", "conv_in.weight"),
    "lora_unet_conv_in.diff_b": ("unet", "conv_in.bias"),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1.w_norm": ("unet", "{}norm1.weight"),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1.b_norm": ("unet", "{}norm1.bias"),
    "lora_unet_conv_norm_out.w_norm": ("unet", "conv_norm_out.weight"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.bias": ("unet", "{}attn1.to_out.0.bias"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.diff": ("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
    "lora_te_text_model_final_layer_norm.b_norm": ("text_encoder", "final_layer_norm.bias"),
}
BLOCK = "mid_block.attentions.0.transformer_blocks.0."


def with_changes(model, path):
    """A file that changes parameters of the base, beside a LoRA of one layer of rank 2 and alpha 3 -> its changes by key."""
    g = rng.generator(0, "changes")
    params = {key: model.networks[part].get_parameter(name.format(BLOCK)) for key, (part, name) in CHANGED.items()}
    changes = {key: 0.1 * torch.randn(p.shape, generator=g) for key, p in params.items()}
    stem = f"unet.{BLOCK}attn1.to_out.0"
    width = len(params[f"{stem}.lora_B.bias"])
    halves = {f"{stem}.lora_A.weight": torch.randn(2, width, generator=g), f"{stem}.lora_B.weight": torch.zeros(width, 2)}
    save_file(changes | halves | {f"{stem}.alpha": torch.tensor(3.0)}, path)
    return changes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_plain_changes_of_a_file_are_added_as_by_hand(tiny_sd, tmp_path, dtype, weight):
    model, by_hand = base(tiny_sd, dtype), base(tiny_sd, dtype)
    for key, change in with_changes(model, tmp_path / "it.safetensors").items():
        part, name = CHANGED[key]
        p = by_hand.networks[part].get_parameter(name.format(BLOCK))
        scale = 3 / 2 if "lora_B" in key else 1
        p.data = (p.data.float() + weight * (scale * change)).to(p.dtype)
    load_adapter(model, tmp_path / "it.safetensors", name="it", weight=weight)
    fuse_adapters(model)  # whose lora_B is zero
    for part, network in by_hand.networks.items():
        state = model.networks[part].state_dict()
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items()), part
    assert torch.equal(predicted(model, ["a", "b"]), predicted(by_hand, ["a", "b"]))


def test_plain_changes_go_under_adapters_that_are_there_already(tiny_sd, tmp_path):
    saved(tiny_sd, Case(("lora",)), tmp_path / "first")
    models = [base(tiny_sd) for _ in range(2)]
    with_changes(models[0], tmp_path / "it.safetensors")
    for model, order in zip(models, (["first", "it.safetensors"], ["it.safetensors", "first"]), strict=True):
        for k, name in enumerate(order):
            load_adapter(model, tmp_path / name, name=f"file{k}", weight=1.0)
    torch.testing.assert_close(*(predicted(model, ["a", "b"]) for model in models), rtol=1e-5, atol=1e-6)


def test_plain_changes_that_do_not_fit_or_cannot_train_are_refused_by_name(tiny_sd, tmp_path):
    path, case = tmp_path / "it.safetensors", Case(("lora",))
    for key, change, said in (
        ("lora_unet_conv_in.diff", torch.ones(2, 2), "its change of conv_in.weight has the shape \\(2, 2\\), expected is"),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b",
            torch.ones(2),
            "bias of .*to_q, which has none",
        ),
    ):
        save_file({key: change}, path)
        with pytest.raises(UserError, match=f"it.safetensors was made for another base .*{said}"):
            load_adapter(base(tiny_sd), path, name="it", weight=1.0)
    with_changes(base(tiny_sd), path)
    recipe = case.recipe(f"train.init_from={path}")
    with pytest.raises(UserError, match="it.safetensors holds 6 changes of weights .*such as of unet.conv_in.bias, .*--lora"):
        methods.start_from(attached(base(tiny_sd), recipe).model, recipe)
    saved(tiny_sd, case, tmp_path / "own")
    altered(tmp_path / "own" / LORA, lambda t: t | {"bundle_emb.zqv.string_to_param.*": torch.ones(1, 32)})
    recipe = case.recipe(f"train.init_from={tmp_path / 'own'}")
    with pytest.raises(UserError, match="holds embeddings of 'zqv', from which no adapter can go on.*Bundle Embeddings"):
        methods.start_from(attached(base(tiny_sd), recipe).model, recipe)


def test_training_starts_from_what_a_file_holds(tiny_sd, tmp_path):
    word, adapter, pivotal = (Case(names) for names in (("textual-inversion",), ("lora",), ("textual-inversion", "lora")))
    saved(tiny_sd, word, tmp_path / "word"), saved(tiny_sd, adapter, tmp_path / "adapter")
    for source, case in ((tmp_path / "word" / "learned_embeds.safetensors", word), (tmp_path / "adapter", adapter)):
        recipe = pivotal.recipe(f"train.init_from={source}")
        model = attached(base(tiny_sd), recipe).model
        fresh = {k: v.clone() for k, v in methods.state(model, recipe).items()}
        methods.start_from(model, recipe)
        taught = learned(tiny_sd, case).kept[MARKS[-1]][0]
        for key, value in methods.state(model, recipe).items():
            assert torch.equal(value, taught.get(key, fresh[key]))
    for source, case, said in (
        (tmp_path / "none", word, "no such file"), (tmp_path / "word", adapter, "holds nothing for lora"),
        (tmp_path / "adapter", word, "holds nothing for textual-inversion"),
        (tmp_path / "adapter", Case(("full",)), "give it as base"),
        (tmp_path / "word", Case(("textual-inversion",), ("embedding.vectors=2",)), "Set embedding.vectors = 1"),
    ):  # fmt: skip
        recipe = case.recipe(f"train.init_from={source}")
        with pytest.raises(UserError, match=said):
            methods.start_from(attached(base(tiny_sd), recipe).model, recipe)


@battery([Case((kind,), more) for kind in ("lokr", "loha") for more in ((), (CONV,), (TEXT, "lora.rank=40"))])
def test_a_file_in_lycoris_form_draws_and_trains_on_as_the_folder(tiny_sd, tmp_path, case):
    """alpha is not the rank; rank 40 makes LoKr's matrices whole. Weights, names and scale: tests/formats/test_lycoris.py."""
    saved(tiny_sd, case, tmp_path)
    trained, file = learned(tiny_sd, case).model, tmp_path / "kohya.safetensors"
    targets._write_kohya(trained, case.recipe(), targets.Form("kohya", False, False), file)
    own = predicted(trained, case.prompts()[:2])
    plain = predicted(base(tiny_sd), case.prompts()[:2])
    renamed = {key.replace("lora_unet_", "lycoris_").replace("lora_te_", "lycoris_"): v for key, v in load_file(file).items()}
    save_file(renamed, tmp_path / "wrapper.safetensors")
    for source in (file, tmp_path / "wrapper.safetensors"):
        model = base(tiny_sd)
        load_adapter(model, source, name="it", weight=1.0)
        assert (predicted(model, case.prompts()[:2]) - own).abs().max() < 1e-5 < 0.01 < (plain - own).abs().max()
        fuse_adapters(model)
        assert (predicted(model, case.prompts()[:2]) - own).abs().max() < 1e-5
    engine = attached(base(tiny_sd), case.recipe())
    methods.start_from(engine.model, case.recipe(f"train.init_from={file}"))
    assert (predicted(engine.model, case.prompts()[:2]) - own).abs().max() < 1e-5


def test_a_file_in_lycoris_form_has_a_weight_and_a_kind(tiny_sd, tmp_path):
    case = Case(("loha",))
    saved(tiny_sd, case, tmp_path)
    trained, file = learned(tiny_sd, case).model, tmp_path / "kohya.safetensors"
    targets._write_kohya(trained, case.recipe(), targets.Form("kohya", False, False), file)
    model, folder = base(tiny_sd), base(tiny_sd)
    load_adapter(model, file, name="it", weight=0.5)
    load_adapter(folder, tmp_path, name="it", weight=0.5)
    assert (predicted(model, case.prompts()[:2]) - predicted(folder, case.prompts()[:2])).abs().max() < 1e-5
    for other, words in (
        (Case(("lora",)), "is a loha, but train.methods has lora"),
        (Case(("loha",), (CONV,)), "other layers"),
    ):
        with pytest.raises(UserError, match=words):
            methods.start_from(attached(base(tiny_sd), other.recipe()).model, other.recipe(f"train.init_from={file}"))
    wider = Case(("loha",), ("lora.rank=4",))
    with pytest.raises(UserError, match="layer .* has the rank 3, expected is the recipe's 4. Set lora.rank = 3"):
        methods.start_from(attached(base(tiny_sd), wider.recipe()).model, wider.recipe(f"train.init_from={file}"))
