"""One file and a diffusers folder, there and back, exactly; foreign and hostile files are refused in clear words."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_releases as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_releases import FAMILIES, same

from personalize.common.errors import UserError
from personalize.formats import clip_tokenizer, detect, reference_configs, safetensors_io
from personalize.formats.single_file import pack_single_file, require_packable, unpack_single_file
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
SCHEDULER = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}


def foreign(path, family, **metadata):
    """A single file of another program: no configs in its header, its tokenizer beside it."""
    save_file(tiny.tensors(family), path, metadata=metadata or None)
    if not (path.parent / "tokenizer").exists():
        tiny.vocabulary(path.parent / "tokenizer")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: a diffusers folder}, unpacked from one file."""
    place = tmp_path_factory.mktemp("folders")
    for family in FAMILIES:
        unpack_single_file(foreign(place / "file.safetensors", family), place / family)
    return {family: place / family for family in FAMILIES}


def read(folder, part):
    files = sorted((folder / part).glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}, json.loads((folder / part / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_file_becomes_a_whole_folder(folders, family):
    files = {str(p.relative_to(folders[family])) for p in folders[family].rglob("*") if p.is_file()}
    expected = {"model_index.json", "scheduler/scheduler_config.json"}
    for part in tiny.states(family):
        expected |= {f"{part}/config.json", f"{part}/{PARTS[part]}.safetensors"}
        if part.startswith("text"):
            place = part.replace("text_encoder", "tokenizer")
            names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
            expected |= {f"{place}/{name}" for name in names}
    assert files == expected
    for part, state in tiny.states(family).items():
        assert same(read(folders[family], part)[0], state), part


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_told_from_shapes_as_the_models_had_them(folders, family):
    """All of them but what nothing depends on: versions, initialisation, id of padding."""
    for part, known in tiny.configs(family).items():
        found = read(folders[family], part)[1]
        differ = {key: (value, known[key]) for key, value in found.items() if key in known and known[key] != value}
        assert not differ and len(found) > 10, (part, differ)
    scheduler = json.loads((folders[family] / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == SCHEDULER[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_folder_as_the_same_model(folders, family):
    with lazy_imports():
        pipeline = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    assert type(pipeline) is kind
    ids = torch.tensor([[tiny.PIECES - 2, 5, 9, tiny.PIECES - 1, 0, 0]])
    for part, model in tiny.models(family).items():
        mine = getattr(pipeline, part)
        assert same(mine.state_dict(), model.state_dict()), part
        if part.startswith("text"):
            torch.testing.assert_close(mine(ids)[0], model(ids)[0])
    unet, pooled = pipeline.unet, {"text_embeds": torch.ones(1, 20), "time_ids": torch.ones(1, 6)}
    args = torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.ones(1, 3, unet.config.cross_attention_dim)
    outs = [net(*args, added_cond_kwargs=pooled).sample for net in (unet, tiny.models(family)["unet"])]
    torch.testing.assert_close(*outs)  # heads and groups were found too
    assert pipeline.tokenizer("!", padding="max_length").input_ids[-1] == (0 if family == "sd2" else tiny.PIECES - 1)
    if family == "sdxl":
        assert pipeline.tokenizer_2("!", padding="max_length").input_ids[-4:] == [0] * 4
        assert pipeline.tokenizer_2.model_max_length == tiny.PLACES


def edited(folder, copy, **changes):
    """A copy of a base; changes: settings by part."""
    shutil.copytree(folder, copy)
    for part, more in changes.items():
        path = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_to_file_to_folder_is_exact(folders, path, family):
    folder = edited(folders[family], path.parent / "before", unet={"_name_or_path": "/home/somebody/unet"})
    pack_single_file(folder, path, half=False)
    assert b"somebody" not in path.read_bytes()
    shutil.copytree(folder / "tokenizer", path.parent / "tokenizer")
    unpack_single_file(path, path.parent / "after")
    for one in sorted(p.relative_to(folder) for p in folder.rglob("*.json")):
        a, b = (json.loads((root / one).read_text()) for root in (folder, path.parent / "after"))
        assert {key: v for key, v in a.items() if key != "_name_or_path"} == b, one
    for part in tiny.states(family):
        assert same(read(folder, part)[0], read(path.parent / "after", part)[0])


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("unet", {"attention_head_dim": 2}, r"unet.attention_head_dim = \[?2.* instead of"),
        ("unet", {"norm_num_groups": 8}, "unet.norm_num_groups = 8 instead of 16"),
        ("unet", {"flip_sin_to_cos": False}, "unet.flip_sin_to_cos = False instead of True"),
        ("vae", {"scaling_factor": 0.5}, "vae.scaling_factor = 0.5 instead of 0.1"),
        ("vae", {"shift_factor": 0.1}, "vae.shift_factor = 0.1 instead of None"),
        ("text_encoder", {"num_attention_heads": 4}, "text_encoder.num_attention_heads = 4 instead of 1"),
        ("scheduler", {"beta_end": 0.02}, "scheduler.beta_end = 0.02 instead of 0.012"),
        ("scheduler", {"timestep_spacing": "trailing"}, "scheduler.timestep_spacing = trailing instead of leading"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_shape_tells_and_no_release_has_is_refused_by_name(folders, path, family, part, change, named):
    folder = edited(folders[family], path.parent / "before", **{part: change})
    with pytest.raises(UserError, match=f"^a base has {named}.*a single file cannot say.*--to diffusers"):
        require_packable(folder, "a base")
    with pytest.raises(UserError, match=f"before has {named}"):
        pack_single_file(folder, path, half=False)
    assert not path.exists()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"attention_head_dim": [8, 8, 8, 8], "sample_size": 17, "dropout": 0.0}),
        ("vae", {"force_upcast": False, "sample_size": 17}),
        ("text_encoder", {"eos_token_id": 2, "initializer_range": 0.3}),
        ("scheduler", {"_class_name": "DDPMScheduler", "variance_type": "fixed_small", "steps_offset": 0}),
    ],
)
def test_what_changes_no_network_and_no_noise_level_is_packed(folders, path, part, change):
    pack_single_file(edited(folders["sd1"], path.parent / "before", **{part: change}), path, half=False)
    assert same(load_file(path), tiny.tensors("sd1"))


def stored(family, **changes):
    """The header entry of earlier versions."""
    parts = {part: config | changes.get(part, {}) for part, config in tiny.configs(family).items()}
    scheduler = reference_configs.SCHEDULERS[family] | {"prediction_type": SCHEDULER[family]} | changes.get("scheduler", {})
    return json.dumps({"family": family, "parts": parts, "scheduler": scheduler})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_an_earlier_version_opens_where_its_tensors_tell_the_same(path, family):
    unpack_single_file(foreign(path, family, **{"personalize.configs": stored(family)}), path.parent / "out")
    assert same(read(path.parent / "out", "unet")[0], tiny.states(family)["unet"])


@pytest.mark.parametrize(
    "entry",
    [
        stored("sd1", unet={"attention_head_dim": 4}),
        stored("sd1", unet={"attention_head_dim": [8] * 10_000}),
        stored("sd1", vae={"scaling_factor": "1"}),
        stored("sd1", text_encoder={"hidden_act": "os.system"}),
        stored("sd1", scheduler={"beta_schedule": "cosine"}),
        "", "[]", "null", "[" * 100_000, '{"parts": 1}', '{"parts": {}, "scheduler": {}}', '{"parts": [], "scheduler": {}}',
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_file_of_an_earlier_version_whose_header_says_more_is_refused_by_name(path, entry):
    with pytest.raises(
        UserError, match="model.safetensors: it is a single file of an earlier personalize with .*--to diffusers"
    ):
        unpack_single_file(foreign(path, "sd1", **{"personalize.configs": entry}), path.parent / "out")
    assert not (path.parent / "out").exists()


def test_diffusers_reads_a_file_of_ours_by_itself(folders, path):
    pack_single_file(folders["sd1"], path, half=False)
    with lazy_imports():
        pipeline = StableDiffusionPipeline.from_single_file(path, config=str(folders["sd1"]), local_files_only=True)
    for part, model in tiny.models("sd1").items():
        assert same(getattr(pipeline, part).state_dict(), model.state_dict()), part


def test_half_precision_halves_and_says_so_when_it_cannot(folders, path):
    pack_single_file(folders["sd1"], path, half=True)
    half = load_file(path)
    assert all(v.dtype == torch.float16 and torch.equal(v, tiny.tensors("sd1")[key].half()) for key, v in half.items())
    folder = path.parent / "large"
    shutil.copytree(folders["sd1"], folder)
    state, _ = read(folder, "vae")
    save_file(state | {"quant_conv.bias": torch.full((8,), 1e6)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="vae.quant_conv.bias has values of 1e.06, too large"):
        pack_single_file(folder, path, half=True)


def test_the_same_folder_gives_the_same_bytes(folders, path):
    for name in ("a", "b"):
        pack_single_file(folders["sd1"], path.parent / name / path.name, half=True)
    assert (path.parent / "a" / path.name).read_bytes() == (path.parent / "b" / path.name).read_bytes()


def test_the_header_says_what_the_file_is(folders, path):
    pack_single_file(folders["sd2"], path, half=True)
    said = safetensors_io.read_header(path)["metadata"]
    assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v" and said["modelspec.prediction_type"] == "v"
    assert said["modelspec.resolution"] == "768x768" and said["modelspec.title"] == "model" and said["format"] == "pt"


def test_sharded_and_half_precision_folders_are_read(folders, path):
    folder = path.parent / "sharded"
    shutil.copytree(folders["sd1"], folder)
    state, _ = read(folder, "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(state)
    shards = {"one.safetensors": keys[:100], "two.safetensors": keys[100:]}
    for name, own in shards.items():
        save_file({key: state[key] for key in own}, folder / "unet" / name)
    index = {"weight_map": {key: name for name, own in shards.items() for key in own}}
    place = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    place.write_text(json.dumps(index))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pack_single_file(folder, path, half=False)
    assert same(load_file(path), tiny.tensors("sd1"))
    place.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="weight_map of files beside it"):
        pack_single_file(folder, path, half=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inpainting_model_comes_and_goes_with_its_nine_channels(path, family):
    tensors = tiny.tensors(family)
    conv = tensors[detect.CONV_IN]
    tensors[detect.CONV_IN] = torch.cat([conv, torch.ones_like(conv), conv[:, :1]], 1)
    save_file(tensors, path)
    tiny.vocabulary(path.parent / "tokenizer")
    unpack_single_file(path, path.parent / "out")
    kind = "StableDiffusionXLInpaintPipeline" if family == "sdxl" else "StableDiffusionInpaintPipeline"
    assert json.loads((path.parent / "out" / "model_index.json").read_text())["_class_name"] == kind
    config = read(path.parent / "out", "unet")[1]
    assert (config["in_channels"], config["out_channels"]) == (9, 4)
    pack_single_file(path.parent / "out", path.parent / "again.safetensors", half=False)
    assert same(load_file(path.parent / "again.safetensors"), tensors)


def test_folders_that_are_not_bases_are_refused(folders, path):
    with pytest.raises(UserError, match="no model_index.json"):
        pack_single_file(path.parent, path, half=False)
    with pytest.raises(UserError, match="written as .safetensors only"):
        pack_single_file(folders["sd1"], path.with_suffix(".ckpt"), half=False)
    folder = path.parent / "other"
    shutil.copytree(folders["sd1"], folder)
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"in_channels": 8}))
    with pytest.raises(UserError, match="is an editing model"):
        pack_single_file(folder, path, half=False)
    unet.write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        pack_single_file(folder, path, half=False)
    shutil.copy(folders["sd1"] / "unet" / "config.json", unet)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="has no .safetensors file"):
        pack_single_file(folder, path, half=False)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="is a FluxPipeline"):
        pack_single_file(folder, path, half=False)
    assert not path.exists()


def test_prediction_is_what_the_header_or_the_release_says(path):
    def told(family, names=(), **metadata):
        return reference_configs.prediction(family, {f"modelspec.{key}": value for key, value in metadata.items()}, names)

    assert (told("sd1"), told("sd2"), told("sdxl")) == ("epsilon", "v_prediction", "epsilon")
    assert told("sd2", prediction_type="epsilon") == "epsilon"
    assert told("sd1", prediction_type="v") == told("sdxl", names=["v_pred"]) == "v_prediction"
    unpack_single_file(foreign(path, "sd2", **{"modelspec.prediction_type": "epsilon"}), path.parent / "out")
    assert read(path.parent / "out", "unet")[1]["sample_size"] == 64
    assert '"prediction_type": "epsilon"' in (path.parent / "out" / "scheduler" / "scheduler_config.json").read_text()


def test_v_prediction_with_zero_snr_passes_through_the_marks_of_sdxl(folders, path):
    folder = path.parent / "v"
    shutil.copytree(folders["sdxl"], folder)
    place = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config |= {"timestep_spacing": "trailing"}
    place.write_text(json.dumps(config))
    pack_single_file(folder, path, half=False)
    plain = load_file(path)
    assert {"v_pred", "ztsnr"} <= set(plain)
    save_file(plain, path)  # without our header
    shutil.copytree(folder / "tokenizer", path.parent / "tokenizer")
    unpack_single_file(path, path.parent / "back")
    found = json.loads((path.parent / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert found["prediction_type"] == "v_prediction" and found["rescale_betas_zero_snr"]
    assert found["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    "names, word",
    [
        ({"lora_unet_x.lora_down.weight": (4, 8)}, "is a LoRA"),
        ({"emb_params": (2, 768)}, "textual-inversion embedding"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "is a VAE alone"),
        ({"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.x": (1,)}, "is a U-Net alone"),
        ({detect.CONV_IN: (8, 4, 3, 3)}, "without a VAE"),
        ({detect.CONV_IN: (8, 4, 3, 3), "first_stage_model.x": (1,)}, "without a text encoder"),
        ({detect.CONV_IN: (8, 9, 3, 3)}, "without a VAE"),
        ({detect.CONV_IN: (8, 5, 3, 3)}, "is a depth-to-image model .5 input"),
        ({detect.CONV_IN: (8, 8, 3, 3)}, "InstructPix2Pix"),
        ({detect.CONV_IN: (8, 4, 3, 3), "edm_mean": (4,)}, "Playground"),
        ({detect.CONV_IN: (8, 4, 3, 3), "first_stage_model.x": (1,), "conditioner.embedders.0.model.x": (1,)}, "refiner"),
        ({"model.diffusion_model.double_blocks.0.img_attn.proj.weight": (8, 8)}, "is a Flux model"),
        ({"model.diffusion_model.joint_blocks.0.x": (8,)}, "is a Stable Diffusion 3"),
        ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "is a ControlNet"),
        ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8, 1)}, "text encoder alone"),
        ({"layers.0.weight": (8,)}, "layout unknown here: it has no model.diffusion_model.input_blocks.0.0.weight"),
    ],
    ids=str,
)
def test_other_files_are_refused_by_what_they_are(path, names, word):
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    with pytest.raises(UserError, match=f"model.safetensors is .*{word.removeprefix('is ')}"):
        unpack_single_file(path, path.parent / "out")
    assert not (path.parent / "out").exists()


