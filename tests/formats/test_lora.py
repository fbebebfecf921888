"""LoRA files of every make, in one form."""

import json
import re

import pytest
import tiny_releases as tiny
import torch
from adapters_made import ATTENTION, adapter, kohya
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_releases import same

from personalize.common.errors import UserError
from personalize.formats import lora, lora_names, safetensors_io


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_lora_weights.safetensors"


def equal(a, b):
    return same(a.tensors, b.tensors) and a.ranks == b.ranks and a.alphas == b.alphas


def read(path, family="sd1"):
    return lora.read_lora(path, tiny.layers(family), "base")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_written_is_what_is_read(path, family, dora):
    """Every layer, convolutions and embeddings of time too; alpha is not the rank, and both differ by layer."""
    made = adapter(family, dora=dora)
    assert len(made.ranks) > 200
    kohya(path, made, family)
    assert equal(read(path, family), made)
    lora.write_diffusers(path, made)
    assert equal(read(path, family), made)


def test_the_names_that_kohyas_trainer_and_web_uis_expect(path):
    sd1 = kohya(path, adapter("sd1"), "sd1")
    for stem in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_up_blocks_1_resnets_2_conv_shortcut",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_1_mlp_fc2",
    ):
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= set(sd1)
        assert sd1[f"{stem}.alpha"].shape == ()
    sdxl = kohya(path, adapter("sdxl"), "sdxl")
    for stem in (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_1_transformer_blocks_2_ff_net_0_proj",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_0_in_layers_2",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_2",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1",
        "lora_te2_text_projection",
    ):
        assert f"{stem}.lora_up.weight" in sdxl, stem
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["ss_network_module"] == "networks.lora" and said["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_lora_of_sd2_is_told_by_the_width_of_its_text(path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, version in ((768, "sd_v1"), (1024, "sd_v2")):
        halves = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(4, 2)}
        lora.write_kohya(path, lora.Adapter(halves, {name: 2}, {name: 1.0}), family="sd")
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_base_model_version"] == version


def test_the_released_sdxl_is_known_without_its_layers():
    layers = set(lora_names.sdxl_layers())
    assert "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k" in layers and len(layers) > 1000
    name = lora_names.kohya_name("unet", "up_blocks.0.attentions.2.proj_in", sdxl=True, original=lora_names.unet_layers(layers))
    assert name == "lora_unet_output_blocks_2_1_proj_in"


def test_sdxl_in_diffusers_names_is_read_as_well(path):
    made = adapter("sdxl", where=r"unet\..*attn")
    lora.write_kohya(path, made, family="sd")
    assert equal(read(path, "sdxl"), made)


def test_a_layer_without_a_name_at_kohyas_is_refused(path):
    made = lora.Adapter({}, {"unet.motion.to_q": 1}, {"unet.motion.to_q": 1.0})
    with pytest.raises(UserError, match="unet.motion.to_q has no name"):
        lora.write_kohya(path, made, family="sdxl")


@pytest.mark.parametrize(
    "spelling",
    [
        lambda key: key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: re.sub(r"attn(\d)\.to_(\w+?)(\.0)?\.lora_A", r"attn\1.processor.to_\2_lora.down", key),
        lambda key: key.removeprefix("unet."),
    ],
    ids=["lora.down", "adapter name", "processor", "bare"],
)
def test_older_spellings_of_diffusers_are_read(path, spelling):
    made = adapter("sd1", where=r"unet\..*attn\d", alpha=lambda k: float(2 + k % 3))
    renamed = {}
    for key, value in made.tensors.items():
        if "processor" in (new := spelling(key.replace("lora_B", "lora_A"))) and "lora_B" in key:
            renamed[new.replace("_lora.down", "_lora.up")] = value
        else:
            renamed[spelling(key)] = value
    assert set(renamed) != set(made.tensors) and len(renamed) == len(made.tensors)
    save_file(renamed, path)
    assert equal(read(path), made)


