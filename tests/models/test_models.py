"""Loading a base, and what it does to images and prompts."""

import json
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize import models
from personalize.common.errors import UserError
from personalize.core import schedule as S
from personalize.generation.sampling import default_batch_size
from personalize.models import devices, latent_diffusion, loading

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def ignore(line):
    pass


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=ignore)


@pytest.fixture
def copy(tiny_sd, tmp_path):
    """A copy of the tiny base to damage."""
    return shutil.copytree(tiny_sd, tmp_path / "base")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(base, match):
    with pytest.raises(UserError, match=match):
        models.load_model(str(base), device="cpu", say=ignore)


def test_a_base_says_what_it_is(model, tiny_sd):
    assert (model.name, model.folder) == (str(tiny_sd), tiny_sd)
    assert (model.size, model.latent_channels, model.downscale) == (32, 4, 2)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    modules = (model.unet, model.vae, *model.text_encoders.values())
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_toyland_is_a_base_like_any_other():
    folder = models.locate_base("toyland")
    assert models.family_of(folder, "toyland") == "sd"


def test_a_folder_without_model_index_is_refused(copy):
    (copy / "model_index.json").unlink()
    refused(copy, "has no model_index.json")


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_another_pipeline_class_is_refused_by_name(copy, kind):
    edit(copy / "model_index.json", _class_name=kind)
    refused(copy, f"is a {kind}; personalize reads StableDiffusionPipeline, StableDiffusionXLPipeline")


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
    model = models.load_model(str(copy), device="cpu", say=ignore)
    with torch.no_grad():
        assert model.encode_prompts(["a dog " * 60])["text"].shape == (1, 32, 32)


def test_an_editing_unet_is_refused_before_any_weights_are_read(copy):
    edit(copy / "unet" / "config.json", in_channels=8)
    for path in copy.glob("*/*.safetensors"):
        path.unlink()
    refused(copy, "takes 8 channels where its VAE gives 4.*editing.*plain text-to-image")


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        ("unet/config.json", {"sample_size": None}, "sample_size is null; expected a whole number"),
        ("unet/config.json", {"sample_size": [16, 24]}, "sample_size is a list; expected a whole number"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean is a list; expected null. .*use another base"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, whose noise levels"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.*another base"),
    ],
)
def test_a_config_that_would_be_misread_is_refused(copy, file, values, match):
    edit(copy / file, **values)
    refused(copy, match)


