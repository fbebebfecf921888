"""`personalize plan`: what a run will need, before anything is read, and which switch makes it fit."""

import json

import pytest
import torch
from typer.testing import CliRunner

import personalize
from personalize.cli import app
from personalize.commands import plan as command
from personalize.common.recipe import load_recipe
from personalize.training.memory import machine, rehearsal
from personalize.training.memory.counter import Work
from personalize.training.memory.switches import memory_switches

LORA = "train.methods=lora"


@pytest.fixture
def planned(tiny_sd, photos):
    def run(*settings):
        return personalize.plan(
            photos,
            class_word="dog",
            settings=[f"base={tiny_sd}", "device=cpu", "prior.kind=predictions", "prior.count=2", *settings],
        )

    return run


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes are free."""
    return lambda size: monkeypatch.setattr(machine, "free_bytes", lambda device: size)


@pytest.fixture
def rehearsed_once(monkeypatch):
    """A test that plans one recipe several times waits for one rehearsal of it."""
    kept, rehearse = {}, rehearsal.rehearse

    def once(recipe, subjects):
        if recipe not in kept:
            kept[recipe] = rehearse(recipe, subjects)
        return kept[recipe]

    monkeypatch.setattr(rehearsal, "rehearse", once)


def test_no_weight_is_read(planned, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    assert planned().fits


@pytest.mark.slow
def test_what_saves_memory_is_named_when_it_does_not_fit_and_is_enough(planned, free, rehearsed_once):
    whole = planned("train.batch=8", "train.prior_batch=8").peak
    free(int(whole * 0.9))
    tight = planned("train.batch=8", "train.prior_batch=8")
    assert not tight.fits and tight.switch
    assert planned("train.batch=8", "train.prior_batch=8", *tight.switch.split()).fits


@pytest.mark.slow
def test_nothing_is_promised_where_nothing_helps(planned, free):
    free(1000)
    assert planned().switch == ""


@pytest.mark.parametrize(
    "more, expected",
    [
        ([], ["gradient_checkpointing", "optimizer", "accumulate", "methods"]),
        (["train.methods=lora"], ["gradient_checkpointing", "accumulate", "quantize", "quantize"]),
        (["train.methods=lora", "train.quantize=8bit", "train.gradient_checkpointing=true"], ["accumulate", "quantize"]),
        (["train.methods=textual-inversion"], ["gradient_checkpointing", "optimizer", "accumulate"]),
        (["train.accumulate=2", "train.optimizer=adamw8bit", "train.ema=0.9"], ["gradient_checkpointing", "ema", "methods"]),
    ],
)
def test_switches_are_those_that_the_recipe_has_not_turned(more, expected):
    found = memory_switches(load_recipe(None, more))
    assert [name.removeprefix("train.").partition("=")[0] for name, _ in found] == expected


@pytest.mark.parametrize(
    "more, offered",
    [([LORA], True), ([], False), ([LORA, "train.quantize=8bit"], False), ([LORA, "train.engine=graph"], False)],
)
def test_a_gpu_is_offered_blocks_that_wait_where_they_can(monkeypatch, more, offered):
    recipe = load_recipe(None, more)
    assert "train.offload=true" not in dict(memory_switches(recipe)), "on a CPU they would wait where they compute"
    monkeypatch.setattr("personalize.training.memory.switches.choose_device", lambda name: torch.device("cuda"))
    assert ("train.offload=true" in dict(memory_switches(recipe))) == offered


@pytest.mark.slow
def test_a_larger_batch_needs_more_memory_and_time_and_parts_of_it_less_memory(planned):
    one, four, parts = (planned(f"train.batch={n}", f"train.accumulate={k}") for n, k in ((1, 1), (8, 1), (8, 9)))
    assert one.peak < four.peak and parts.peak < four.peak
    assert one.seconds < four.seconds


def test_the_terminal_says_it_and_exits_with_1_where_it_does_not_fit(tiny_sd, photos, free, monkeypatch, rehearsed_once):
    words = ["plan", str(photos), "--class", "dog", "--base", str(tiny_sd), "--device", "cpu"]
    done = CliRunner().invoke(app.app, [*words, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["fits"]
    free(1000)
    monkeypatch.setattr(command, "memory_switches", lambda recipe: [])
    done = CliRunner().invoke(app.app, [*words, "--quiet"])
    assert done.exit_code == 1 and done.stdout.startswith("it does not fit")


def test_time_is_work_over_pace_and_at_least_the_calls():
    speed = machine.MachineSpeed(flops=100.0, moved=10.0, call=0.5)
    assert speed.seconds(Work(flops=200, moved=30, calls=1)) == 5.0
    assert speed.seconds(Work(flops=200, moved=30, calls=100)) == 50.0


def test_this_machine_has_a_pace_and_free_memory():
    speed = machine.measure_speed(torch.device("cpu"), torch.float32)
    assert 1e8 < speed.flops < 1e14 and 1e7 < speed.moved < 1e13 and 1e-8 < speed.call < 1e-2
    assert 1e6 < machine.free_bytes(torch.device("cpu")) < 1e14