def spelt(made, rename):
    """The tensors of a U-Net's LoRA with layers renamed by `rename(diffusers' name, single files' name)`."""
    original = lora_names.unet_layers(tiny.layers("sd1")["unet"])
    split = {key: key.removeprefix("unet.").split(".lora_") for key in made.tensors}
    return {f"{rename(name, original[name])}.lora_{end}": made.tensors[key] for key, (name, end) in split.items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name, original: f"lycoris_{name.replace('.', '_')}",
        lambda name, original: f"unet.{original}",
        lambda name, original: f"diffusion_model.{original}",
        lambda name, original: f"model.diffusion_model.{original}",
        lambda name, original: f"diffusion_model.{name}",
        lambda name, original: f"lora_unet_{original.replace('.', '_')}",
    ],
    ids=[
        "lycoris_",
        "unet.input_blocks",
        "diffusion_model.input_blocks",
        "model.",
        "diffusion_model.down_blocks",
        "lora_unet_",
    ],
)
@pytest.mark.parametrize("halves", ["lora_A lora_B", "lora_down lora_up", "lora_A.default_0 lora_B.default_0"])
def test_spellings_of_other_programs_are_read(path, rename, halves):
    """As ComfyUI, LyCORIS' wrapper and PEFT with a named adapter write them; every layer of the U-Net."""
    made = adapter("sd1", where=r"^unet\.", rank=lambda k: 2, alpha=lambda k: 2.0)
    down, up = halves.split()
    renamed = {key.replace("lora_A", down).replace("lora_B", up): v for key, v in spelt(made, rename).items()}
    assert len(renamed) == len(made.tensors) and not set(renamed) & set(made.tensors)
    save_file(renamed, path)
    assert equal(read(path), made)


def test_lycoris_names_of_text_encoders_are_read(path):
    made = adapter("sd1", where=r"^text_encoder\.", rank=lambda k: 2, alpha=lambda k: 2.0)
    keys = {key: re.split(r"\.(?=lora_)", key.partition(".")[2]) for key in made.tensors}
    tensors = {f"lycoris_{layer.replace('.', '_')}.{end}": made.tensors[key] for key, (layer, end) in keys.items()}
    save_file(tensors, path)
    assert equal(read(path), made)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("ending", [".q_proj.lora_linear_layer.down", ".to_q_lora.down", ".q_proj.lora_A"])
def test_text_layers_are_found_with_and_without_text_model(path, prefix, ending):
    stem = f"text_encoder.{prefix}encoder.layers.1.self_attn"
    tensors = {f"{stem}{ending}.weight": torch.ones(2, 16)}
    tensors |= {f"{stem}{ending.replace('down', 'up').replace('_A', '_B')}.weight": torch.ones(16, 2)}
    save_file(tensors, path)
    (name,) = read(path).ranks
    assert name.removeprefix("text_encoder.") in tiny.layers("sd1")["text_encoder"]
    older = {"text_encoder": {f"text_model.{layer}" for layer in tiny.layers("sd1")["text_encoder"]}}
    assert list(lora.read_lora(path, older, "base").ranks) == ["text_encoder.text_model.encoder.layers.1.self_attn.q_proj"]


def test_kohyas_text_keys_belong_to_the_first_encoder_in_both_spellings(path):
    for head in ("lora_te_", "lora_te1_"):
        stem = f"{head}text_model_encoder_layers_0_mlp_fc1"
        save_file({f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(32, 2)}, path)
        found = read(path)
        assert list(found.ranks) == ["text_encoder.encoder.layers.0.mlp.fc1"]
        assert found.alphas == found.ranks  # where no alpha is said


def test_peft_files_take_alpha_from_the_settings_beside_them(path):
    made = adapter("sd1", where=r"unet\..*attn1", rank=lambda k: 4, alpha=lambda k: 4.0)
    bare = {"base_model.model." + key.removeprefix("unet."): value for key, value in made.tensors.items()}
    save_file(bare, path)
    with pytest.raises(UserError, match="alpha in adapter_config.json"):
        read(path)
    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {special: 6, "attn1.to_v": 3, "^to_k": 9}, "use_rslora": True}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    found = read(path)
    assert same(found.tensors, made.tensors)
    assert found.alphas[f"unet.{special}"] == 6 * 2
    assert {v for key, v in found.alphas.items() if key.endswith("to_v")} == {3 * 2.0}
    assert {v for key, v in found.alphas.items() if key.endswith("to_k")} == {2 * 2.0}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {"(a+)+$": 1}}))
    with pytest.raises(UserError, match="only plain names"):
        read(path)


