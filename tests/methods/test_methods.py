"""Every method by one battery: what trains, what stays, that it goes on bit for bit, that a saved result is the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from method_cases import (
    CASES,
    MARKS,
    NOISE,
    OPTIMIZED,
    PIVOTAL,
    PLAIN,
    QUANTIZED,
    ROWS,
    SIDE,
    STEPS,
    TEXT,
    XL,
    Case,
    attached,
    base,
    battery,
    drawn,
    frozen,
    images,
    learned,
    name_of,
    one_batch,
    predicted,
    read,
    trained,
)
from safetensors.torch import load_file, save_file

from personalize import methods
from personalize.common.errors import UserError
from personalize.common.recipe_sections import METHODS, Lora
from personalize.methods import textual_inversion
from personalize.methods.quantization import quantize


def test_the_names_in_recipes_are_the_rows_of_the_table():
    assert tuple(methods.METHODS) == METHODS


@battery(CASES)
def test_the_loss_on_fixed_noise_and_timesteps_falls(folder, case):
    losses = learned(folder, case).losses
    assert losses[-1] < losses[0] - 0.01, losses
    assert sum(losses[-3:]) < sum(losses[:3])


@battery(CASES)
def test_only_its_parameters_move_and_all_of_them(folder, case):
    model, _, _, before, kept = learned(folder, case)
    after, bare = frozen(model), frozen(read(folder, "float32"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    same = {k for k in before.keys() & bare.keys() if before[k].shape == bare[k].shape and before[k].dtype == bare[k].dtype}
    assert same and all(torch.equal(before[k], bare[k]) for k in same)
    first, last = kept[0][0], kept[MARKS[-1]][0]
    still = {k for k in first if torch.equal(first[k], last[k])}
    # rows of tokens that are not in the prompts, and in SDXL's encoders what comes after the layer that conditions the U-Net
    unused = [k for k in still if "_embedding.weight" in k or (case.xl and (".layers.2." in k or "final_layer_norm" in k))]
    assert still == set(unused), still
    whole = {f"{name}:{part}" for name in case.methods for part in parts_of(case, name, model)}
    assert whole <= {k.partition(".")[0] for k in first}


def parts_of(case, name, model):
    """The networks that a method of a case trains something in."""
    texts = list(model.text_encoders) if TEXT in case.settings or name == "textual-inversion" else []
    return texts + ["unet"] * (name not in methods.WITH_A_WORD)


@battery(ROWS + PIVOTAL + XL)
def test_checkpointed_gradients_are_the_plain_ones(folder, case):
    """Also where the frozen part's activations are recomputed: a text encoder that got no gradient would stay."""
    plain = learned(folder, case).kept[2][0]
    saving = trained(folder, case, "train.gradient_checkpointing=true", marks=(2,)).kept[2][0]
    assert plain.keys() == saving.keys()
    assert all(torch.allclose(plain[k], saving[k], atol=1e-5) for k in plain)


