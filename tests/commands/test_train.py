"""A run: what it leaves, that stopping it in any way changes nothing, and that it says what is wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from screens import RecordingScreen, terminate

import personalize
from personalize import models
from personalize.commands import train as command
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import read_jsonl, remove_folder, sha256
from personalize.common.recipe import load_recipe, recipe_from_dict
from personalize.data import class_images, subjects, training_set
from personalize.data.crops import epoch_order
from personalize.evaluation import checkpoint_selection
from personalize.training import engine, load_run, loop, preflight, validation
from personalize.training.manifest import make_manifest

ROOT = Path(personalize.__file__).parents[1]
COMMON = ["class_word=dog", "device=cpu", "prior.count=3", "prior.steps=2", "draw.steps=2", "draw.sampler=ddim"]
COMMON += ["photos.hold_out=0"]  # five photos train
DRAW = ["draw.steps=2", "draw.count=1", "draw.size=32", "device=cpu"]
LORA = ["train.methods=lora", "train.lr=1e-2"]
FULL = ["train.methods=full", "train.lr=1e-3"]


def crash():
    raise RuntimeError("the power went")


@pytest.fixture(scope="module")
def prior(tiny_sd, tmp_path_factory):
    """Three class images."""
    settings = [f"base={tiny_sd}", *COMMON]
    return personalize.prior("dog", settings=settings, root=tmp_path_factory.mktemp("priors")).folder


@pytest.fixture(scope="module")
def tall(tmp_path_factory):
    """Three photos that leave room for crops."""
    folder = tmp_path_factory.mktemp("tall")
    for i in range(3):
        Image.open(ROOT / "data_examples" / "dog" / f"0{i}.png").resize((40, 64)).save(folder / f"{i}.png")
    return folder


def base(folder):
    return models.load_model(str(folder), device="cpu", dtype="float32", say=lambda line: None)


def recipe_of(*more):
    return load_recipe(None, [*COMMON, *more])


def run(folder, photos, runs, *more, prior=None, screen=None):
    """A run's folder."""
    settings = [f"base={folder}", *COMMON, *([] if prior else ["prior.count=0"]), *more]
    screen = screen or RecordingScreen()
    return personalize.train(photos, settings=settings, runs=runs, prior_folder=prior, screen=screen).folder


def files(folder):
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(folder):
    """Hashes of the result and of the newest checkpoint, which has the optimizer's state and the average in it."""
    newest = run_folder.checkpoints(folder)[-1] / load_run.STATE
    results = [path for name, path in files(folder / "model").items() if name.endswith(".safetensors")]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*results, newest)]


def status(folder):
    return run_folder.read_manifest(folder)["status"]


def steps_of(folder):
    return [int(path.name[5:]) for path in run_folder.checkpoints(folder)]


def logged(folder):
    return [row["step"] for row in read_jsonl(folder / "log.jsonl")]


def copies(photos, folder, change=lambda image: image):
    """The photos in a folder of a test's own."""
    folder.mkdir()
    for path in sorted(photos.glob("*.png")):
        change(Image.open(path).convert("RGB")).save(folder / path.name)
    return folder


RUN = ["lock.flock", "log.jsonl", "manifest.json", "photos.png", "recipe.toml"]
RESULTS = {
    "lora": ["pytorch_lora_weights.safetensors"],
    "full": [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/merges.txt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ],
}  # fmt: skip


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_a_finished_run_is_these_files_and_the_same_command_changes_none(tiny_sd, photos, prior, tmp_path, method):
    folder = run(tiny_sd, photos, tmp_path, *method, "train.steps=2", prior=prior)
    name = method[0].rpartition("=")[2]
    expected = [*RUN, f"checkpoints/step-000002/{load_run.STATE}", *(f"model/{file}" for file in RESULTS[name])]
    assert list(files(folder)) == sorted(expected)
    assert status(folder) == "finished"
    before = {name: (path.stat().st_mtime_ns, path.read_bytes()) for name, path in files(folder).items()}
    screen = RecordingScreen()
    assert run(tiny_sd, photos, tmp_path, *method, "train.steps=2", prior=prior, screen=screen) == folder
    assert f"this run is finished: {folder}" in screen.lines
    assert before == {name: (path.stat().st_mtime_ns, path.read_bytes()) for name, path in files(folder).items()}


def test_a_manifest_says_what_the_run_is(tiny_sd, photos, prior, tmp_path):
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=1", "token=zqv", prior=prior)
    manifest = run_folder.read_manifest(folder)
    assert folder == tmp_path / "zqv-dog"
    assert [manifest["subjects"][0][k] for k in ("token", "class", "prompt")] == ["zqv", "dog", "a zqv dog"]
    assert [photo["sha256"] for photo in manifest["subjects"][0]["photos"]] == [sha256(p) for p in sorted(photos.glob("*.png"))]
    assert recipe_from_dict(manifest["recipe"], "here") == load_recipe(folder / "recipe.toml")
    assert manifest["prior"] == {"dog": class_images.class_image_settings(base(tiny_sd), recipe_of(), "dog")}


