"""`distill`: students of bases and runs: what they start from, how they are drawn with, how they resume, who reads them."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import personalize
from personalize import models
from personalize.commands.export import model_card
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import write_json
from personalize.common.recipe import recipe_from_dict
from personalize.common.terminal import SILENT
from personalize.generation import sampling, students
from personalize.training import distillation, load_run

SHORT = ["distill.updates=2", "distill.batch=2", "distill.rank=4", "distill.teacher=4", "device=cpu"]
PROMPTS = ["a photo of a dog", "a cat in the snow", "a red hat"]
SAID = f"distill.prompts={json.dumps(PROMPTS)}"
PROMPT = "a photo of a dog"


def lora_of(folder):
    return load_file(folder / "model" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module", autouse=True)
def read_once(tiny_sd, model):
    """Each opening of the tiny base is a copy of the one in memory, which is 0.2 s sooner."""
    load = models.load_model

    def copied(base, **options):
        return copy.deepcopy(model, {id(model.family): model.family}) if base == str(tiny_sd) else load(base, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", copied)
        yield


@pytest.fixture(scope="module")
def students_of_sd(tiny_sd, tmp_path_factory, read_once):
    """A folder with the bare base's students by both methods."""
    runs = tmp_path_factory.mktemp("runs")
    for method in ("progressive", "lcm"):
        options = [*SHORT, SAID, f"distill.method={method}", "distill.teacher=8"]  # two halvings
        personalize.distill(base=str(tiny_sd), settings=options, runs=runs, name=method)
    return runs


@pytest.mark.parametrize("method", ["progressive", "lcm"])
def test_a_bases_student_is_a_lora_that_says_how_it_is_drawn_with(students_of_sd, method):
    manifest = run_folder.read_manifest(students_of_sd / method)
    assert (manifest["kind"], manifest["status"], manifest["methods"]) == ("student", "finished", ["lora"])
    student = {key: value for key, value in manifest["student"].items() if key != "teacher_draw"}
    assert student == {"sampler": {"lcm": "lcm"}.get(method, "ddim"), "steps": 2, "guidance_baked": 5.0}
    tensors = lora_of(students_of_sd / method)
    assert {key.split(".")[0] for key in tensors} == {"unet"}
    assert all(value.abs().max() > 0 for key, value in tensors.items() if key.endswith("lora_B.weight"))
    assert any("time_emb_proj" in key for key in tensors) and any("conv1" in key for key in tensors)