def test_a_pickle_and_a_folder_in_the_way_are_refused(path):
    with pytest.raises(UserError, match="is a pickle"):
        unpack_single_file(path.with_suffix(".ckpt"), path.parent / "out")
    with pytest.raises(UserError, match="is there already"):
        unpack_single_file(foreign(path, "sd1"), path.parent)


def test_a_damaged_network_is_refused_and_nothing_is_left(path):
    tiny.vocabulary(path.parent / "tokenizer")
    for name in ("input_blocks.1.0.in_layers.2.weight", "out.2.weight", "output_blocks.3.0.out_layers.3.bias"):
        save_file({key: v for key, v in tiny.tensors("sd1").items() if not key.endswith(name)}, path)
        with pytest.raises(UserError, match="model.safetensors"):
            unpack_single_file(path, path.parent / "out")
        assert not (path.parent / "out").exists()


def test_without_a_tokenizer_the_message_says_where_to_put_it(path, monkeypatch):
    monkeypatch.setattr(clip_tokenizer, "HUB", "nobody/nothing")
    save_file(tiny.tensors("sd1"), path)
    with pytest.raises(UserError, match="Put its vocab.json and merges.txt into .*tokenizer"):
        unpack_single_file(path, path.parent / "out")


def test_a_tokenizer_of_another_base_is_refused(path):
    folder = tiny.vocabulary(path.parent / "tokenizer")
    pieces = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(pieces | {"one more": len(pieces)}))
    with pytest.raises(UserError, match="has 65 pieces, but the text_encoder of .* knows 64"):
        unpack_single_file(foreign(path, "sd1"), path.parent / "out")