def test_class_images_in_bfloat16_are_drawn_beside_the_weights_that_train(tiny_sd, photos, tmp_path, monkeypatch):
    """A run that draws them has the weights of one that finds them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    settings = [f"base={tiny_sd}", *COMMON, *FULL, "train.steps=2", "train.text_encoder=true"]
    drew, found = (
        personalize.train(photos, settings=settings, runs=tmp_path / name, priors=tmp_path / "priors").folder
        for name in ("drew", "found")
    )
    assert run_folder.read_manifest(drew)["prior"]["dog"]["dtype"] == "bfloat16"
    assert len(list((tmp_path / "priors").iterdir())) == 1 and bits(drew) == bits(found)


RESUMED = {
    "full, 8 bits": [*FULL, "train.optimizer=adamw8bit"],
    "full, average, crops and flips": [
        *FULL, "train.ema=0.9", "train.snr_gamma=5", "photos.crop=random", "photos.flip=true", "train.batch=2",
    ],
    "lora, text encoder, average, lr schedule": [
        *LORA, "train.text_encoder=true", "train.ema=0.9", "train.accumulate=2", "train.batch=2", "train.lr_schedule=cosine",
        "train.warmup=2",
    ],
    "lora, schedule-free, samples": [*LORA, "train.optimizer=adamw-schedulefree", "train.lr=1e-3", "train.sample_every=2"],
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("free" in n)) for n in RESUMED])
def test_five_steps_are_five_with_a_crash_and_a_signal_between(tiny_sd, tall, prior, tmp_path, name):
    if "schedule-free" in name:
        pytest.importorskip("schedulefree")
    settings = [*RESUMED[name], "train.steps=5", "train.checkpoint_every=2", "train.keep=9"]
    once = run(tiny_sd, tall, tmp_path / "once", *settings, prior=prior)
    folder, screen = tmp_path / "cut" / once.name, RecordingScreen()
    with pytest.raises(RuntimeError, match="power"):
        run(tiny_sd, tall, tmp_path / "cut", *settings, prior=prior, screen=RecordingScreen(3, crash))
    assert status(folder) == "failed" and steps_of(folder) == [2] and logged(folder) == [1, 2, 3]
    with pytest.raises(Interrupted, match="stopped at step 3 of 5"):
        run(tiny_sd, tall, tmp_path / "cut", *settings, prior=prior, screen=RecordingScreen(3, terminate))
    assert status(folder) == "interrupted" and steps_of(folder) == [2, 3] and logged(folder) == [1, 2, 3]
    assert run(tiny_sd, tall, tmp_path / "cut", *settings, prior=prior, screen=screen) == folder
    assert any(f"resuming {folder} after step 3" in line for line in screen.lines)
    assert bits(folder) == bits(once)
    assert status(folder) == "finished" and logged(folder) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_blocks_that_wait_change_no_bit_of_a_run_that_draws_scores_stops_and_goes_on(tiny_sd, photos, prior, eyes, tmp_path):
    settings = [*LORA, "train.gradient_checkpointing=true", "train.steps=4", "train.sample_every=2", "choose.every=2"]
    settings += ["choose.count=1", "choose.class_count=1", "choose.prompts=['a {token} {class}']"]
    settings += [f"evaluate.dino={eyes / 'encoders/identity'}", f"evaluate.clip={eyes / 'encoders/clip'}"]
    plain = run(tiny_sd, photos, tmp_path / "plain", *settings, prior=prior)
    settings += ["train.offload=true"]
    with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
        run(tiny_sd, photos, tmp_path / "waiting", *settings, prior=prior, screen=RecordingScreen(3, terminate))
    waiting, screen = tmp_path / "waiting" / plain.name, RecordingScreen()
    assert run(tiny_sd, photos, tmp_path / "waiting", *settings, prior=prior, screen=screen) == waiting
    assert bits(waiting) == bits(plain) and status(waiting) == "finished"
    images = [path for path in files(plain) if path.endswith(".png") and path.startswith(("samples", "choosing"))]
    assert len(images) > 2 and all((waiting / path).read_bytes() == (plain / path).read_bytes() for path in images)
    assert (waiting / checkpoint_selection.FILE).read_text() == (plain / checkpoint_selection.FILE).read_text()
    assert any("saves nothing on cpu" in line for line in screen.lines)
    on_top = str(plain / "model" / "pytorch_lora_weights.safetensors")
    drawn = [
        personalize.generate(["a dog"], run=folder, loras=[on_top], settings=DRAW, out=folder) for folder in (plain, waiting)
    ]
    assert Image.open(drawn[0].files[0]).tobytes() == Image.open(drawn[1].files[0]).tobytes()
    assert personalize.export(waiting, to="diffusers", fuse=True, out=tmp_path / "fused", check=False).files


def test_an_optimizer_that_is_not_installed_is_told_before_any_long_work(tiny_sd, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.optimizer=lion8bit")
    assert not list(tmp_path.iterdir())


def test_different_seeds_are_different_runs_bit_by_bit(tiny_sd, photos, tmp_path):
    folders = [run(tiny_sd, photos, tmp_path, *LORA, "train.steps=1", f"seed={seed}") for seed in (0, 1)]
    assert bits(folders[0]) != bits(folders[1])


def test_a_run_stopped_after_its_last_step_is_finished_by_the_next(tiny_sd, photos, tmp_path, monkeypatch):
    settings = [*LORA, "train.steps=2", "train.ema=0.9"]
    once = run(tiny_sd, photos, tmp_path / "once", *settings)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(command, "finish", lambda run, screen: crash())
        run(tiny_sd, photos, tmp_path / "cut", *settings)
    assert bits(run(tiny_sd, photos, tmp_path / "cut", *settings)) == bits(once)


LONG = [*FULL, "train.steps=20", "train.checkpoint_every=5", "prior.count=0"]


@pytest.fixture(scope="module")
def twenty(tiny_sd, tmp_path_factory):
    """A run of 20 steps that nothing stopped."""
    return run(tiny_sd, ROOT / "data_examples" / "dog", tmp_path_factory.mktemp("twenty"), *LONG, f"base={tiny_sd}")


def start(tiny_sd, photos, runs):
    """The same run by the command, in a process of its own."""
    words = [w for text in [*COMMON[1:], *LONG] for w in ("--set", text)]
    return subprocess.Popen(
        [sys.executable, "-m", "personalize", "train", photos, "--class", "dog", "--base", tiny_sd, "--runs", runs, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, there):
    while process.poll() is None and not there():
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tiny_sd, photos, twenty, tmp_path):
    folder = tmp_path / twenty.name
    process = start(tiny_sd, photos, tmp_path)
    wait_for(process, lambda: run_folder.checkpoints(folder))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert status(folder) == "running" and (folder / "lock").exists()
    assert 5 <= steps_of(folder)[-1] < 20
    screen = RecordingScreen()
    assert run(tiny_sd, photos, tmp_path, *LONG, f"base={tiny_sd}", screen=screen) == folder
    assert any("resuming" in line for line in screen.lines)
    assert bits(folder) == bits(twenty)
    assert logged(folder) == list(range(1, 21))
    assert not list(folder.rglob(".tmp-*")) and not (folder / "lock").exists()


def test_a_terminated_run_saves_its_step_and_exits_with_130(tiny_sd, photos, twenty, tmp_path):
    folder = tmp_path / twenty.name
    process = start(tiny_sd, photos, tmp_path)
    wait_for(process, lambda: (folder / "log.jsonl").exists() and len(logged(folder)) >= 3)
    process.terminate()
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    step = steps_of(folder)[-1]
    assert f"stopped at step {step} of 20; the same command goes on from there" in message
    assert 3 <= step == logged(folder)[-1] < 20
    assert status(folder) == "interrupted"
    run(tiny_sd, photos, tmp_path, *LONG, f"base={tiny_sd}")
    assert bits(folder) == bits(twenty)
    assert logged(folder) == list(range(1, 21))


def test_a_signal_while_samples_are_drawn_loses_no_step(tiny_sd, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_sample", lambda run, step, screen: terminate() if step == 2 else None)
    with pytest.raises(Interrupted, match="stopped at step 3 of 9"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.steps=9", "train.sample_every=1")
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in run_folder.checkpoints(folder)] == ["step-000001", "step-000003"]


def test_samples_that_do_not_fit_are_left_out_and_what_they_need_leaves_the_memory(tiny_sd, photos, tmp_path, monkeypatch):
    """A checkpoint is there before the first one is drawn; a resumed run draws what is missing of its last step."""
    draw, present, screen = validation.draw_samples, [], RecordingScreen()

    def drawn(model, recipe, prompts, path):
        (folder,) = tmp_path.iterdir()
        present.append([p.name for p in run_folder.checkpoints(folder)])
        if path.name != "step-000003.png":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        draw(model, recipe, prompts, path)

    step = engine.Engine.step

    def watched(self, batch, *, scale):
        assert self.model._vae is None and self.model._texts is None, "left in memory by what was drawn"
        return step(self, batch, scale=scale)

    monkeypatch.setattr(validation, "draw_samples", drawn)
    monkeypatch.setattr(engine.Engine, "step", watched)
    settings = [f"base={tiny_sd}", *COMMON, *LORA, "prior.count=0", "token=zqv", "train.steps=3", "train.sample_every=1"]
    folder = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path, screen=screen).folder
    assert present[0] == ["step-000001"] and status(folder) == "finished"
    assert [p.name for p in (folder / "samples").iterdir()] == ["step-000003.png"]
    assert sum("no sample images of step" in line and "out of memory" in line for line in screen.lines) == 2


def test_a_score_that_does_not_fit_is_left_out(tiny_sd, photos, eyes, tmp_path, monkeypatch):
    score, screen = validation.DevSplit.score, RecordingScreen()

    def scored(self, step, strength=1.0):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, step, strength)

    monkeypatch.setattr(validation.DevSplit, "score", scored)
    settings = [f"base={tiny_sd}", *COMMON, *LORA, "prior.count=0", "token=zqv", "train.steps=3", "choose.every=1",
                "choose.count=1", "choose.class_count=1", "choose.prompts=['a {token} {class}']", "train.keep=3",
                f"evaluate.dino={eyes / 'encoders/identity'}", f"evaluate.clip={eyes / 'encoders/clip'}"]  # fmt: skip
    folder = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path, screen=screen).folder
    assert status(folder) == "finished" and any("step 2 is not scored" in line for line in screen.lines)
    assert {row["step"] for row in read_jsonl(folder / checkpoint_selection.FILE)} == {1, 3}


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_step_that_does_not_fit_names_the_last_checkpoint_and_what_to_turn(tiny_sd, photos, tmp_path, monkeypatch, fails_at):
    backward, calls = engine.Engine.backward, []

    def failing(self, batch):
        calls.append(1)
        if len(calls) > fails_at + (2 if fails_at else 0):  # two measure the step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return backward(self, batch)

    monkeypatch.setattr(engine.Engine, "backward", failing)
    left = "The last checkpoint is .*step-000002" if fails_at else "There is no checkpoint yet"
    with pytest.raises(UserError, match=f"does not fit in the memory of cpu.*train.gradient_checkpointing=true.*{left}"):
        run(tiny_sd, photos, tmp_path, *LORA, "prior.count=0", "train.steps=5", "train.checkpoint_every=2")


def test_other_photos_captions_or_settings_make_another_run(tiny_sd, photos, tmp_path):
    settings = [*LORA, "train.steps=1"]
    negative = copies(photos, tmp_path / "negative", ImageOps.invert)
    captioned = copies(photos, tmp_path / "captioned")
    (captioned / "00.txt").write_text("a {token} {class} in the snow")
    turned = copies(photos, tmp_path / "turned")
    for i, path in enumerate(sorted(turned.glob("*.png"))):
        path.rename(turned / f"z{9 - i}.png")
    runs = tmp_path / "runs"
    first = run(tiny_sd, photos, runs, *settings)
    others = [
        run(tiny_sd, negative, runs, *settings),
        run(tiny_sd, captioned, runs, *settings),
        run(tiny_sd, turned, runs, *settings),
        run(tiny_sd, photos, runs, *settings, "train.weight_decay=0.1"),
        run(tiny_sd, photos, runs, *settings, "seed=1"),
    ]
    assert [folder.name for folder in others] == [f"{first.name}-{n}" for n in range(2, 7)]
    for same in (["draw.guidance=9"], ["evaluate.count=1"], []):
        assert run(tiny_sd, photos, runs, *settings, *same) == first
    assert run(tiny_sd, negative, runs, *settings) == others[0]


def test_a_caption_without_the_token_trains_as_the_one_that_says_it(tiny_sd, photos, tmp_path):
    settings, runs = [*LORA, "train.steps=1"], tmp_path / "runs"
    captioned, screen = copies(photos, tmp_path / "captioned"), RecordingScreen()
    (captioned / "00.txt").write_text("a dog in the snow")
    first = run(tiny_sd, captioned, runs, *settings, "token=zqv", screen=screen)
    assert any("put in: 'a zqv dog in the snow'" in line for line in screen.lines), screen.lines
    with pytest.raises(UserError, match="00.png does not say 'zqv'"):
        run(tiny_sd, captioned, runs, *settings, "token=zqv", "captions.add_token=false")
    (captioned / "00.txt").write_text("a {token} dog in the snow")
    for more in ([], ["captions.add_token=false"]):  # the same weights are the same run
        assert run(tiny_sd, captioned, runs, *settings, "token=zqv", *more) == first
    unsaid = recipe_from_dict(run_folder.read_manifest(first)["recipe"], "the run's recipe")
    known, _ = subjects.load_subjects([captioned], unsaid, tokens=["zqv"], size=32)
    (captioned / "00.txt").write_text("a dog in the snow")
    as_written, _ = subjects.load_subjects([captioned], unsaid, tokens=["zqv"], size=32)
    said, before = (make_manifest(base(tiny_sd), unsaid, one, {})["identity"] for one in (known, as_written))
    assert said == run_folder.read_manifest(first)["identity"] != before, (
        "a run that trained on it without the token is another"
    )


def test_a_learned_word_is_put_into_captions_that_are_shuffled_and_dropped(tiny_sd, photos, tmp_path):
    settings = ["train.methods=textual-inversion", "train.steps=3", "train.caption_dropout=0.5", "train.caption_shuffle=true"]
    captioned, screen = copies(photos, tmp_path / "captioned"), RecordingScreen()
    (captioned / "00.txt").write_text("snow, a dog, night")
    folder = run(tiny_sd, captioned, tmp_path / "runs", *settings, screen=screen)
    assert any("put in: 'snow, a <subject> dog, night'" in line for line in screen.lines), screen.lines
    assert run_folder.read_manifest(folder)["status"] == "finished"


def test_the_photos_of_one_run_are_never_trained_on_in_another(tiny_sd, photos, tmp_path):
    negative = copies(photos, tmp_path / "negative", ImageOps.invert)
    one, other = (run(tiny_sd, source, tmp_path / "runs", *LORA, "train.steps=1") for source in (photos, negative))
    assert one != other and bits(one) != bits(other)
    assert bits(run(tiny_sd, negative, tmp_path / "alone", *LORA, "train.steps=1")) == bits(other)


@pytest.mark.parametrize("lr, kept", [("1e30", 1), ("1e39", 0)])
def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(tiny_sd, photos, tmp_path, lr, kept):
    settings = ["train.methods=full", "train.steps=9", "train.checkpoint_every=1", "train.keep=9", f"train.lr={lr}"]
    with pytest.raises(UserError, match="no checkpoint yet|last good checkpoint is .*step-000001") as error:
        run(tiny_sd, photos, tmp_path, *settings)
    assert "train.lr=1e-6" in str(error.value)
    (folder,) = tmp_path.iterdir()
    assert status(folder) == "failed"
    assert len(run_folder.checkpoints(folder)) == kept
    for checkpoint in run_folder.checkpoints(folder):
        assert str(checkpoint) in str(error.value)
        assert all(v.isfinite().all() for v in load_file(checkpoint / load_run.STATE).values())


def test_a_run_keeps_its_newest_checkpoints(tiny_sd, photos, tmp_path):
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=5", "train.checkpoint_every=1", "train.keep=2")
    assert [path.name for path in run_folder.checkpoints(folder)] == ["step-000004", "step-000005"]


def test_the_last_checkpoint_is_the_result_with_an_average_too(tiny_sd, photos, tmp_path):
    for more in ([], ["train.ema=0.9"]):
        folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=3", *more)
        both = [base(tiny_sd), base(tiny_sd)]
        for model, at in zip(both, ("", "3")):
            load_run.load_run(model, folder, run_folder.read_manifest(folder), at=at)
        ours, theirs = (model.unet.state_dict() for model in both)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours) and any("lora_B" in k for k in ours)


def test_the_average_is_of_the_weights_and_holds_no_graph(tiny_sd, photos, tmp_path, monkeypatch):
    seen, save = [], loop.save

    def look(run, *given):
        seen.append([mean.requires_grad for mean in run.ema])
        save(run, *given)

    monkeypatch.setattr(loop, "save", look)
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=3", "train.ema=0.5", "train.checkpoint_every=1")
    assert len(seen) == 3 and not any(map(any, seen))
    state = load_file(folder / "checkpoints" / "step-000003" / load_run.STATE)
    result = load_file(folder / "model" / RESULTS["lora"][0])
    weights = {k: v for k, v in state.items() if k.startswith("trained/")}
    assert any(not torch.equal(weights[f"trained/lora:{k}"], v) for k, v in result.items())


def test_a_run_that_another_process_holds_is_refused(tiny_sd, photos, tmp_path):
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=1")
    with run_folder.lock(folder), pytest.raises(UserError, match=f"held by process {os.getpid()}"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.steps=1")


def test_samples_and_the_plan_and_trackers_do_not_change_a_run(tiny_sd, photos, prior, tmp_path, monkeypatch):
    settings = [*LORA, "train.steps=4", "train.text_encoder=true"]
    full = run(tiny_sd, photos, tmp_path / "full", *settings, "train.sample_every=2", "train.trackers=tensorboard", prior=prior)
    assert Image.open(full / "samples" / "step-000002.png").size[0] > 4 * 32
    assert sorted(p.name for p in (full / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    (events,) = full.rglob("events.out.tfevents*")
    data = events.read_bytes()
    assert b"samples" in data and b"PNG" in data and b"loss" in data
    monkeypatch.setattr(preflight, "describe_run", lambda *arguments, **named: [])
    assert bits(run(tiny_sd, photos, tmp_path / "bare", *settings, prior=prior)) == bits(full)


def test_an_unknown_tracker_is_named_before_any_folder_is_made(tiny_sd, photos, tmp_path):
    with pytest.raises(UserError, match="unknown tracker 'tensorbord' .*did you mean 'tensorboard'"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.trackers=tensorbord")
    assert not list(tmp_path.iterdir())


def test_the_plan_says_images_passes_parameters_and_the_vaes_quality(tiny_sd, photos, prior, tmp_path):
    screen = RecordingScreen()
    run(tiny_sd, photos, tmp_path, *LORA, "train.steps=10", "train.batch=2", "token=zqv", prior=prior, screen=screen)
    said = "\n".join(screen.lines)
    assert "5 photos, prompt 'a zqv dog'; 3 class images, prompt 'a dog'" in said
    assert "10 steps of 2 + 2 images: each photo is seen 4 times" in said
    assert "lora: 0.01 M parameters train" in said
    assert " GB, by one measured step" in said
    assert "the base's VAE shows these photos at" in said and "its own images at" in said


def test_too_little_disk_is_said_before_training(tiny_sd, photos, tmp_path, monkeypatch):
    from shutil import _ntuple_diskusage

    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda place: _ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="needs .* GB, and 0.00 GB are free"):
        run(tiny_sd, photos, tmp_path, *FULL, "train.steps=1")
    assert not list(tmp_path.rglob("step-*"))


def data_of(tiny_sd, photos, *more, prior=None):

    recipe = recipe_of(*LORA, *more)
    known, _ = subjects.load_subjects([photos], recipe, tokens=["zqv"], size=32)
    priors = {} if prior is None else {"dog": prior}
    return training_set.build_training_set(base(tiny_sd), recipe, known, priors=priors, text_trains=recipe.train.text_encoder)


def test_captions_beside_photos_are_their_prompts(tiny_sd, photos, tmp_path):
    captioned = copies(photos, tmp_path / "captioned")
    (captioned / "01.txt").write_text("a photo of a {token} {class}\n")
    data = data_of(tiny_sd, captioned)
    assert data.prompts == ["a zqv dog", "a photo of a zqv dog", *["a zqv dog"] * 3, "a dog"]
    for step in range(5):
        (row,) = epoch_order(5, 1, step, seed=0, purpose="subject")
        assert torch.equal(data.at(step).cond(slice(0, 1))["text"][0], data.texts["text"][row])
    assert not torch.equal(data.texts["text"][0], data.texts["text"][1])


@pytest.mark.parametrize("text", ["false", "true"])
def test_each_row_of_a_batch_has_its_own_image_prompt_and_kind(tiny_sd, photos, tmp_path, text):
    captioned = copies(photos, tmp_path / "captioned")
    for i in range(5):
        (captioned / f"0{i}.txt").write_text(["a red hat", "a cat", "a dog in the snow", "a photo", "a {token}"][i])
    classes = torch.arange(4.0)[:, None, None, None].expand(4, 4, 16, 16)
    more = ["train.batch=3", "train.prior_batch=2", f"train.text_encoder={text}"]
    data = data_of(tiny_sd, captioned, *more, prior=classes)
    from personalize.generation import sampling

    for step in range(4):
        batch = data.at(step)
        assert batch.is_prior.tolist() == [False] * 3 + [True] * 2
        drawn = epoch_order(4, 2, step, seed=0, purpose="prior")
        assert batch.z0[3:].mean((1, 2, 3)).tolist() == drawn
        rows = epoch_order(5, 3, step, seed=0, purpose="subject")
        nearest = (batch.z0[:3, None] - data.latents[0][None]).square().mean((2, 3, 4)).argmin(1)
        assert nearest.tolist() == rows
        texts = sampling.encode_texts(data.model, [data.prompts[i] for i in rows] + ["a dog"] * 2)["text"]
        assert torch.allclose(batch.cond(slice(0, 5))["text"], texts, atol=1e-5)
        assert torch.allclose(batch.cond(slice(2, 4))["text"], texts[2:4], atol=1e-5)


def test_every_photo_and_class_image_is_used_equally_often(tiny_sd, photos):
    used = [i for step in range(10) for i in epoch_order(5, 2, step, seed=0, purpose="subject")]
    assert all(used.count(i) == 4 for i in range(5))


def test_a_step_is_the_same_batch_whenever_it_is_asked_for(tiny_sd, tall):
    data = data_of(tiny_sd, tall, "photos.crop=random", "photos.flip=true")
    first = [data.at(step) for step in range(3)]
    again = [data.at(step) for step in (2, 1, 0)][::-1]
    for one, other in zip(first, again):
        assert torch.equal(one.z0, other.z0) and torch.equal(one.eps, other.eps) and torch.equal(one.t, other.t)
    assert not torch.equal(first[0].eps, first[1].eps)


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tiny_sd, photos, tmp_path):
    settings = [*LORA, "train.steps=3", "train.checkpoint_every=1", "train.keep=3"]
    with pytest.raises(Interrupted):
        run(tiny_sd, photos, tmp_path, *settings, screen=RecordingScreen(2, terminate))
    (folder,) = tmp_path.iterdir()
    path = run_folder.checkpoints(folder)[-1] / load_run.STATE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="step-000002 was damaged or changed.* Delete it to do without it"):
        run(tiny_sd, photos, tmp_path, *settings)
    remove_folder(path.parent)
    run(tiny_sd, photos, tmp_path, *settings)
    assert logged(folder) == [1, 2, 3]


def test_the_log_has_each_steps_own_rate_even_when_rows_are_written_late(tiny_sd, photos, tmp_path, monkeypatch):
    late = loop.RunLog.__init__

    def ten_at_once(self, *arguments, **named):
        late(self, *arguments, **named)
        self.every = 10

    monkeypatch.setattr(loop.RunLog, "__init__", ten_at_once)
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=4", "train.lr_schedule=linear")
    rates = [row["lr"] for row in read_jsonl(folder / "log.jsonl")]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_what_is_wrong_is_said_before_any_work(tiny_sd, photos, tmp_path):
    with pytest.raises(UserError, match="what is the subject"):
        personalize.train(photos, settings=[f"base={tiny_sd}", *LORA], runs=tmp_path)
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        run(tiny_sd, photos, tmp_path, *LORA, "draw.sampler=dimm")


def test_a_row_of_the_log_is_json_with_these_keys(tiny_sd, photos, prior, tmp_path):
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=1", "train.prior_weight=0.5", prior=prior)
    (row,) = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert list(row) == ["step", "loss", "subject", "prior", "norm", "lr", "seconds"]
    assert row["loss"] == pytest.approx(row["subject"] + 0.5 * row["prior"], rel=1e-5) and row["prior"] > 0


def test_a_run_of_the_first_schema_still_opens(tiny_sd, photos, tmp_path):
    """When a run had one subject, its manifest had no list of them, and token and class were texts."""
    folder = run(tiny_sd, photos, tmp_path, *FULL, "train.steps=1", "token=zqv")
    manifest = run_folder.read_manifest(folder)
    (subject,) = manifest.pop("subjects")
    old = manifest | {k: v for k, v in subject.items() if k != "prior_folder"} | {"schema": 1, "fingerprint": "old"}
    old["recipe"] |= {"token": "", "class_word": "dog"}
    (folder / "manifest.json").write_text(json.dumps(old))
    opened = load_run.require_run(folder)
    assert load_run.run_subject(opened)["token"] == "zqv"
    assert load_run.load_run(base(tiny_sd), folder, opened) == "model"
    with pytest.raises(UserError, match="no subject 'cat'; it has zqv"):
        load_run.run_subject(opened, "cat")


def test_two_subjects_are_one_run(tiny_sd, photos, tall, tmp_path, prior):
    settings = [f"base={tiny_sd}", *COMMON, *FULL, "train.steps=1", "class_word=dog,cat", "token=zqv,red", "prior.count=2"]
    folder = personalize.train([photos, tall], settings=settings, runs=tmp_path, priors=prior.parent).folder
    (cats,) = set(prior.parent.iterdir()) - {prior}
    assert folder.name == "zqv-dog-red-cat"
    entries = run_folder.read_manifest(folder)["subjects"]
    assert [(e["prompt"], len(e["photos"])) for e in entries] == [("a zqv dog", 5), ("a red cat", 3)]
    assert [Path(e["prior_folder"]) for e in entries] == [prior, cats]


def test_photos_are_decoded_once_and_the_token_is_chosen_once(tiny_sd, photos, tmp_path, monkeypatch):
    """Until the run is done: five photos, five decodings."""
    from personalize.data import photos as photo_files

    counts = {"decode": 0, "choose_tokens": 0}

    def counted(name, real):
        def call(*args, **options):
            counts[name] += 1
            return real(*args, **options)

        return call

    for module, name in ((photo_files, "decode"), (command, "choose_tokens")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    settings = [f"base={tiny_sd}", *COMMON, *LORA, "train.steps=1"]
    personalize.train(photos, settings=settings, runs=tmp_path, priors=tmp_path / "priors")
    assert counts == {"decode": 5, "choose_tokens": 1}


def test_a_renamed_run_is_found_and_another_recipe_says_what_differs_and_how_to_go_on(tiny_sd, photos, tmp_path):
    settings = [*LORA, "train.steps=2"]
    screen = RecordingScreen(1, terminate)
    with pytest.raises(Interrupted):
        run(tiny_sd, photos, tmp_path, *settings, screen=screen)
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / "my-own-name")
    assert run(tiny_sd, photos, tmp_path, *settings) == tmp_path / "my-own-name"
    (tmp_path / "my-own-name").rename(folder)
    screen = RecordingScreen()
    more = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=3", screen=screen)
    assert more != folder
    assert f"this is not the run in {folder}, which stays (train.steps = 3, there 2)" in "\n".join(screen.lines)
    assert f"--init-from {folder}" in "\n".join(screen.lines)
    run(tiny_sd, photos, tmp_path, *LORA, "train.steps=4", f"train.init_from={folder}")


@pytest.mark.slow
def test_a_base_with_another_prediction_and_vae_trains_as_another_base(tiny_sd, photos, tmp_path, monkeypatch, prior):
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    vae = shutil.copytree(tiny_sd / "vae", tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"] *= 2
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    settings, changed = [*FULL, "train.steps=1", "token=zqv"], ["prediction=v_prediction", "zero_snr=true", "base_vae=vae"]
    plain = run(tiny_sd, photos, tmp_path / "runs", *settings)
    screen = RecordingScreen()
    other = run(tiny_sd, photos, tmp_path / "runs", *settings, *changed, screen=screen)
    assert (
        "(prediction = 'v_prediction', there '', zero_snr = True, there False, base_vae = " in "\n".join(screen.lines)
        and other != plain
    )
    assert run_folder.read_manifest(other)["recipe"]["base_vae"] == str(vae)
    assert run_folder.read_manifest(other)["fingerprint"] != run_folder.read_manifest(plain)["fingerprint"]
    with pytest.raises(UserError, match="do not fit this run: fingerprint is"):
        run(tiny_sd, photos, tmp_path / "runs", *settings, *changed, "prior.count=3", prior=prior)
    saved = base(other / "model")
    assert saved.schedule.prediction == "v_prediction" and saved.schedule.alphas_cumprod[-1] == 0
    assert torch.equal(saved.vae.decoder.conv_out.weight, weights["decoder.conv_out.weight"])
    assert not any(path.is_symlink() for path in (other / "model").rglob("*"))
    monkeypatch.chdir(tmp_path / "runs")
    assert len(personalize.generate(["a dog"], run=other, settings=DRAW, out=tmp_path / "out").files) == 1
    shutil.rmtree(tmp_path / "cache")
    assert run(tiny_sd, photos, tmp_path / "runs", *settings, *changed[:2], f"base_vae={vae}") == other


def test_a_failure_at_any_place_is_in_the_manifest(tiny_sd, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("personalize.training.prepare.build_data", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tiny_sd, photos, tmp_path, *LORA)
    (folder,) = tmp_path.iterdir()
    assert status(folder) == "failed"


@pytest.mark.parametrize(
    "setting, said", [("train.prompt=a {tokn} dog", "train.prompt: .*tokn"), ("train.init_from=nowhere", "no such file")]
)
def test_what_is_wrong_with_the_recipe_is_said_before_anything_is_drawn_or_made(tiny_sd, photos, tmp_path, setting, said):
    with pytest.raises(UserError, match=said):
        settings = [f"base={tiny_sd}", "device=cpu", "prior.count=2", setting]
        personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path / "runs", priors=tmp_path / "priors")
    assert not list(tmp_path.iterdir())


def test_ten_steps_without_a_gradient_stop_a_run(tiny_sd, photos, tmp_path, monkeypatch):
    step = engine.Engine.step

    def still(self, *args, **options):
        return step(self, *args, **options) | {"norm": torch.zeros(())}

    monkeypatch.setattr(engine.Engine, "step", still)
    with pytest.raises(UserError, match="nothing trains: the gradient was zero at each of 10 steps"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.steps=12")


def test_a_result_whose_bytes_changed_is_refused_and_a_checkpoint_still_draws(tiny_sd, photos, tmp_path):
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=2")
    assert read_manifest_hashes(folder) == {"model", "step-000002"}
    (folder / "model" / ".DS_Store").touch()
    personalize.generate(["a dog"], run=folder, settings=DRAW)
    path = next((folder / "model").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="model was damaged or changed.*Use a checkpoint: --checkpoint last"):
        personalize.generate(["a dog"], run=folder, settings=DRAW)
    personalize.generate(["a dog"], run=folder, checkpoint="last", settings=DRAW)


def read_manifest_hashes(folder):
    return set(run_folder.read_manifest(folder)["sha256"])


@pytest.mark.slow
def test_a_tracker_gets_the_scores_of_a_checkpoint(photos, tmp_path, monkeypatch):
    logged = []

    class Tracker:
        name = "recorded"

        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            pass

    def raising(*args):
        raise Interrupted("killed while it is scored")

    monkeypatch.setattr(command, "start_trackers", lambda names, folder: [Tracker()])
    settings = ["device=cpu", "train.methods=lora", "train.steps=2", "train.batch=1", "prior.count=0", "choose.every=1"]
    settings += ["choose.steps=1", "choose.count=1", "choose.class_count=1", "choose.strengths=[]"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):  # the first is scored while the run resumes
        patch.setattr(validation.DevSplit, "score", raising)
        personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path)
    folder = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path).folder
    scores = {step: values for step, values in logged if "choose/identity" in values}
    rows = {row["step"]: row for row in read_jsonl(folder / "choosing.jsonl")}
    assert scores.keys() == rows.keys() == {1, 2}
    for step, values in scores.items():
        identity = [entry[-1] for entry in rows[step]["identity"]]
        assert values["choose/identity"] == pytest.approx(sum(identity) / len(identity)) and "choose/class_drift" in values


@pytest.fixture
def own_dogs(tmp_path):
    """Two class images of the user's, and what a system leaves beside them."""
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(2):
        Image.open(ROOT / "data_examples" / "dog" / f"0{i}.png").resize((48, 40)).save(folder / f"{i}.png")
    (folder / ".DS_Store").write_bytes(b"left")
    return folder