PLAIN_DIFFUSERS = """
import sys, torch
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors.torch import save_file
base, folder, out, prompt = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(folder)
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
latents = pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **size).images
loaded = sum("lora_" in name for name, _ in pipeline.unet.named_parameters())
save_file({"latents": latents, "loaded": torch.tensor(loaded)}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_loads_an_lcm_lora_and_draws_what_we_draw(kind, tiny_sd, tiny_sdxl, students_of_sd, tmp_path):
    base, folder = {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind], students_of_sd / "lcm"
    if kind == "sdxl":
        options = [*SHORT, SAID, "distill.method=lcm", "distill.updates=1"]
        folder = personalize.distill(base=str(base), settings=options, runs=tmp_path).folder
    arguments = [str(place) for place in (base, folder / "model", tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *arguments, PROMPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "out")
    assert theirs["loaded"] == len(lora_of(folder)) > 20
    model, manifest = models.load_model(str(base), device="cpu", say=SILENT.say), load_run.require_run(folder, of_base=True)
    load_run.load_run(model, folder, manifest)
    draw = recipe_from_dict(manifest["recipe"], "").draw
    ours = sampling.sample_latents(model, [PROMPT], [torch.Generator().manual_seed(0)], draw)
    torch.testing.assert_close(ours, theirs["latents"], rtol=1e-3, atol=1e-3)


def test_generate_draws_as_the_student_does_and_refuses_all_else_by_name(students_of_sd, tmp_path):
    options = {"run": students_of_sd / "progressive", "out": tmp_path}
    result = personalize.generate([PROMPT], settings=["draw.count=1", "device=cpu"], **options)
    (row,) = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert (row["sampler"], row["steps"], row["guidance"]) == ("ddim", 2, 1.0) and len(result.files) == 1
    for key, value, remedy in [
        ("steps", 4, "distil one for it: personalize distill --steps 4"), ("guidance", 5.0, r"inside \(5\)"),
        ("sampler", "ddpm", "draws with sampler 'ddim'"), ("negative", "ugly", "draw with its teacher"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"draw.{key} = .*{remedy}"):
            personalize.generate([PROMPT], settings=[f"draw.{key}={value}", "device=cpu"], **options)
    with pytest.raises(UserError, match="name one with --run, or write the words out"):
        personalize.generate(["a {class}"], settings=["device=cpu"], **options)


def test_what_needs_a_subject_refuses_a_bases_student_by_name(students_of_sd):
    for command in (personalize.evaluate, lambda run: personalize.export(run, to="kohya"), personalize.verify):
        with pytest.raises(UserError, match="is a student of the base .* Draw with it: personalize generate --run"):
            command(students_of_sd / "lcm")
    with pytest.raises(UserError, match="no finished run in .*2 student of a base"):
        run_folder.newest_run(students_of_sd)


def test_two_leading_steps_would_begin_half_way_so_a_student_begins_at_the_noise(tiny_sd, students_of_sd):
    model, folder = models.load_model(str(tiny_sd), device="cpu", say=SILENT.say), students_of_sd / "progressive"
    assert model.schedule.timesteps(2).tolist() == [501, 1]
    load_run.load_run(model, folder, load_run.require_run(folder, of_base=True))
    assert model.schedule.timesteps(2).tolist() == [999, 499]


def test_fast_draws_with_the_bases_own_student_and_names_a_base_without_one(tiny_sd, students_of_sd, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    options = {"base": str(base), "fast": True, "out": tmp_path / "out"}
    with pytest.raises(UserError, match="has no student of its own. Make one, personalize distill --base"):
        personalize.generate([PROMPT], settings=["device=cpu"], **options)
    shutil.copytree(students_of_sd / "progressive" / "model", base / students.FOLDER)
    write_json(base / students.FOLDER / students.FILE, {"sampler": "ddim", "steps": 2, "guidance_baked": 5.0})
    with pytest.raises(UserError, match="draw.steps = 3: the student of base .* draws with steps 2"):
        personalize.generate([PROMPT], settings=["device=cpu", "draw.steps=3"], **options)
    settings = ["device=cpu", "draw.count=1"]
    fast = personalize.generate([PROMPT], settings=settings, **options).files[0]
    run = personalize.generate([PROMPT], settings=settings, run=students_of_sd / "progressive", out=tmp_path / "run").files[0]
    assert pixels(fast) == pytest.approx(pixels(run), abs=1)
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert row["student"]["guidance_baked"] == 5.0 and row["guidance"] == 1.0


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(float)


def run_of(base, runs, method, photos, *settings):
    """A run of two steps, which has learned something."""
    options = [
        f"train.methods={method}", "train.steps=2", "train.lr=1e-2", "token=zqv", "prior.count=0", "choose.every=0",
        "photos.min_size=1", "device=cpu", *settings,
    ]  # fmt: skip
    return personalize.train(photos, class_word="dog", settings=[f"base={base}", *options], runs=runs).folder


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("full", (), marks=pytest.mark.slow),
        ("lora", ("lora.rank=2", "lora.alpha=1", "train.text_encoder=true")),
        pytest.param("textual-inversion", ("token=<zqw>",), marks=pytest.mark.slow),
    ],
)
def test_a_runs_student_starts_as_its_teacher_and_keeps_its_subject(tiny_sd, tmp_path, method, more):
    photos = Path(__file__).parents[2] / "data_examples" / "dog"
    run = run_of(tiny_sd, tmp_path, method, str(photos), *more)
    still = [*SHORT, "distill.lr=1e-9", "distill.updates=1", "distill.teacher=4"]
    student = personalize.distill(run, settings=still, runs=tmp_path).folder
    teacher, taught = load_run.require_run(run), load_run.require_run(student)
    assert taught["subjects"] == teacher["subjects"] and taught["methods"][0] == method
    prompt = teacher["subjects"][0]["prompt"]
    z, t, outs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), []
    for folder, manifest in ((run, teacher), (student, taught)):
        model = models.load_model(str(tiny_sd), device="cpu", say=SILENT.say)
        bare = model.predict(z, t, model.encode_prompts([prompt]))
        load_run.load_run(model, folder, manifest)
        outs.append(model.predict(z, t, model.encode_prompts([prompt])))
    assert (outs[0] - bare).abs().max() > 1e-3
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
    options = {"repo": "me/dog", "family": "sd", "fused": False, "samples": [], "scores": {}}
    card = model_card.text(model_card.Card(manifest=taught, to="diffusers", files={"a.safetensors": "LoRA"}, **options))
    assert 'timestep_spacing="trailing"' in card and "num_inference_steps=2, guidance_scale=1.0)" in card
    with pytest.raises(UserError, match="is a student itself. Distil its teacher, .*, for other steps"):
        personalize.distill(student, settings=SHORT, runs=tmp_path)
    with pytest.raises(UserError, match="whose steps are not those of train"):
        personalize.verify(student)


@pytest.mark.slow
def test_a_stopped_student_goes_on_to_the_same_bits(tiny_sd, students_of_sd, tmp_path, monkeypatch):
    settings, whole = [*SHORT, SAID, "distill.teacher=8"], students_of_sd / "progressive"
    learn, calls = distillation.learn, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 3:  # within the second student
            signal.raise_signal(signal.SIGTERM)
        return learn(*args, **options)

    monkeypatch.setattr(distillation, "learn", stopping)
    with pytest.raises(Interrupted, match="stopped at step 3 of 4; the same command goes on from there"):
        personalize.distill(base=str(tiny_sd), settings=settings, runs=tmp_path / "parts")
    parts = personalize.distill(base=str(tiny_sd), settings=settings, runs=tmp_path / "parts")
    assert (parts.steps, len(calls)) == (1, 4)
    ours, theirs = lora_of(parts.folder), lora_of(whole)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_wrong_halvings_prompts_and_methods_are_named_before_any_work(tiny_sd, tmp_path):
    def error(*settings):
        with pytest.raises(UserError) as raised:
            personalize.distill(base=str(tiny_sd), settings=[*SHORT, *settings], runs=tmp_path)
        return str(raised.value)

    assert "halving the teacher's 4 steps does not lead there. Give a teacher of 6" in error("distill.steps=3", SAID)
    assert "halving" in error("distill.steps=4", SAID)
    assert "which prompts?" in error()
    assert "stand for a run's" in error('distill.prompts=["a {token} dog"]')
    assert "a lora, or full" in error(SAID, "train.methods=loha")
    assert not list(tmp_path.iterdir())