def test_toyland_is_refused_by_name(path):
    """A base of another shape: three blocks, heads of its own, a VAE without attention and of its own scale."""
    toyland = Path(clip_tokenizer.__file__).parents[1] / "toyland" / "weights"
    with pytest.raises(UserError, match="^base 'toyland' has unet.attention_head_dim = .*--to diffusers"):
        require_packable(toyland, "base 'toyland'")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    "text, prediction",
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\r\n  params:\r\n    parameterization: v # 768\r\n", "v_prediction"),
        ("    parameterization: eps\n", "epsilon"),
        ("    # parameterization: v\n", ""),
        ("    parameterization: x0\n", ""),
        ("!!python/object/apply:os.system [exit 1]\n", ""),
    ],
)
def test_the_yaml_beside_a_file_says_what_it_predicts(tmp_path, family, text, prediction):
    path = foreign(tmp_path / "model.safetensors", family)
    path.with_suffix(".yaml").write_bytes(text.encode())
    unpacked = tmp_path / "unpacked"
    unpack_single_file(path, unpacked)
    said = json.loads((unpacked / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    assert said == (prediction or {"sd1": "epsilon", "sd2": "v_prediction"}[family])
    foreign(path, family, **{"modelspec.prediction_type": "epsilon"})
    unpack_single_file(path, tmp_path / "header")
    said = json.loads((tmp_path / "header" / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    assert said == "epsilon", "the file's own header counts first"