def test_ones_own_class_images_are_encoded_counted_and_marked(tiny_sd, own_dogs, tmp_path):
    model, screen = base(tiny_sd), RecordingScreen()
    settings = [f"base={tiny_sd}", *COMMON, *LORA, "train.steps=2"]
    photos, places = ROOT / "data_examples" / "dog", {"runs": tmp_path / "runs", "priors": tmp_path / "priors"}
    folder = personalize.train(photos, settings=settings, prior_images=own_dogs, screen=screen, **places).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["prior"]["dog"]["images"] == "own" and manifest["recipe"]["prior"]["count"] == 2
    place = Path(manifest["subjects"][0]["prior_folder"])
    assert place.parent == tmp_path / "priors" and sorted(path.name for path in place.glob("*.png")) == [
        "00000.png",
        "00001.png",
    ]
    squares = [Image.open(own_dogs / f"{i}.png").convert("RGB").resize((32, 32), 1, (4, 0, 44, 40)) for i in range(2)]
    assert [image.tobytes() for image in class_images.load_class_images(place, 2)] == [image.tobytes() for image in squares]
    pixels = torch.stack([torch.tensor(np.asarray(image)) for image in squares]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(class_images.class_latents(place, 2), model.encode_images(pixels)[0], atol=1e-5)
    assert any("2 class images of your own" in line for line in screen.lines)
    again = personalize.train(photos, settings=settings, prior_images=own_dogs, **places)
    assert (again.folder, again.steps) == (folder, 0)
    (own_dogs / "1.png").unlink()
    assert personalize.train(photos, settings=settings, prior_images=own_dogs, **places).folder != folder


@pytest.mark.parametrize(
    "settings, options, said",
    [
        (["prior.count=0"], {}, "uses no class images"),
        (["prior.kind=predictions"], {}, "uses no class images"),
        ([], {"prior_folder": Path("drawn")}, "--prior drawn has those. Give one"),
        (["class_word=dog,cat"], {}, "of one class, and there are 2 subjects"),
    ],
)
def test_own_class_images_that_would_not_be_used_are_refused(tiny_sd, own_dogs, tmp_path, settings, options, said):
    photos = [str(ROOT / "data_examples" / name) for name in ("dog", "cat")][: 2 if settings == ["class_word=dog,cat"] else 1]
    with pytest.raises(UserError, match=said):
        personalize.train(
            photos if len(photos) > 1 else photos[0], settings=[f"base={tiny_sd}", *COMMON, *settings],
            prior_images=own_dogs, runs=tmp_path / "runs", priors=tmp_path / "priors", **options,
        )  # fmt: skip


def test_paths_in_manifests_are_absolute(tiny_sd, tmp_path, monkeypatch):
    """A run, its base and its class images are found from any folder."""
    (tmp_path / "base").symlink_to(tiny_sd)
    monkeypatch.chdir(tmp_path)
    photos = os.path.relpath(ROOT / "data_examples" / "dog")
    settings = ["base=./base", *COMMON, *LORA, "prior.count=1", "train.steps=2"]
    first = personalize.train(photos, settings=settings, runs=Path("runs"), priors=Path("priors")).folder
    more = [*settings, "train.init_from=runs/" + first.name]
    folder = personalize.train(photos, settings=more, runs=Path("more"), priors=Path("priors")).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (subject,) = manifest["subjects"]
    prior = json.loads((Path(subject["prior_folder"]) / "manifest.json").read_text())
    paths = [manifest["base"], manifest["recipe"]["base"], manifest["prior"]["dog"]["base"], prior["settings"]["base"]]
    assert paths == [str(tmp_path / "base")] * 4
    assert manifest["recipe"]["train"]["init_from"] == str(tmp_path / "runs" / first.name)
    assert all(Path(path).is_absolute() for path in (subject["prior_folder"], *(photo["path"] for photo in subject["photos"])))
    assert personalize.train(photos, settings=more, runs=Path("more"), priors=Path("priors")).steps == 0


@pytest.mark.slow
def test_a_checkpoint_is_kept_at_the_strength_that_keeps_to_the_limits(photos, tmp_path, monkeypatch):
    over = lambda self, limits: [(1.0, "too far")] * (self.strength == 1)  # noqa: E731
    monkeypatch.setattr(checkpoint_selection.ScoredCheckpoint, "over", over)
    settings = ["device=cpu", "train.methods=lora", "train.steps=2", "train.batch=1", "prior.count=0", "choose.every=2"]
    settings += ["choose.steps=1", "choose.count=1", "choose.class_count=1", "choose.strengths=[0.5, 0.25]", "train.lr=1e-2"]
    folder = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["chosen"], manifest["strength"]) == (2, 0.5)
    assert manifest["why"].startswith("step 2 at 0.5 of its strength: the best identity among 1 of 2")
    saved = load_file(folder / "model" / "pytorch_lora_weights.safetensors")
    state = load_file(folder / "checkpoints" / "step-000002" / "state.safetensors")
    key = next(key for key in saved if key.startswith("unet.") and key.endswith("lora_B.weight"))
    (own,) = [value for name, value in state.items() if name.startswith("trained") and name.endswith(key)]
    assert own.abs().max() > 0 and torch.equal(saved[key], 0.5 * own)
    result = personalize.evaluate(folder, settings=["evaluate.count=1", "evaluate.class_count=1", "draw.steps=1"])
    assert result.metrics["run"]["model"] == "step-000002-strength-0.5"
    assert [(row["strength"], row["chosen"]) for row in result.metrics["checkpoints"]] == [(0.5, True), (1.0, False)]
    assert "2 × 0.5, chosen" in result.report.read_text()
