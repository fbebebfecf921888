"""`train --profile`: what it finds adds up, and the run does not know of it."""

import gzip
import hashlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from screens import RecordingScreen, terminate

import personalize
from personalize.cli import app
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import read_jsonl, remove_folder
from personalize.training import compile, profiler

PARTS = ["batch", "forward and loss", "backward", "clip and optimizer", "rest"]
COMMON = ["class_word=dog", "device=cpu", "prior.count=0", "train.methods=lora", "train.lr=1e-2", "train.steps=9"]
RUN = ["checkpoints/step-000009/state.safetensors", "log.jsonl", "manifest.json", "model/pytorch_lora_weights.safetensors"]
RUN += ["lock.flock", "photos.png", "recipe.toml"]


@pytest.fixture
def train(tiny_sd, photos, tmp_path):
    """Trains into a folder -> the run's folder, what was said."""

    def call(runs, *more, profile, screen=None):
        screen, settings = screen or RecordingScreen(), [f"base={tiny_sd}", *COMMON, *more]
        result = personalize.train(photos, settings=settings, runs=tmp_path / runs, profile=profile, screen=screen)
        return result.folder, screen.lines

    return call


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bits(folder):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder) if name.endswith("safetensors")]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="lora"),
        pytest.param(
            ["train.methods=full", "train.text_encoder=true", "train.accumulate=2", "train.batch=2", "train.ema=0.9"],
            id="full, text encoder, parts, average",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_is_the_same_bit_for_bit_with_and_without_a_profile(train, more):
    plain, _ = train("plain", *more, profile=False)
    profiled, _ = train("profiled", *more, profile=True)
    assert bits(plain) == bits(profiled) and len(bits(plain)) >= 2
    names = ("loss", "subject", "prior", "norm", "lr")
    rows = [[[row[name] for name in names] for row in read_jsonl(folder / "log.jsonl")] for folder in (plain, profiled)]
    assert rows[0] == rows[1]
    assert run_folder.read_manifest(plain)["identity"] == run_folder.read_manifest(profiled)["identity"]


def parts_said(lines):
    first = next(i for i, line in enumerate(lines) if line.startswith("where the "))
    return [line.split("  ")[1] for line in lines[first + 1 :]]


def test_a_profile_is_a_table_and_a_trace_in_the_run_and_the_same_command_without_it_finds_the_run(train):
    folder, said = train("runs", profile=True)
    assert files(folder) == sorted([*RUN, "profile/profile.md", "profile/trace.json.gz"])
    text = (folder / "profile" / "profile.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z ]+) \| ([0-9.]+) \|", text, re.M))
    assert list(rows) == PARTS == parts_said(said) and all(float(ms) > 0 for ms in rows.values())
    assert sum(map(float, rows.values())) == pytest.approx(float(re.search(r"([0-9.]+) ms under", text)[1]), abs=0.1)
    assert f"float32 on cpu, {torch.get_num_threads()} threads" in text and "aten::" in text and "Self CPU" in text
    trace = json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {*PARTS[:-1], "ProfilerStep#3", "ProfilerStep#4", "aten::convolution_backward"} <= names
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for profile, tail in ((False, 0), (True, 1)):
        again, said = train("runs", profile=profile)
        assert again == folder and {name: (folder / name).read_bytes() for name in files(folder)} == before
        assert said[-1 - tail] == f"this run is finished: {folder}"
    assert said[-1].startswith("nothing was trained, so nothing was profiled")


@pytest.mark.slow
def test_a_compiled_step_has_its_parts_too(train, monkeypatch):
    monkeypatch.setattr(compile, "BACKEND", "eager")
    assert parts_said(train("runs", "train.engine=compiled", "train.steps=32", profile=True)[1]) == PARTS


@pytest.mark.slow
def test_a_profile_takes_the_place_of_an_older_one(train):
    folder, _ = train("runs", profile=True)
    (folder / "profile" / "old").touch()
    run_folder.write_manifest(folder, run_folder.read_manifest(folder) | {"status": "interrupted"})
    remove_folder(folder / "checkpoints")
    assert train("runs", profile=True)[0] == folder
    assert [name for name in files(folder) if "profile" in name] == ["profile/profile.md", "profile/trace.json.gz"]


@pytest.mark.parametrize("after", [2, 4, 6], ids=["warming up", "tracing", "traced"])
def test_a_stop_at_any_time_leaves_no_profile(train, after):
    with pytest.raises(Interrupted, match=f"stopped at step {after} of 9"):
        train("cut", profile=True, screen=RecordingScreen(after, terminate))
    whole, _ = train("whole", profile=False)
    folder, _ = train("cut", profile=True)
    assert bits(folder)[-1] == bits(whole)[-1]
    profiled = (folder / "profile").exists()
    assert profiled == (9 - after >= profiler.LEAST)


def test_a_rest_too_short_to_profile_is_said(train):
    with pytest.raises(Interrupted):
        train("runs", profile=False, screen=RecordingScreen(7, terminate))
    folder, said = train("runs", profile=True)
    assert "not profiled: 2 steps are left, and it takes 4 at least" in said and not (folder / "profile").exists()


def test_too_few_steps_are_refused_before_a_class_image_is_drawn(tiny_sd, photos, tmp_path):
    settings = [*COMMON, f"base={tiny_sd}", "prior.count=2", "train.steps=3"]
    with pytest.raises(UserError, match="train.steps = 3 is too few to profile, which takes 4 at least"):
        personalize.train(photos, settings=settings, runs=tmp_path / "runs", priors=tmp_path / "priors", profile=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [False, True])
def test_the_option_reaches_the_run_and_is_no_setting(monkeypatch, asked):
    seen, result = {}, SimpleNamespace(folder="f", steps=1, seconds=1)
    monkeypatch.setattr("personalize.commands.train.train", lambda photos, **options: seen.update(options) or result)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr("sys.argv", ["personalize", "train", "photos", "--class", "dog", *["--profile"] * asked])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code and seen["profile"] is asked
    assert not any("profile" in text for text in seen["settings"])


@pytest.mark.parametrize(("steps", "traced"), [(4, [2]), (9, [3, 4]), (32, [8, 9, 10, 11, 12]), (800, [8, 9, 10, 11, 12])])
def test_of_many_steps_the_ninth_to_the_thirteenth_are_traced_and_some_are_always_left_alone(steps, traced):
    watch = profiler.StepProfiler(torch.device("cpu"), steps)
    recorded = [k for k in range(steps) if "RECORD" in watch.torch.schedule(k).name]
    assert recorded == traced and watch.before == traced[-1] + 1 < steps
