"""What `export` and `generate` write, read by programs that others use: `make clients`."""

import json
from pathlib import Path

import pytest
import torch
from bases import packable
from safetensors.torch import load_file, save_file

import personalize
from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.formats import lycoris
from personalize.generation import sampling
from personalize.methods import adapter_files
from personalize.training import load_run

pytestmark = pytest.mark.clients
PHOTOS = Path(__file__).parents[2] / "data_examples" / "dog"
TRAIN = ["device=cpu", "prior.count=0", "train.steps=2", "train.batch=2", "token=zqv", "train.text_encoder=true"]
ADAPTER = ["lora.rank=3", "lora.alpha=7.5", "lora.conv=true", "train.lr=6e-2"]
METHODS = {"full": ["train.lr=3e-3"]} | dict.fromkeys(("lora", "lokr", "loha"), ADAPTER)
SAME_LATENTS, SAME_WEIGHTS = 1e-3, 1e-6


@pytest.fixture(scope="module")
def base(tiny_sd, tmp_path_factory):
    """Its text encoder has the names of released ones, which all programs read."""
    folder = packable(tiny_sd, tmp_path_factory.mktemp("clients") / "base")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run_of(base, tmp_path_factory):
    made, root = {}, tmp_path_factory.mktemp("runs")

    def get(method):
        if method not in made:
            settings = [*TRAIN, *METHODS[method], f"train.methods={method}", f"base={base}"]
            made[method] = personalize.train(PHOTOS, class_word="dog", settings=settings, runs=root / method).folder
        return made[method]

    return get


@pytest.fixture(scope="module")
def own(run_of, base, tmp_path_factory):
    """(prompt, file of noise, output of the text encoder, latents) of a run, and the latents of its bare base."""

    def get(method):
        run, folder = run_of(method), tmp_path_factory.mktemp("own")
        manifest = json.loads((run / "manifest.json").read_text())
        model, prompt = (
            models.load_model(str(base), device="cpu", dtype="float32", say=print),
            manifest["subjects"][0]["prompt"],
        )
        bare = latents(model, prompt)
        load_run.load_run(model, run, manifest, at="")
        side = model.size // model.downscale
        noise = rng.normal(sampling.image_generators(0, range(1)), (model.latent_channels, side, side))
        save_file({"noise": noise}, folder / "noise.safetensors")
        text = model.encode_prompts([prompt])["text"].detach()
        return prompt, folder / "noise.safetensors", text, latents(model, prompt), bare

    return get


def latents(model, prompt):
    config = SamplingConfig("ddim", 4, 5.0, size=model.size)
    with torch.no_grad():
        return sampling.sample_latents(model, [prompt], sampling.image_generators(0, range(1)), config)


def exported(run, folder, to, **options):
    return personalize.export(run, to=to, out=folder, check=False, **options).files[0]


@pytest.mark.parametrize("method, to, fuse", [
    ("full", "diffusers", False), ("lora", "diffusers", True), ("lokr", "diffusers", True),
    ("lora", "diffusers", False), ("lora", "kohya", False),
])  # fmt: skip
def test_old_diffusers_draws_the_runs_latents(program, run_of, own, base, tmp_path, method, to, fuse):
    prompt, noise, text, expected, bare = own(method)
    out = exported(run_of(method), tmp_path / ("dog.safetensors" if to == "kohya" else "dog"), to, fuse=fuse)
    whole = method == "full" or fuse
    lora = "" if whole else out if to == "kohya" else out / adapter_files.FILE
    made = tmp_path / "made.safetensors"
    job = {"folder": out if whole else base, "lora": lora, "prompt": prompt, "noise": noise, "out": made}
    said = program("old-diffusers", "draw_with_diffusers.py", **job)
    assert said["missing"] == [] and "newly initialized" not in said["stderr"]
    theirs = load_file(made)
    print(method, to, (theirs["latents"] - expected).abs().max(), (bare - expected).abs().max())
    assert (theirs["text"] - text).abs().max() < SAME_LATENTS
    assert (theirs["latents"] - expected).abs().max() < SAME_LATENTS < 0.05 < (bare - expected).abs().max()


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_merges_what_we_merge(program, run_of, base, tmp_path, method):
    """Alpha is not the rank; linear layers, convolutions of 1 and 3, and the text encoder."""
    file = exported(run_of(method), tmp_path / "dog.safetensors", "kohya")
    fused, merged = exported(run_of(method), tmp_path / "fused", "diffusers", fuse=True), tmp_path / "merged.safetensors"
    said = program("lycoris", "merge_with_lycoris.py", folder=base, file=file, out=merged)
    assert sum(said["layers"]) == said["in_file"] > 20 and min(said["layers"]) > 0
    theirs, changed = load_file(merged), 0.0
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        ours = load_file(fused / part / f"{name}.safetensors")
        before = load_file(base / part / f"{name}.safetensors")
        assert {f"{part}.{key}" for key in ours} == {key for key in theirs if key.startswith(f"{part}.")}
        assert max((theirs[f"{part}.{key}"] - value).abs().max() for key, value in ours.items()) < SAME_WEIGHTS
        changed = max(changed, *((ours[key] - value).abs().max() for key, value in before.items()))
    assert changed > 1e-3


@pytest.mark.parametrize("algo", ["lokr", "loha"])
@pytest.mark.parametrize("tucker, factor", [(False, -1), (True, 4)])
def test_a_network_of_lycoris_own_wrapper_adds_what_lycoris_adds(program, base, tmp_path, algo, tucker, factor):
    files = {"file": tmp_path / "a.safetensors", "deltas": tmp_path / "deltas.safetensors"}
    said = program("lycoris", "write_with_lycoris.py", folder=base, algo=algo, tucker=tucker, factor=factor, **files)
    shapes = adapter_files.layer_shapes(models.load_model(str(base), device="cpu", dtype="float32", say=print))
    found, deltas = lycoris.read_lycoris(files["file"], shapes, "base"), load_file(files["deltas"])
    assert len(found.layers) == said["layers"] > 20
    for name, factors in found.layers.items():
        ours = lycoris.delta(factors, shapes["unet"][name.removeprefix("unet.")])
        assert torch.allclose(ours, deltas[name.replace("unet.", "lycoris_").replace(".", "_")], atol=1e-5), name


def test_sd_parsers_reads_what_generate_writes(program, base, tmp_path):
    settings = ["draw.sampler=dpm++2m", "draw.steps=3", "draw.guidance=4.5", "device=cpu", "seed=11", "draw.negative=a red hat"]
    image = personalize.generate(["a dog, in the snow"], base=str(base), settings=settings, out=tmp_path).files[0]
    said = program("sd-parsers", "read_parameters.py", image=image)
    print(said)
    assert (said["prompts"], said["negative"]) == (["a dog, in the snow"], ["a red hat"])
    assert said["sampler"] == "DPM++ 2M"
    assert {"steps": "3", "seed": "11", "cfg_scale": "4.5"}.items() <= said["parameters"].items()