@battery(CASES + OPTIMIZED)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(folder, case):
    kept = learned(folder, case).kept
    resumed = trained(folder, case, start=(MARKS[-2], kept[MARKS[-2]])).kept
    for ours, theirs in zip(kept[MARKS[-1]], resumed[MARKS[-1]], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@battery(PLAIN)
def test_a_saved_result_draws_what_the_trained_model_draws(folder, case, tmp_path):
    model, recipe = learned(folder, case)[:2]
    methods.save(model, tmp_path / "model", recipe)
    fresh = base(folder)
    methods.load(fresh, tmp_path / "model", recipe)
    loaded = drawn(fresh, case)
    assert torch.equal(loaded, images(folder, case, taught=True))
    assert (loaded - images(folder, case, taught=False)).abs().max() > 0.01
    methods.save(fresh, tmp_path / "again", recipe)
    files = [path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert files and all((tmp_path / "model" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


@pytest.mark.parametrize("text", ["false", "true"])
def test_a_whole_folder_has_the_text_keys_of_released_checkpoints(tiny_sd, tiny_sdxl, tmp_path, text):
    """transformers 4 draws with a random text encoder where they begin otherwise; trained or linked to the base's."""
    for base_folder in (tiny_sd, tiny_sdxl):
        model, recipe = base(base_folder), Case(("full",)).recipe(f"train.text_encoder={text}")
        methods.save(model, tmp_path / base_folder.name, recipe)
        for part, encoder in model.text_encoders.items():
            keys = set(load_file(tmp_path / base_folder.name / part / "model.safetensors"))
            assert all(key.startswith(("text_model.embeddings.", "text_model.encoder.layers.", "text_model.final_layer_norm.",
                                       "text_projection.")) for key in keys), part  # fmt: skip
            assert len(keys) == len(encoder.state_dict())
        methods.load(base(base_folder), tmp_path / base_folder.name, recipe)


@battery(CASES)
def test_a_fresh_method_changes_no_prompt_without_a_new_word(folder, case):
    """Adapters and full: no prompt at all. A fresh word is the word it begins as."""
    plain, model, recipe = base(folder), base(folder), case.recipe()
    if recipe.train.quantize:
        quantize(plain.unet, recipe.train.quantize)
    attached(model, recipe)
    learns, word = set(case.methods) & set(methods.WITH_A_WORD), case.words[-1]
    begins = (recipe.embedding.init or recipe.class_word[-1]) if learns and recipe.embedding.vectors == 1 else word
    was, now = (["a red hat", f"a {text} dog"] for text in (begins, word))
    same = torch.equal if begins != word or not learns else lambda a, b: torch.equal(a[:1], b[:1])
    assert same(predicted(plain, was), predicted(model, now))


@battery(ROWS + PIVOTAL + QUANTIZED + XL)
def test_what_trains_is_float32_whatever_the_base(folder, case):
    model, recipe = base(folder, "bfloat16"), case.recipe("train.text_lr=0.5")
    engine = attached(model, recipe)
    assert {p.dtype for p in engine.params} == {torch.float32}
    expected = set()
    for name in case.methods:
        learns = name in methods.WITH_A_WORD
        expected |= set() if name == "textual-inversion" else {("unet", recipe.train.lr)}
        texts = {(part, recipe.embedding.lr or recipe.train.lr if learns else 0.5) for part in model.text_encoders}
        expected |= texts if learns or TEXT in case.settings else set()
    assert {(g["name"], g["lr"]) for g in engine.groups} == expected
    assert torch.isfinite(engine.step(one_batch(model, case), scale=1.0)["norm"])
    for network in model.networks.values():
        network.to(torch.bfloat16).requires_grad_(False)
    assert predicted(model, ["a red hat", case.prompts()[0]]).isfinite().all()


PLAIN_DIFFUSERS = """
import copy, json, sys
from functools import cache
from pathlib import Path
import peft, torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
noise, out, jobs = load_file(sys.argv[1])["noise"], sys.argv[2], json.loads(sys.argv[3])
read, images = cache(DiffusionPipeline.from_pretrained), {}
for name, job in jobs.items():
    folder = Path(job["folder"])
    pipe = copy.deepcopy(read(folder if (folder / "model_index.json").exists() else job["base"]))
    if (folder / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(folder)
    for adapter in sorted(folder.glob("*_adapter")):
        peft.PeftModel.from_pretrained(getattr(pipe, adapter.name.removesuffix("_adapter")), adapter)
    if (folder / "pytorch_custom_diffusion_weights.safetensors").exists():
        pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    for token, file in job["words"].items():
        rows = load_file(folder / file)
        if "clip_g" in rows:
            for key, end in (("clip_l", ""), ("clip_g", "_2")):
                where = {part: getattr(pipe, part + end) for part in ("tokenizer", "text_encoder")}
                pipe.load_textual_inversion(rows[key], token=token, **where)
            # its config has eos_token_id 2, with which transformers pools at a new word instead of at the prompt's end
            pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
        else:
            pipe.load_textual_inversion(folder, weight_name=file)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    images[name] = pipe(
        job["prompts"], latents=noise, num_inference_steps=STEPS, guidance_scale=3.0,
        height=SIZE, width=SIZE, output_type="latent",
    ).images
save_file(images, out)
""".replace("STEPS", str(STEPS)).replace("SIZE", str(2 * SIDE))


@pytest.fixture(scope="module")
def both(tiny_sd, tiny_sdxl, tmp_path_factory):
    """Images of every case: ours, those of plain diffusers and PEFT in a process that never saw this package, the base's.

    The base of full fine-tuning names a safety checker that was not downloaded.
    """
    place = tmp_path_factory.mktemp("plain")
    partial = place / "base"
    shutil.copytree(tiny_sd, partial)
    index = json.loads((partial / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (partial / "model_index.json").write_text(json.dumps(index))
    ours, jobs, plain = {}, {}, {}
    for case in PLAIN:
        folder = tiny_sdxl if case.xl else partial if case == Case(("full",)) else tiny_sd
        model, recipe = learned(folder, case)[:2]
        key = name_of(case)
        methods.save(model, place / key, recipe)
        ours[key], plain[key] = (images(folder, case, taught=taught) for taught in (True, False))
        words = textual_inversion._files(recipe) if set(case.methods) & set(methods.WITH_A_WORD) else {}
        prompts = [case.prompts()[1], "a red hat"]
        jobs[key] = {"folder": str(place / key), "base": str(folder), "words": words, "prompts": prompts}
    save_file({"noise": NOISE}, place / "noise.safetensors")
    arguments = [place / "noise.safetensors", place / "out.safetensors", json.dumps(jobs)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, load_file(place / "out.safetensors"), plain


@battery(PLAIN)
def test_plain_diffusers_and_peft_draw_a_saved_result_as_we_do(both, case):
    ours, theirs, plain = (images[name_of(case)] for images in both)
    assert (ours - theirs).abs().max() < 1e-4
    assert (theirs - plain).abs().max() > 0.01


@battery(ROWS)
def test_a_missing_result_is_an_error_that_says_so(folder, case, tmp_path):
    with pytest.raises(UserError, match="did not finish saving"):
        methods.load(base(folder), tmp_path, case.recipe())


@pytest.mark.parametrize(
    "names, more, said",
    [
        *((names, {}, "do not go together") for names in
          (["full", "lora"], ["lora", "lokr"], [], ["lora", "lora"], ["custom-diffusion", "lora"])),
        (["lorra"], {}, "did you mean 'lora'"), (["full"], {"quantize": "4bit"}, "train.quantize = '4bit' is for adapters"),
        (["textual-inversion"], {"text_encoder": True}, "train.text_encoder = true does not go"),
        (["lokr"], {"lora": Lora(dora=True)}, "lora.dora = true is for lora, not for lokr"),
        (["oft"], {"lora": Lora(rslora=True)}, "lora.rslora = true is for lora, not for oft"),
        (["loha"], {"quantize": "4bit"}, "'4bit' does not go with loha"),
        (["lora"], {"quantize": "8bit", "lora": Lora(dora=True)}, "'8bit' does not go with lora.dora"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(names, more, said):
    with pytest.raises(UserError, match=said):
        methods.check_methods(names, **more)


@battery([case for case in PLAIN if methods.has_strength(case.methods)])
def test_strength_leads_from_the_base_to_what_was_trained_and_is_saved(folder, case, tmp_path):
    """At 0 the base draws (of a DoRA all but its magnitudes), at 1 the run; a weight of the base half way at a half."""
    model, recipe = base(folder), case.recipe()
    methods.attach(model, recipe)
    own, taught = methods.base_state(model, recipe), {k: v.clone() for k, v in learned(folder, case).kept[MARKS[-1]][0].items()}
    image = {}
    for strength in (0.0, 0.5, 1.0):
        methods.restore(model, recipe, taught)
        methods.set_strength(model, recipe, strength, own)
        image[strength] = predicted(model, ["a dog", "a red hat"])  # no learned word, which keeps its strength
        for key, value in methods.state(model, recipe).items():
            if key in own:
                assert torch.allclose(value, own[key] + strength * (taught[key] - own[key]), atol=1e-6)
    plain = predicted(base(folder), ["a dog", "a red hat"])
    if "lora.dora=true" not in case.settings:
        assert torch.allclose(image[0.0], plain, atol=1e-5), (image[0.0] - plain).abs().max()
    assert torch.equal(image[1.0], predicted(learned(folder, case).model, ["a dog", "a red hat"]))
    gap = (image[1.0] - plain).abs().mean()
    assert 0.2 * gap < (image[0.5] - plain).abs().mean() < 0.95 * gap
    methods.set_strength(model, recipe, 0.5, own)
    methods.save(model, tmp_path, recipe)
    loaded = base(folder)
    methods.load(loaded, tmp_path, recipe)
    assert torch.allclose(predicted(loaded, ["a dog", "a red hat"]), image[0.5], atol=1e-5)


def test_a_rotation_and_a_word_alone_have_no_strength():
    assert [name for name in methods.METHODS if not methods.has_strength([name])] == ["oft", "boft", "textual-inversion"]
