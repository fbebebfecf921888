"""Finding a base, loading it, and what it does to pictures and prompts."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize import models
from personalize.core import schedule as S
from personalize.errors import UserError
from personalize.models import devices, sd

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def ignore(line):
    pass


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load(str(tiny_sd), device="cpu", dtype="float32", say=ignore)


@pytest.fixture
def copy(tiny_sd, tmp_path):
    """A copy of the tiny base to damage."""
    return shutil.copytree(tiny_sd, tmp_path / "base")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(base, match):
    with pytest.raises(UserError, match=match):
        models.load(str(base), device="cpu", say=ignore)


def test_a_base_says_what_it_is(model, tiny_sd):
    assert (model.name, model.folder) == (str(tiny_sd), tiny_sd)
    assert (model.size, model.latent_channels, model.downscale) == (32, 4, 2)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    parts = (model.unet, model.vae, model.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)


def test_toyland_is_a_base_like_any_other():
    folder = models.locate("toyland")
    assert models.families(folder, "toyland") == "sd"


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("toylnad", "did you mean 'toyland'"),
        ("no/such/folder", "is no diffusers folder"),
        ("model.ckpt", "is a pickle, which can run code"),
        ("model.safetensors", "single file.*diffusers folder"),
    ],
)
def test_a_name_that_cannot_be_a_base_is_refused_with_a_word_of_why(base, match):
    refused(base, match)


def test_a_hub_id_that_is_not_here_says_that_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("nobody/nothing", "'nobody/nothing' is neither a folder here nor.*HF_HUB_OFFLINE is set.*--base toyland")


def test_a_folder_without_model_index_is_refused(copy):
    (copy / "model_index.json").unlink()
    refused(copy, "has no model_index.json")


def test_another_pipeline_class_is_refused_by_name(copy):
    edit(copy / "model_index.json", _class_name="StableDiffusionXLPipeline")
    refused(copy, "is a StableDiffusionXLPipeline")


@pytest.mark.parametrize("part", [*PARTS, "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_of_pickles_is_refused_with_the_way_out(copy, part):
    (copy / part / f"{PARTS[part]}.safetensors").rename(copy / part / f"{PARTS[part]}.bin")
    refused(copy, "pickles such as .bin are not opened.*safe_serialization=True")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_lacks_a_weight_is_not_filled_with_random_numbers(copy, part):
    path = copy / part / f"{PARTS[part]}.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    refused(copy, f"{part} lacks 1 weights, such as {name}")


@pytest.mark.parametrize("part", PARTS)
def test_a_file_cut_short_is_the_users_error(copy, part):
    path = copy / part / f"{PARTS[part]}.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    refused(copy, f"{part} cannot be loaded")


def test_a_tokenizer_without_its_words_is_refused(copy):
    """transformers would make one that knows two tokens, and every prompt would be the same."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    refused(copy, "neither tokenizer.json nor vocab.json")


def test_a_tokenizer_that_names_no_length_cuts_where_the_text_encoder_ends(copy):
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    model = models.load(str(copy), device="cpu", say=ignore)
    with torch.no_grad():
        assert model.encode_prompts(["a dog " * 60])["text"].shape == (1, 32, 32)


def test_an_inpainting_unet_is_refused(copy, model):
    wide = type(model.unet).from_config({**model.unet.config, "in_channels": 9})
    wide.save_pretrained(copy / "unet")
    refused(copy, "takes 9 channels where its VAE gives 4.*inpainting")


def test_the_fingerprint_changes_with_one_weight_and_with_a_config_but_not_with_the_folder(copy, tiny_sd):
    first = models.fingerprint(tiny_sd)
    assert models.fingerprint(copy) == first and len(first) == 12
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[0]].flatten()[0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    second = models.fingerprint(copy)
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert len({first, second, models.fingerprint(copy)}) == 3


def scheduled(folder, **config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return sd.schedule_of(folder)


@pytest.mark.parametrize(
    ("config", "betas"),
    [
        ({}, S.linear(1000)),
        ({"beta_schedule": "linear", "beta_end": 0.01, "num_train_timesteps": 50}, S.linear(50, end=0.01)),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, S.scaled_linear(1000)),
        ({"beta_schedule": "squaredcos_cap_v2"}, S.cosine(1000)),
        ({"trained_betas": [0.1, 0.2, 0.3]}, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)),
    ],
)
def test_the_schedule_is_the_one_the_scheduler_config_names(tmp_path, config, betas):
    torch.testing.assert_close(scheduled(tmp_path, **config).alphas_cumprod, (1 - betas).cumprod(0))


