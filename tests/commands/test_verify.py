"""`verify` finds each thing that is no longer as the run had it, names it, and writes nothing."""

import hashlib
import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from screens import RecordingScreen
from test_train import COMMON, LORA

import personalize
from personalize.common import run_folder
from personalize.common.files import content_hash, read_json, write_json
from personalize.training import replay

SETTINGS = [*COMMON, *LORA, "train.steps=5", "train.checkpoint_every=2", "train.keep=9", "train.ema=0.9", "token=zqv"]
SETTINGS += ["photos.background=0.5"]


@pytest.fixture(scope="module")
def trained(tiny_sd, photos, tmp_path_factory):
    """A folder with photos, one with a caption and a mask, class images, and a run of five steps."""
    home = tmp_path_factory.mktemp("verify")
    shutil.copytree(photos, home / "photos")
    (home / "photos" / "00.txt").write_text("a dog here")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 48, 64))
    mask.save(home / "photos" / "01.mask.png")
    settings = [f"base={tiny_sd}", *SETTINGS]
    personalize.train(home / "photos", settings=settings, runs=home / "runs", priors=home / "priors")
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A copy of it in a place of its own."""
    shutil.copytree(trained, tmp_path / "home")
    path = tmp_path / "home" / "runs" / "zqv-dog" / "manifest.json"
    path.write_text(path.read_text().replace(str(trained), str(tmp_path / "home")))
    return tmp_path / "home"


def contents(home):
    files = sorted(path for path in home.rglob("*") if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_run_is_what_it_was_bit_for_bit_and_nothing_is_written(home):
    before = contents(home)
    result = personalize.verify(home / "runs" / "zqv-dog", screen=(screen := RecordingScreen()))
    assert not result.failed and contents(home) == before
    assert [line.partition(":")[0] for line in result.passed] == [
        "base", "photos of zqv", "recipe", "identity", "class images", "step-000002", "step-000004", "step-000005", "model",
        "replay of steps 5 to 5",
    ]  # fmt: skip
    assert result.passed[-1].endswith("as in step-000005 and log.jsonl, bit for bit")
    assert "replaying steps 5 to 5" in screen.lines


def test_steps_before_the_first_checkpoint_are_replayed_from_the_beginning(home):
    run = home / "runs" / "zqv-dog"
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step-00000{step}")
    assert personalize.verify(run).passed[-1] == "replay of steps 1 to 2: as in step-000002 and log.jsonl, bit for bit"
    assert personalize.verify(run, steps=1).passed[-1] == "replay of steps 3 to 3: as in log.jsonl, bit for bit"
    shutil.rmtree(run / "checkpoints" / "step-000002")
    assert personalize.verify(run, steps=2).passed[-1] == "replay of steps 1 to 2: as in log.jsonl, bit for bit"


@pytest.mark.slow
def test_an_extended_run_is_replayed_by_the_rates_that_it_had(tiny_sd, photos, tmp_path):
    settings = [f"base={tiny_sd}", *COMMON, *LORA, "prior.count=0", "train.lr_schedule=cosine", "train.checkpoint_every=2"]
    for steps, extend in ((4, False), (5, True)):
        folder = personalize.train(photos, settings=[*settings, f"train.steps={steps}"], runs=tmp_path, extend=extend).folder
    shutil.rmtree(folder / "checkpoints")
    result = personalize.verify(folder)
    assert result.passed[-1] == "replay of steps 1 to 5: as in log.jsonl, bit for bit" and not result.failed


RUN = "runs/zqv-dog"
STATE = f"{RUN}/checkpoints/step-000004/state.safetensors"
CHANGES = {
    "photo": (lambda h: flipped(h / "photos/02.png"), "photos of zqv: .*02.png"),
    "gone": (lambda h: (h / "photos/02.png").unlink(), "photos of zqv: .*02.png cannot be read"),
    "caption": (
        lambda h: (h / "photos/00.txt").write_text("a dog there"),
        "photos of zqv: the caption of .*00.png has changed",
    ),
    "mask": (lambda h: half(h / "photos/01.mask.png"), "photos of zqv: the mask of .*01.png has changed"),
    "recipe": (lambda h: edited(h, "recipe.toml", "steps = 5", "steps = 6"), "recipe: train.steps is 6 in recipe.toml, 5 in"),
    "both": (lambda h: both(h), "identity: photos, captions, masks, base, recipe"),
    "checkpoint": (lambda h: flipped(h / STATE), "step-000004: its SHA-256 is another"),
    "result": (lambda h: flipped(next((h / RUN / "model").rglob("*.safetensors"))), "model: its SHA-256 is another"),
    "class images": (lambda h: edited(h, "priors/*/manifest.json", 'ance": 5.0', 'ance": 4.0'), "class images: .*guidance"),
    "base": (lambda h: edited(h, "manifest.json", 'print": "', 'print": "0'), "base: .* and the run was trained on 0"),
}


def half(path):
    image = Image.open(path)
    image.paste(0, (0, 0, image.width // 2, image.height))
    image.save(path)


def both(home):
    edited(home, "recipe.toml", "lr = 0.01", "lr = 0.02")
    edited(home, "manifest.json", '"lr": 0.01', '"lr": 0.02')


def edited(home, name, before, after):
    (path,) = home.glob(name) if "/" in name else [home / "runs" / "zqv-dog" / name]
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named(home, name, read_once):
    change, said = CHANGES[name]
    change(home)
    result = personalize.verify(home / "runs" / "zqv-dog", steps=0)
    assert any(re.search(said, line) for line in result.failed), result.failed
    assert len(result.failed) <= 3 and len(result.passed) >= 6, "the other things are as they were"


def test_weights_and_losses_that_no_training_gave_are_found(home):
    run = home / "runs" / "zqv-dog"
    path = run / "checkpoints" / "step-000005" / "state.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.startswith("trained/"))
    state[name] = state[name] * 1.0001
    save_file(state, path, {"step": "5"})
    manifest = read_json(run / "manifest.json")
    manifest["sha256"][path.parent.name] = content_hash(path.parent)
    write_json(run / "manifest.json", manifest)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows[4]["loss"] *= 1.0001
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss, weights = personalize.verify(run).failed
    assert re.search("replay of steps 5 to 5: loss of step 5 is .*, log.jsonl says", loss)
    assert re.search("replay of steps 5 to 5: 1 of .* tensors differ, such as trained/", weights)
    write_json(run / "manifest.json", manifest | {"machine": {"device": "cuda", "kind": "a card"}})
    said = personalize.verify(run).passed[-1]
    assert "within 2% of each loss and 5% of the way (it was trained with device cuda, here cpu, kind a card, here" in said


def test_a_tolerance_is_of_the_way_that_the_weights_went():
    import torch

    before, then = {"trained/a": torch.zeros(4)}, {"trained/a": torch.ones(4)}
    near, far = {"trained/a": torch.full((4,), 0.96)}, {"trained/a": torch.full((4,), 0.9)}
    assert replay._other_weights(before, near, then, exact=False) == []
    assert replay._other_weights(before, far, then, exact=False) == [
        "the weights miss the checkpoint by 10.0% of the way to it"
    ]


def test_the_command_ends_with_status_3_where_something_differs(home, terminal, read_once):
    run = home / "runs" / "zqv-dog"
    assert terminal("verify", run, "--steps", "0", "-q")[0] == 0
    flipped(run / "checkpoints" / "step-000004" / "state.safetensors")
    status, out, _ = terminal("verify", run, "--steps", "0", "-q")
    assert status == 3 and "differs  step-000004: its SHA-256 is another" in out and "ok       recipe: " in out
    assert run_folder.read_manifest(run)["status"] == "finished"
