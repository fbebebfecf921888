"""Every method, with and without the text encoder: what trains, what stays, and that a saved result is the same model."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize import config, latent, methods, models
from personalize.core import rng
from personalize.engine import Batch, Engine
from personalize.errors import UserError

CASES = [(name, text) for name in methods.METHODS for text in (False, True)]
LR = {"full": 1e-3, "lora": 1e-2}
PROMPTS = ["a zqv dog", "a zqv dog", "a dog", "a dog"]
STEPS, RANK, ALPHA = 4, 3, 7.5  # of sampling; of LoRA


def base(folder):
    return models.load(str(folder), device="cpu", dtype="float32", say=lambda line: None)


def recipe_of(name, text, *more):
    texts = [f"train.methods={name}", f"train.text_encoder={str(text).lower()}", f"train.lr={LR[name]}", "class_word=dog"]
    return config.load(None, [*texts, f"lora.rank={RANK}", f"lora.alpha={ALPHA}", *more])


def one_batch(model):
    """Two photos and two class pictures with noise and timesteps that never change."""
    g = rng.generator(0, "test")
    z0, eps = (torch.randn(4, 4, 16, 16, generator=g) for _ in range(2))
    is_prior = torch.tensor([False, False, True, True])
    return Batch(z0, eps, torch.tensor([50, 300, 600, 900]), is_prior, lambda rows: latent.encode(model, PROMPTS[rows]))


def trained(folder, name, text, *more, steps=20):
    """A fresh base after some steps -> model, its recipe, the loss of each step."""
    model, recipe = base(folder), recipe_of(name, text, *more)
    torch.manual_seed(0)
    engine = Engine(model, recipe, methods.method(name).attach(model, recipe))
    batch = one_batch(model)
    return model, recipe, [float(engine.step(batch, scale=1.0)["loss"]) for _ in range(steps)]


@cache
def learned(folder, name, text):
    """What `trained` gives, once for all tests, which leave it as it is."""
    return trained(folder, name, text)


def weights(model):
    """Every weight of the base, by the name it has without an adapter."""
    parts = {"unet": model.unet, "text_encoder": model.text_encoder, "vae": model.vae}
    return {
        f"{part}.{k.replace('.base_layer', '')}": v.clone()
        for part, module in parts.items()
        for k, v in module.state_dict().items()
        if "lora_" not in k
    }


def noise():
    return rng.normal(latent.image_generators(3, [0, 1]), (4, 16, 16))


def drawn(model):
    model.unet.eval(), model.text_encoder.eval()
    how = latent.Drawing("ddim", STEPS, 3.0)
    return latent.draw(model, ["a zqv dog", "a red hat"], latent.image_generators(3, [0, 1]), how).clone()


@pytest.mark.parametrize("name, text", CASES)
def test_the_loss_on_one_batch_falls(tiny_sd, name, text):
    losses = learned(tiny_sd, name, text)[2]
    assert losses[-1] < losses[0] - 0.01, losses
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name, text", CASES)
def test_what_trains_moves_and_nothing_else(tiny_sd, name, text, checkpointing):
    before = weights(base(tiny_sd))
    model = trained(tiny_sd, name, text, f"train.gradient_checkpointing={str(checkpointing).lower()}", steps=3)[0]
    after = weights(model)
    assert before.keys() == after.keys()
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    whole = {"unet", "text_encoder"} if text else {"unet"}
    if name == "full":
        assert moved == whole
        assert all(not torch.equal(before[k], after[k]) for k in before if "q_proj.weight" in k) == text
    else:
        assert not moved
        adapters = {k: v for k, v in methods.method(name).state(model).items() if "lora_B" in k}
        assert {k.partition(".")[0] for k in adapters} == whole
        assert all(v.abs().max() > 0 for v in adapters.values()), "an adapter that got no gradient"


@pytest.mark.parametrize("name, text", CASES)
def test_checkpointed_gradients_are_the_plain_ones(tiny_sd, name, text):
    plain, saving = (
        trained(tiny_sd, name, text, f"train.gradient_checkpointing={flag}", steps=2)[0] for flag in ("false", "true")
    )
    ours, theirs = (methods.method(name).state(model) for model in (plain, saving))
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in ours)


@pytest.mark.parametrize("name, text", CASES)
def test_a_saved_result_draws_what_the_trained_model_draws(tiny_sd, tmp_path, name, text):
    model, recipe, _ = learned(tiny_sd, name, text)
    methods.method(name).save(model, tmp_path / "model", recipe)
    fresh = base(tiny_sd)
    plain = drawn(fresh)
    methods.method(name).load(fresh, tmp_path / "model")
    assert torch.equal(drawn(fresh), drawn(model))
    assert (drawn(fresh) - plain).abs().max() > 0.01


@pytest.mark.parametrize("name, text", CASES)
def test_a_restored_state_draws_what_the_trained_model_draws(tiny_sd, name, text):
    model, recipe, _ = learned(tiny_sd, name, text)
    fresh = base(tiny_sd)
    methods.method(name).attach(fresh, recipe)
    methods.method(name).restore(fresh, {k: v.clone() for k, v in methods.method(name).state(model).items()})
    assert torch.equal(drawn(fresh), drawn(model))


@pytest.mark.parametrize("name, text", CASES)
def test_a_fresh_method_changes_nothing(tiny_sd, name, text):
    plain, model = drawn(base(tiny_sd)), base(tiny_sd)
    methods.method(name).attach(model, recipe_of(name, text))
    assert torch.equal(drawn(model), plain)


@pytest.mark.parametrize("name, text", CASES)
def test_what_trains_is_float32_whatever_the_base(tiny_sd, name, text):
    model = models.load(str(tiny_sd), device="cpu", dtype="bfloat16", say=lambda line: None)
    groups = methods.method(name).attach(model, recipe_of(name, text, "train.text_lr=0.5"))
    assert {p.dtype for group in groups for p in group["params"]} == {torch.float32}
    assert [(g["name"], g["lr"]) for g in groups] == [("unet", LR[name]), ("text_encoder", 0.5)][: 1 + text]
    engine = Engine(model, recipe_of(name, text), groups)
    assert torch.isfinite(engine.step(one_batch(model), scale=1.0)["norm"])


def test_lora_adds_alpha_over_rank_times_b_a_in_float64(tiny_sd, tmp_path):
    model, recipe, _ = trained(tiny_sd, "lora", True, steps=5)
    methods.method("lora").save(model, tmp_path, recipe)
    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    merged = base(tiny_sd)
    for key in [k for k in file if k.endswith(".lora_A.weight")]:
        part, _, layer = key.removesuffix(".lora_A.weight").partition(".")
        target = getattr(merged, part).double().get_submodule(layer)
        a, b = file[key].double(), file[key.replace("lora_A", "lora_B")].double()
        assert a.shape[0] == b.shape[1] == RANK
        target.weight.data += ALPHA / RANK * (b @ a)
    outputs = []
    for each in (model, merged):
        each.unet.double(), each.text_encoder.double()
        each.dtype = torch.float64
        with torch.no_grad():
            outputs.append(each.predict(noise().double(), torch.tensor([40, 700]), each.encode_prompts(PROMPTS[:2])))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6  # timestep embeddings are float32 in both


def test_a_lora_for_another_base_is_refused(tiny_sd, tmp_path):
    model, recipe, _ = trained(tiny_sd, "lora", False, steps=1)
    methods.method("lora").save(model, tmp_path / "wide", recipe)
    tensors = load_file(tmp_path / "wide" / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        wider = {k: torch.zeros(v.shape[0], 99) if "lora_A" in k else v for k, v in tensors.items()}
    renamed = {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in tensors.items()}
    fewer = dict(list(tensors.items())[:-1])
    header = {"lora_adapter_metadata": header_of(tmp_path / "wide")}
    for other in (wider, renamed, fewer):
        save_file(other, tmp_path / "wide" / "pytorch_lora_weights.safetensors", metadata=header)
        with pytest.raises(UserError, match="made for another base"):
            methods.method("lora").load(base(tiny_sd), tmp_path / "wide")


def header_of(folder):
    from safetensors import safe_open

    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return file.metadata()["lora_adapter_metadata"]


def test_targets_that_match_nothing_are_named(tiny_sd):
    with pytest.raises(UserError, match="lora.targets = .*no_such"):
        methods.method("lora").attach(base(tiny_sd), recipe_of("lora", False, "lora.targets=no_such"))


def test_a_missing_result_is_an_error_that_says_so(tiny_sd, tmp_path):
    for name in methods.METHODS:
        with pytest.raises(UserError, match="did not finish saving"):
            methods.method(name).load(base(tiny_sd), tmp_path)


def test_methods_do_not_compose_yet_and_a_misspelt_one_is_guessed():
    with pytest.raises(UserError, match="give one of"):
        methods.the_one(("full", "lora"))
    with pytest.raises(UserError, match="did you mean 'lora'"):
        methods.the_one(("lorra",))


PLAIN_DIFFUSERS = """
import json, sys
import peft, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
base, noise, out, jobs = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pictures = {}
for name, folder in jobs.items():
    pipe = StableDiffusionPipeline.from_pretrained(base if name.startswith("lora") else folder)
    if name.startswith("lora"):
        pipe.load_lora_weights(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    pictures[name] = pipe(
        ["a zqv dog", "a red hat"], latents=load_file(noise)["noise"], num_inference_steps=STEPS, guidance_scale=3.0,
        height=32, width=32, output_type="latent",
    ).images
save_file(pictures, out)
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def both(tiny_sd, tmp_path_factory):
    """Pictures of every case: ours, and those of plain diffusers in a process that never saw this package.

    The base of full fine-tuning names a safety checker that was not downloaded.
    """
    folder = tmp_path_factory.mktemp("plain")
    partial = folder / "base"
    shutil.copytree(tiny_sd, partial)
    index = json.loads((partial / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (partial / "model_index.json").write_text(json.dumps(index))
    ours, jobs = {}, {}
    for name, text in CASES:
        model, recipe, _ = learned(partial if name == "full" else tiny_sd, name, text)
        key = f"{name}-{text}"
        methods.method(name).save(model, folder / key, recipe)
        ours[key], jobs[key] = drawn(model), str(folder / key)
    save_file({"noise": noise()}, folder / "noise.safetensors")
    arguments = [tiny_sd, folder / "noise.safetensors", folder / "out.safetensors", json.dumps(jobs)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, load_file(folder / "out.safetensors"), drawn(base(tiny_sd))


@pytest.mark.parametrize("name, text", CASES)
def test_plain_diffusers_draws_a_saved_result_as_we_do(both, name, text):
    ours, theirs, plain = both
    assert (ours[f"{name}-{text}"] - theirs[f"{name}-{text}"]).abs().max() < 1e-4
    assert (theirs[f"{name}-{text}"] - plain).abs().max() > 0.01
