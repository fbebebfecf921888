"""The loss on fixed noise: measured without a trace in the run, the same for the same weights, and DVAR's stop by it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from screens import RecordingScreen

import personalize
from personalize.commands import train as command
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.common.recipe import load_recipe
from personalize.training import fixed_loss
from personalize.training.load_run import STATE

COMMON = ["class_word=dog", "device=cpu", "prior.count=3", "prior.steps=2", "draw.steps=2", "draw.sampler=ddim", "token=zqv"]
COMMON += ["train.methods=lora", "train.lr=1e-2"]


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    return tmp_path_factory.mktemp("priors")


@pytest.fixture
def run(tiny_sd, photos, priors, tmp_path):
    """(name, settings) -> the folder of a run of its own."""

    def train(name, *settings, screen=None):
        options = {"runs": tmp_path / name, "priors": priors, "screen": screen or RecordingScreen()}
        return personalize.train(photos, settings=[f"base={tiny_sd}", *COMMON, *settings], **options).folder

    return train


def losses(folder):
    rows = read_jsonl(folder / "log.jsonl")
    return {row["step"]: {name: row[name] for name in fixed_loss.NAMES if name in row} for row in rows}


def state(folder):
    return load_file(run_folder.checkpoints(folder)[-1] / STATE)


STEPS = ["train.steps=4", "train.text_encoder=true"]


def test_it_is_measured_without_a_trace_in_the_weights(run):
    plain, watched = run("plain", *STEPS), run("watched", *STEPS, "train.held_out_every=2")
    a, b = state(plain), state(watched)
    assert all(torch.equal(a[name], b[name]) for name in a)
    values = losses(watched)
    assert {step for step, row in values.items() if row} == {2, 4} and set(values[4]) == set(fixed_loss.NAMES)
    assert all(values[2][name] != values[4][name] for name in fixed_loss.NAMES), "the weights moved"
    assert not any(losses(plain).values())


@pytest.mark.slow
def test_it_goes_on_over_a_kill(run):
    def crash():
        raise RuntimeError("the power went")

    settings = [*STEPS, "train.held_out_every=1", "train.checkpoint_minutes=0.0000001"]
    with pytest.raises(RuntimeError):
        run("cut", *settings, screen=RecordingScreen(3, crash))
    assert losses(run("cut", *settings)) == losses(run("whole", *settings))


def test_the_same_weights_have_the_same_loss_at_every_step(run):
    values = losses(run("still", "train.steps=3", "train.held_out_every=1", "train.lr=0", "prior.count=0"))
    assert values[1] == values[2] == values[3] and set(values[1]) == {"fixed_subject", "held_out"}


def test_dvar_is_the_share_of_the_variance_that_the_last_values_have():
    falling = [1 / (1 + k) for k in range(60)]
    ends = [n for n in range(1, 61) if n >= 10 and np.var(falling[n - 10 : n]) / np.var(falling[:n]) < 0.15]
    assert [n for n in range(1, 61) if fixed_loss.dvar(falling[:n], 10)] == list(range(ends[0], 61)), "once it held it holds"
    assert 10 < ends[0] < 20
    assert not fixed_loss.dvar([float(k) for k in range(60)], 30) and not fixed_loss.dvar([0.5] * 60, 10)


def test_a_run_that_dvar_stops_is_the_run_of_so_many_steps_and_says_what_it_saved(run, monkeypatch):
    monkeypatch.setattr(fixed_loss, "DVAR_SHARE", 1.1)  # as soon as there are so many values
    five, screen = run("five", "train.steps=5"), RecordingScreen()
    settings = ["train.steps=9", "train.held_out_every=1", "train.stop=dvar", "train.stop_window=5"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(command, "finish", lambda run, screen: 1 / 0)
        run("stopped", *settings)
    folder = run("stopped", *settings, screen=screen)
    a, b = state(five), state(folder)
    assert all(torch.equal(a[name], b[name]) for name in a) and max(losses(folder)) == 5
    (line,) = [line for line in screen.lines if "DVAR" in line]
    assert "ended after step 5 of 9, which saves about" in line
    manifest = json.loads((folder / "manifest.json").read_text())
    stopped = manifest["stopped"]
    assert manifest["status"] == "finished" and (stopped["step"], stopped["steps_saved"]) == (5, 4)
    seconds = [row["seconds"] for row in read_jsonl(folder / "log.jsonl")]
    assert stopped["seconds_saved"] == pytest.approx(4 * sum(seconds) / 5, abs=0.06)


def test_with_scored_checkpoints_the_stop_waits_for_one(monkeypatch):
    monkeypatch.setattr(fixed_loss, "DVAR_SHARE", 1.1)
    recipe = load_recipe(None, ["train.stop=dvar", "train.held_out_every=1", "train.stop_window=5", "choose.every=4"])
    watched = SimpleNamespace(recipe=recipe, losses=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert [step for step in range(5, 13) if fixed_loss.FixedLoss.stops(watched, step)] == [8, 12]


@pytest.mark.parametrize("every, window", [(0, 200), (50, 200)])
def test_a_stop_without_enough_losses_is_refused_with_a_value_that_does(run, every, window):
    with pytest.raises(UserError, match="needs the loss on fixed noise 5 times .* Set it to 10, or give a longer window"):
        run("none", "train.stop=dvar", f"train.held_out_every={every}", f"train.stop_window={window}")
    fixed_loss.check(load_recipe(None, ["train.stop=dvar", "train.held_out_every=10"]))


def test_photos_of_several_shapes_are_refused():
    with pytest.raises(UserError, match="measures images of one shape, and photos.shape is 'buckets'. Give"):
        fixed_loss.check(load_recipe(None, ["train.held_out_every=5", "photos.shape=buckets"]))