@pytest.mark.parametrize("name", ["text_encoder_2", "text_encoder_2_adapter"])
def test_a_file_in_the_folder_of_a_part_is_of_that_part(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    stem = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(64, 2)}, folder / "a.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"lora_alpha": 1}')
    assert read(folder / "a.safetensors", "sdxl").alphas == {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": 1.0}


def test_a_lora_of_another_base_says_how_much_does_not_fit(path):
    kohya(path, adapter("sdxl", where=ATTENTION), "sdxl")
    with pytest.raises(
        UserError, match=r"made for another base than 'base': \d+ of its \d+ tensors .*a name that would: 'lora_"
    ):
        read(path)
    flux = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{flux}.lora_A.weight": torch.ones(2, 4), f"{flux}.lora_B.weight": torch.ones(4, 2)}, path)
    with pytest.raises(UserError, match="2 of its 2 tensors belong to no layer"):
        read(path)


@pytest.mark.parametrize(
    "key, word",
    [
        ("lora_unet_x.hada_w1_a", "a LoHa or LoKr beside a LoRA"),
        ("lora_unet_x.lokr_w1", "a LoHa or LoKr beside a LoRA"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("lora_unet_x.diff", "made for another base .*'lora_unet_x.diff'"),
        ("lora_unet_x.oft_blocks", "an OFT"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("emb_params", "not a LoRA"),
        ("lora_unet_x.b_norm", "made for another base .*'lora_unet_x.b_norm'"),
        ("unet.x.lora_B.default_0.bias", "not a LoRA"),
        ("bundle_emb.my_dog.clip_l", "not a LoRA"),
        ("base_model.model.conv_in.modules_to_save.weight", "whole modules"),
        ("diffusion_model.img_in.set_weight", "whole modules"),
    ],
)
def test_other_files_are_refused_by_name(path, key, word):
    save_file({key: torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=word):
        read(path)
    with pytest.raises(UserError, match="is a pickle"):
        read(path.with_suffix(".pt"))


@pytest.mark.parametrize("key, kind", [
    ("lora_unet_x.diff_b", "made for another base than 'base': 1 of its 3 tensors .*'lora_unet_x.diff_b'"),
    ("unet.conv_in.weight", "holds more than a LoRA of 'base': 1 of its 3 tensors .*'unet.conv_in"),
    ("lora_xyz_mid_block_attentions_0_proj_in.lora_up.weight", "spells layers that 'base' has in a way unknown here"),
    ("unknown.mid_block.attentions.0.proj_in.lora_A.weight", "spells layers that 'base' has in a way unknown here"),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "was made for another base than 'base': 1 of its 3"),
    ("lora_unet_single_blocks_0.lora_up.weight", "was made for another base than 'base': 1 of its 3"),
])  # fmt: skip
def test_what_is_beside_a_lora_is_told_apart(path, key, kind):
    save_file(GOOD | {key.format(STEM): torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=kind):
        read(path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_changes_and_bundled_embeddings_are_read_beside_a_lora_and_alone(path, family):
    """In kohya's names of layers and norms, SDXL's original ones among them, with the bias of PEFT's lora_B by its scale."""
    layers = {part: names | tiny.norms(family)[part] for part, names in tiny.layers(family).items()}
    norm, text = "mid_block.attentions.0.transformer_blocks.0.norm2", "encoder.layers.0.layer_norm1"
    conv, to_q = "mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    original = lora_names.unet_layers(layers["unet"]) if family == "sdxl" else {}
    key = {name: "lora_unet_" + original.get(name, name).replace(".", "_") for name in (norm, conv, to_q)}
    made = {
        f"{key[conv]}.diff": torch.full((3, 3), 2.0),
        f"{key[conv]}.diff_b": torch.ones(3),
        f"{key[conv]}.alpha": torch.ones(()),
    }
    made |= {f"{key[norm]}.w_norm": torch.ones(5), f"{key[norm]}.b_norm": torch.zeros(5)}
    made |= {f"lora_te{'1' * (family == 'sdxl')}_text_model_{text.replace('.', '_')}.w_norm": torch.ones(7)}
    made |= {"bundle_emb.zqv.string_to_param.*": torch.ones(2, 8), "bundle_emb.abc.clip_l": torch.ones(8)}
    save_file(made, path)
    found = lora.read_lora(path, layers, "base")
    assert not found.ranks and found.words == ("abc", "zqv")
    assert {key: value.shape.numel() for key, value in found.differences.items()} == {
        f"unet.{conv}.weight": 9, f"unet.{conv}.bias": 3, f"unet.{norm}.weight": 5, f"unet.{norm}.bias": 5,
        f"text_encoder.{text}.weight": 7,
    }  # fmt: skip
    halves = {f"{key[to_q]}.lora_down.weight": torch.ones(2, 32), f"{key[to_q]}.lora_up.weight": torch.ones(32, 2)}
    save_file(made | halves | {f"{key[to_q]}.lora_up.bias": torch.ones(32), f"{key[to_q]}.alpha": torch.tensor(3.0)}, path)
    beside = lora.read_lora(path, layers, "base")
    assert list(beside.ranks) == [f"unet.{to_q}"] and len(beside.differences) == 6
    assert torch.equal(beside.differences[f"unet.{to_q}.bias"], torch.full((32,), 1.5))
    save_file(made | {f"{key[conv]}.diff": torch.full((3, 3), float("nan"))}, path)
    with pytest.raises(UserError, match="diff' holds a value that is not a finite number"):
        lora.read_lora(path, layers, "base")


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{STEM}.lora_down.weight": torch.ones(2, 32), f"{STEM}.lora_up.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "more, word",
    [
        ({f"{STEM}.lora_up.weight": torch.ones(32, 3)}, "do not fit each other"),
        ({f"{STEM}.lora_up.weight": torch.ones(32, 2, 1, 1)}, "do not fit each other"),
        ({f"{STEM}.lora_up.weight": torch.ones(0, 2)}, "do not fit each other"),
        ({f"{STEM}.lora_down.weight": torch.ones(2)}, "do not fit each other"),
        ({f"{STEM}.alpha": torch.ones(2)}, "not one finite number"),
        ({f"{STEM}.alpha": torch.tensor(float("nan"))}, "not a finite number"),
        ({f"{STEM}.dora_scale": torch.ones(1, 32)}, "scales the inputs"),
        ({f"{STEM}.dora_scale": torch.ones(31, 1)}, "scales the inputs"),
        ({f"{STEM.replace('to_q', 'to_k')}.lora_down.weight": torch.ones(2, 32)}, "only one half"),
        ({f"{STEM}.unknown": torch.ones(1)}, "holds more than a LoRA"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32)}, "twice"),
    ],
)
def test_a_layer_that_is_not_whole_is_refused(path, more, word):
    save_file(GOOD, path)
    assert read(path).ranks == {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}
    save_file(GOOD | more, path)
    with pytest.raises(UserError, match=word):
        read(path)


@pytest.mark.parametrize(
    "header", ["[]", "{", "[" * 100_000, '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}', '{"unet.alpha_pattern": 3}'],
    ids=lambda h: h[:30],
)  # fmt: skip
def test_a_hostile_header_is_refused(path, header):
    save_file({f"unet.{k}": v for k, v in _dotted().items()}, path, metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError, match="pytorch_lora_weights"):
        read(path)


def _dotted():
    stem = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}


def test_the_same_adapter_gives_the_same_bytes(path):
    made = adapter("sd1", where=ATTENTION)
    for write in (lora.write_diffusers, lambda path, a: lora.write_kohya(path, a, family="sd", metadata={"z": "1", "b": "2"})):
        files = []
        for _ in range(2):
            write(path, made)
            files.append(path.read_bytes())
        assert files[0] == files[1]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_with_its_scale_in_the_weights_a_lora_is_the_same_update_to_who_reads_no_header(path, dora):
    made = adapter("sd1", dora=dora)
    baked = lora.with_scale_in_weights(made)
    assert baked.alphas == baked.ranks and any(made.alphas[name] != made.ranks[name] for name in made.ranks)
    for name, rank in made.ranks.items():
        update = made.tensors[f"{name}.lora_B.weight"].flatten(1) @ made.tensors[f"{name}.lora_A.weight"].flatten(1)
        plain = baked.tensors[f"{name}.lora_B.weight"].flatten(1) @ baked.tensors[f"{name}.lora_A.weight"].flatten(1)
        torch.testing.assert_close(plain, update * made.alphas[name] / rank)
    lora.write_diffusers(path, baked)
    header = json.loads(safetensors_io.read_header(path)["metadata"][lora.HEADER])
    assert header["unet.lora_alpha"] == header["unet.r"] and header["unet.alpha_pattern"] == header["unet.rank_pattern"]


@pytest.mark.parametrize("family, is_v2", [("sd1", "False"), ("sd2", "True"), ("sdxl", "False")])
def test_a_file_of_kohyas_says_whether_its_base_is_2(path, family, is_v2):
    width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(640, 2)}
    lora.write_kohya(path, lora.Adapter(tensors, {name: 2}, {name: 2.0}), family="sdxl" if family == "sdxl" else "sd")
    assert safetensors_io.read_header(path)["metadata"]["ss_v2"] == is_v2