def scheduled(folder, **config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return loading.load_schedule(folder)


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
    assert model.truncated_words("a photo of a dog") == ""
    fits = " ".join(["dog"] * (model.tokenizers["text_encoder"].model_max_length - 2))
    assert model.truncated_words(fits) == ""
    assert model.truncated_words(f"{fits} red hat").split() == ["red", "hat"]


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
    image, config = model.decode_latents(plain), model.vae.config
    try:
        model.vae.register_to_config(shift_factor=0.5)
        shifted, _ = model.encode_images(images)
        torch.testing.assert_close(shifted, plain - 0.5 * config.scaling_factor)
        torch.testing.assert_close(model.decode_latents(shifted), image, rtol=1e-5, atol=1e-5)
    finally:
        model.vae.register_to_config(shift_factor=None)


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
def test_a_base_in_half_precision_keeps_its_vae_in_float32(base, request):
    """SDXL's VAE overflows in float16, and no VAE is where the time goes."""
    half = models.load_model(str(request.getfixturevalue(base)), device="cpu", dtype="bfloat16", say=ignore)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for module in half.networks.values() for p in module.parameters()} == {torch.bfloat16}
    assert half.predict(torch.zeros(1, 4, 16, 16), torch.tensor([5]), half.encode_prompts(["a dog"])).dtype == torch.bfloat16
    assert (
        half.decode_latents(noise(1, 4, 16, 16).bfloat16()).dtype
        == half.encode_images(noise(1, 3, 32, 32))[0].dtype
        == torch.float32
    )


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_autocast_does_not_reach_the_vae(model):
    images, z0 = noise(1, 3, 32, 32).clamp(-1, 1), noise(1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode_images(images)[0], model.decode_latents(z0)
    assert torch.equal(found[0], model.encode_images(images)[0]) and torch.equal(found[1], model.decode_latents(z0))


def test_a_vae_that_works_on_one_image_at_a_time_gives_the_same(model, tiny_sd):
    sliced = models.load_model(str(tiny_sd), device="cpu", vae="sliced", say=ignore)
    assert sliced.vae.use_slicing and not model.vae.use_slicing
    images, z0 = noise(3, 3, 32, 32).clamp(-1, 1), noise(3, 4, 16, 16)
    for ours, whole in zip(sliced.encode_images(images), model.encode_images(images), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sliced.decode_latents(z0), model.decode_latents(z0), rtol=1e-5, atol=1e-5)


def test_a_vae_that_works_in_tiles_is_close_and_holds_no_more_than_a_tile(photos, monkeypatch):
    """Every tile of this image, a pattern, has nearly the same statistics, which the VAE's group norms depend on."""
    whole, tiled = (models.load_model("toyland", device="cpu", vae=how, say=ignore) for how in ("whole", "tiled"))
    with Image.open(photos / "00.png") as photo:
        pattern = torch.from_numpy(np.tile(np.asarray(photo.convert("RGB")), (6, 6, 1))).permute(2, 0, 1)[None] / 127.5 - 1
    edges, forward = [], type(tiled.vae.decoder).forward
    monkeypatch.setattr(
        type(tiled.vae.decoder), "forward", lambda self, z, *a: edges.append(z.shape[2:]) or forward(self, z, *a)
    )
    means = [each.encode_images(pattern)[0] for each in (whole, tiled)]
    images = [each.decode_latents(means[0]) for each in (whole, tiled)]
    assert edges[0] == (96, 96) and len(edges) == 1 + 4 and all(max(edge) <= 64 for edge in edges[1:])
    a, b = images
    assert torch.equal(*means) and a.shape == b.shape and 0 < (a - b).abs().mean() < 0.05 * a.std()


@pytest.mark.parametrize(("sample_size", "edge"), [(16, 256), (256, 256), (384, 384), (512, 512), (1024, 512)])
def test_tiles_are_half_an_image_of_the_base(copy, sample_size, edge):
    edit(copy / "unet" / "config.json", sample_size=sample_size)
    vae = models.load_model(str(copy), device="cpu", vae="tiled", say=ignore).vae
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (edge, edge // 2)


def test_released_parts_leave_memory_and_come_back_the_same(tiny_sd):
    model = models.load_model(str(tiny_sd), device="cpu", say=ignore)
    images, z0 = noise(1, 3, 32, 32).clamp(-1, 1), noise(1, 4, 16, 16)
    before = [model.encode_images(images)[0], model.decode_latents(z0), model.encode_prompts(["a dog"])["text"]]
    gone = [weakref.ref(model.vae), weakref.ref(model.text_encoders["text_encoder"])]
    model.release(vae=True, texts=True)
    assert [ref() for ref in gone] == [None, None]
    assert list(model.networks) == ["unet"], "to list the networks is not to read them again"
    assert model.truncated_words("a dog") == ""
    after = [model.encode_images(images)[0], model.decode_latents(z0), model.encode_prompts(["a dog"])["text"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert list(model.networks) == ["unet", "text_encoder"]
    assert not any(p.requires_grad for p in model.text_encoders["text_encoder"].parameters())


def test_what_is_not_released_stays(tiny_sd):
    model = models.load_model(str(tiny_sd), device="cpu", say=ignore)
    vae, text = model.vae, model.text_encoders["text_encoder"]
    model.release(vae=True)
    assert model.vae is not vae and model.text_encoders["text_encoder"] is text
    model.release(texts=True)
    assert model.text_encoders["text_encoder"] is not text
    model.release()
    assert model.vae.config == vae.config


def test_a_vae_that_comes_back_works_as_the_recipe_says(tiny_sd):
    model = models.load_model(str(tiny_sd), device="cpu", vae="tiled", say=ignore)
    model.release(vae=True)
    model.decode_latents(torch.zeros(1, 4, 16, 16))
    assert model.vae.use_slicing and model.vae.use_tiling


def test_photos_are_encoded_whole_and_images_decoded_in_tiles(tiny_sd, monkeypatch):
    """Each tile's norms have statistics of their own, so tiled latents of a photo are others than the base was trained on."""
    monkeypatch.setattr(latent_diffusion, "TILE", (32, 32))
    whole, tiled = (
        models.load_model(str(tiny_sd), device="cpu", dtype="float32", vae=v, say=ignore) for v in ("whole", "tiled")
    )
    x, z0 = torch.rand(1, 3, 96, 96) * 2 - 1, torch.randn(1, 4, 48, 48)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whole.encode_images(x), tiled.encode_images(x), strict=True))
        assert not torch.equal(whole.decode_latents(z0), tiled.decode_latents(z0))


def test_sdxl_has_two_encoders_and_says_so(tiny_sdxl):
    model = models.load_model(str(tiny_sdxl), device="cpu", say=ignore)
    assert list(model.networks) == ["unet", "text_encoder", "text_encoder_2"]
    assert list(model.tokenizers) == list(model.text_encoders) == ["text_encoder", "text_encoder_2"]
    assert (model.size, model.latent_channels, model.downscale) == (32, 4, 2)
    cond = model.encode_prompts(["a dog", "", "a cat"])
    assert {k: tuple(v.shape) for k, v in cond.items()} == {"text": (3, 32, 64), "pooled": (3, 36)}
    assert not cond["text"][1].any() and not cond["pooled"][1].any() and cond["pooled"][[0, 2]].abs().min() > 0
    assert model.predict(noise(3, 4, 16, 16), torch.tensor([1, 2, 3]), cond).shape == (3, 4, 16, 16)


def test_an_empty_prompt_is_encoded_where_an_sdxl_base_does_not_ask_for_zeros(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "base")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    cond = models.load_model(str(folder), device="cpu", say=ignore).encode_prompts([""])
    assert cond["text"].abs().min() > 0 and cond["pooled"].abs().min() > 0


def test_sdxl_pools_where_the_text_ends_not_at_a_word_that_was_learned(tiny_sdxl):
    """New words have larger ids than the end mark, and SDXL's config makes transformers look for the largest id."""
    model = models.load_model(str(tiny_sdxl), device="cpu", say=ignore)
    encoder, words = model.text_encoders["text_encoder_2"], model.tokenizers["text_encoder_2"]
    assert encoder.config.eos_token_id == 2
    words.add_tokens(["<new>"])
    encoder.resize_token_embeddings(len(words))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[-1] = 0.5
        ids = torch.tensor(words(["a <new> dog"]).input_ids)
        hidden = encoder(ids).last_hidden_state
        model.text_encoders["text_encoder"].resize_token_embeddings(len(words))
        pooled = model.encode_prompts(["a <new> dog"])["pooled"]
        torch.testing.assert_close(pooled, encoder.text_projection(hidden[:, -1]), rtol=1e-4, atol=1e-5)


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
        devices.choose_device(name)


@pytest.mark.parametrize(
    ("name", "local_rank", "expected"),
    [("auto", "", 0), ("cuda", "1", 1), ("auto", "1", 1), ("cuda:0", "1", 0), ("cuda:1", "", 1)],
)
def test_a_gpu_has_an_index_and_is_the_current_one(monkeypatch, two_gpus, name, local_rank, expected):
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert devices.choose_device(name) == torch.device("cuda", expected) and two_gpus == [torch.device("cuda", expected)]


def test_more_processes_than_gpus_are_refused_with_what_to_do(monkeypatch, two_gpus):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine.*there are 2.*--device cuda:0"):
        devices.choose_device("auto")
    assert not two_gpus


@pytest.fixture
def two_gpus(monkeypatch) -> list:
    """A machine with two GPUs, as far as torch says -> the devices that are made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return current


def test_images_are_decoded_a_few_at_a_time(tiny_sd, monkeypatch):
    model = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)
    z0, sizes = torch.randn(5, 4, 16, 16), []
    whole = model.decode_latents(z0)
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    monkeypatch.setattr(latent_diffusion, "DECODED", 2 * 32**2)
    torch.testing.assert_close(model.decode_latents(z0), whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(latent_diffusion, "DECODED", 100)
    assert len(model.decode_latents(z0)) == 5 and sizes == [2, 2, 1, 1, 1, 1, 1, 1]


def test_what_a_cpu_draws_at_once_it_decodes_at_once():
    """So that no bit of what it drew before changes."""
    for size in (64, 128, 256, 512, 1024):
        for downscale in (4, 8):
            model = SimpleNamespace(downscale=downscale, device=torch.device("cpu"))
            assert default_batch_size(model, size) * size**2 <= max(latent_diffusion.DECODED, size**2)


def test_float16_on_the_cpu_becomes_bfloat16_and_says_so():
    said = []
    assert devices.dtype_for(torch.device("cpu"), "float16", said.append) == torch.bfloat16
    assert len(said) == 1
    assert devices.dtype_for(torch.device("cpu"), "auto", said.append) == torch.float32 and len(said) == 1


LATER = """
from personalize import models
from personalize.common import recipe as config
model = models.load_model({folder!r}, device="cpu", say=print)
import sys
assert "personalize.models.sdxl" not in sys.modules and "personalize.formats" not in sys.modules
assert "torch._dynamo" not in sys.modules and "accelerate" not in sys.modules and "peft" not in sys.modules
from personalize.methods import lora
assert lora.attach(model, config.load_recipe(None, ["train.methods=lora"]))[0]["params"]
import torch
torch.optim.AdamW(p for p in model.unet.parameters() if p.requires_grad)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2 and "torch._dynamo" in sys.modules
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


def test_a_text_encoders_config_names_no_code_of_the_hub(copy, monkeypatch):
    """transformers would ask the hub for a kernel; the network is closed here, so it would fail."""
    edit(copy / "text_encoder/config.json", attn_implementation="kernels-community/x", _attn_implementation="owner/name")
    model = models.load_model(str(copy), device="cpu", dtype="float32", say=lambda line: None)
    assert model.text_encoders["text_encoder"].config._attn_implementation == "sdpa"


def test_a_vocabulary_larger_than_its_text_encoder_is_refused(copy):
    tokenizer = loading.CLIPTokenizer.from_pretrained(copy / "tokenizer")
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(copy / "tokenizer")
    refused(copy, "tokenizer has a token of id .*, and its text encoder knows .*Restore")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_that_is_not_a_number_is_refused_by_its_name(copy, part):
    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    path.unlink()
    save_file(tensors, path)
    refused(copy, f"{path}: tensor '{name}' holds a value that is not a finite number")