def test_what_a_scheduler_config_leaves_out_is_diffusers_default(tmp_path):
    plain = scheduled(tmp_path)
    assert (plain.prediction, plain.spacing, plain.steps_offset, plain.final_alpha_one) == ("epsilon", "leading", 0, True)
    full = scheduled(
        tmp_path, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=False,
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    assert (full.prediction, full.spacing, full.steps_offset, full.final_alpha_one) == ("v_prediction", "trailing", 1, False)
    assert full.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"beta_schedule": "exotic"}, "beta_schedule 'exotic'; known are linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'; known are epsilon"),
        ({"timestep_spacing": "odd"}, "timestep_spacing 'odd'; known are leading"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR with epsilon prediction"),
    ],
)
def test_a_scheduler_config_that_is_not_known_is_named(tmp_path, config, match):
    with pytest.raises(UserError, match=match):
        scheduled(tmp_path, **config)


def test_words_that_do_not_fit_are_named(model):
    assert model.overlong("a photo of a dog") == ""
    fits = " ".join(["dog"] * (model.tokenizer.model_max_length - 2))
    assert model.overlong(fits) == ""
    assert model.overlong(f"{fits} red hat").split() == ["red", "hat"]


def test_latents_are_scaled_as_the_vae_config_says(model):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = model.vae.encode(images).latent_dist
        expected = model.vae.decode(posterior.mean).sample.clamp(-1, 1)
    mean, std = model.encode_images(images)
    scale = model.vae.config.scaling_factor
    assert scale != 1
    torch.testing.assert_close(mean, posterior.mean * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    torch.testing.assert_close(model.decode_latents(mean), expected, rtol=1e-5, atol=1e-5)


def test_a_shift_of_the_vae_is_taken_off_and_put_back(model):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, _ = model.encode_images(images)
    picture, config = model.decode_latents(plain), model.vae.config
    try:
        model.vae.register_to_config(shift_factor=0.5)
        shifted, _ = model.encode_images(images)
        torch.testing.assert_close(shifted, plain - 0.5 * config.scaling_factor)
        torch.testing.assert_close(model.decode_latents(shifted), picture, rtol=1e-5, atol=1e-5)
    finally:
        model.vae.register_to_config(shift_factor=None)


def test_a_base_in_half_precision_keeps_its_vae_in_float32(tiny_sd):
    half = models.load(str(tiny_sd), device="cpu", dtype="bfloat16", say=ignore)
    kinds = {name: {p.dtype for p in getattr(half, name).parameters()} for name in PARTS}
    assert kinds == {"unet": {torch.bfloat16}, "vae": {torch.float32}, "text_encoder": {torch.bfloat16}}
    assert half.predict(torch.zeros(1, 4, 16, 16), torch.tensor([5]), half.encode_prompts(["a dog"])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gpu", "not known"),
        ("cuda:x", "not known"),
        ("cuda:99", "not on this machine, which has"),
        ("cpu:1", "not on this machine"),
    ],
)
def test_a_device_that_is_not_here_is_named(name, match):
    with pytest.raises(UserError, match=match):
        devices.choose(name)


def test_float16_on_the_cpu_becomes_bfloat16_and_says_so():
    said = []
    assert devices.dtype_for(torch.device("cpu"), "float16", said.append) == torch.bfloat16
    assert len(said) == 1
    assert devices.dtype_for(torch.device("cpu"), "auto", said.append) == torch.float32 and len(said) == 1


LATER = """
from personalize import config, models
model = models.load({folder!r}, device="cpu", say=print)
import sys
assert "torch._dynamo" not in sys.modules and "accelerate" not in sys.modules and "peft" not in sys.modules
from personalize.methods import peft
assert peft.attach(model, config.load(None, ["train.methods=lora"]))[0]["params"]
import torch
torch.optim.AdamW(p for p in model.unet.parameters() if p.requires_grad)
assert torch._dynamo.config and torch.compiler.disable is not None
from diffusers import StableDiffusionPipeline
from diffusers.models.unets import UNet2DConditionModel
assert UNet2DConditionModel is type(model.unet)
from transformers import ViTModel
import logging
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("it says so where a CPU has AVX512-BF16 and `kernels` is missing")
assert not logging.getLogger().handlers, "then a user's logging.basicConfig would do nothing"
"""


def test_what_a_lean_import_leaves_out_can_still_be_imported(tiny_sd):
    """PEFT, torch's compiler, other models and pipelines, in the process that loaded a base; and all of it silent."""
    done = subprocess.run([sys.executable, "-c", LATER.format(folder=str(tiny_sd))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
