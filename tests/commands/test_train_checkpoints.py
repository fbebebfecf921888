"""Checkpoints by the clock, and a run that is extended: neither changes a bit, a choice or a file that is left."""

import math
import shutil
from types import SimpleNamespace

import pytest
from screens import RecordingScreen, terminate
from test_train import COMMON, FULL, LORA, bits, crash, files, logged, run, status, steps_of

import personalize
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import read_jsonl
from personalize.common.recipe import load_recipe
from personalize.evaluation import checkpoint_selection
from personalize.training import checkpoint_schedule

ALWAYS, NEVER = "train.checkpoint_minutes=0.0000001", "train.checkpoint_minutes=0"


@pytest.fixture(scope="module")
def choose(eyes):
    """Scores a checkpoint every two steps on one image each of subject and class."""
    return [
        "choose.every=2", "choose.count=1", "choose.class_count=1", "choose.prompts=['a {token} {class}']",
        "choose.patience=0", f"evaluate.dino={eyes / 'encoders/identity'}", f"evaluate.clip={eyes / 'encoders/clip'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def settings(choose):
    """Of a run of six steps in which all that a checkpoint may hold, and all that is chosen by, is there."""
    return [
        *LORA,
        "train.steps=6",
        "train.keep=1",
        "train.ema=0.9",
        "train.warmup=2",
        "token=zqv",
        "choose.strengths=[0.5, 2]",
        *choose,
    ]


@pytest.fixture(scope="module")
def whole(tiny_sd, photos, settings, tmp_path_factory):
    """That run without a stop, and without checkpoints by the clock."""
    return run(tiny_sd, photos, tmp_path_factory.mktemp("whole"), *settings, NEVER)


@pytest.mark.slow
def test_checkpoints_by_the_clock_are_two_until_the_end_and_change_nothing_of_a_run(tiny_sd, photos, tmp_path, settings, whole):
    with pytest.raises(RuntimeError, match="power"):
        run(tiny_sd, photos, tmp_path, *settings, ALWAYS, screen=RecordingScreen(6, crash))
    folder = tmp_path / whole.name
    scored = checkpoint_selection.read_scored(folder / checkpoint_selection.FILE)
    best = max(scored, key=checkpoint_selection.identity).step
    assert set(steps_of(folder)) == {3, 4, 5, best}, "the newest two by the clock, the newest and the best of the others"
    screen = RecordingScreen()
    assert run(tiny_sd, photos, tmp_path, *settings, ALWAYS, screen=screen) == folder
    assert any("after step 5" in line for line in screen.lines)
    assert bits(folder) == bits(whole) and files(folder).keys() == files(whole).keys()
    manifests = [run_folder.read_manifest(f) for f in (whole, folder)]
    assert all(manifests[0][key] == manifests[1][key] for key in ("identity", "chosen", "strength", "why"))
    assert run(tiny_sd, photos, tmp_path, *settings, screen=screen) == folder
    assert screen.lines[-1] == f"this run is finished: {folder}"


def test_a_run_shorter_than_the_interval_writes_no_checkpoint_more(tiny_sd, photos, tmp_path):
    with pytest.raises(RuntimeError, match="power"):
        run(tiny_sd, photos, tmp_path, *LORA, "train.steps=3", screen=RecordingScreen(3, crash))
    (folder,) = tmp_path.iterdir()
    assert steps_of(folder) == []


def test_the_clock_counts_from_the_last_checkpoint_of_any_kind(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: seconds)
    monkeypatch.setattr(checkpoint_schedule, "time", now)
    seconds = 100.0
    clock, never = checkpoint_schedule.Clock(5), checkpoint_schedule.Clock(0)
    seconds = 399.9
    assert not clock.is_due()
    seconds = 400.0
    assert clock.is_due() and not never.is_due()
    clock.reset()
    assert not clock.is_due()
    seconds = 700.0
    assert clock.is_due()


@pytest.mark.parametrize(
    "settings, scheduled",
    [
        ([], {10}),
        (["train.checkpoint_every=4"], {4, 8, 10}),
        (["choose.every=5", "train.checkpoint_every=4"], {4, 5, 8, 10}),
        (["train.sample_every=3"], {3, 10}),
        (["train.sample_every=3", "train.checkpoint_every=2"], {2, 4, 6, 8, 10}),
    ],
)
def test_the_recipe_alone_says_which_checkpoints_stay(settings, scheduled):
    recipe = load_recipe(None, ["train.steps=10", *settings])
    assert {step for step in range(1, 11) if checkpoint_schedule.is_scheduled(recipe, step)} == scheduled


def test_the_disk_for_checkpoints_by_the_clock_is_asked_for_before_training(tiny_sd, photos, tmp_path, monkeypatch):
    asked = []

    def need(folder, size, remedy):
        asked.append(size)
        raise UserError(remedy)

    monkeypatch.setattr(run_folder, "require_free_disk", need)
    for minutes, said in ((NEVER, "^$"), (ALWAYS, "--set train.checkpoint_minutes=0 needs 2 checkpoints less")):
        with pytest.raises(UserError, match=said):
            run(tiny_sd, photos, tmp_path, *FULL, "train.steps=3", minutes)
    assert asked[1] == pytest.approx(2.5 * asked[0], rel=0.01)  # weights and moments of three checkpoints for one, and a result


def test_a_file_in_its_folder_makes_a_run_save_and_sample_itself_and_changes_nothing_of_it(
    tiny_sd, photos, tmp_path, settings, whole
):
    ask = tmp_path / whole.name / run_folder.SAVE_NOW
    folder = run(tiny_sd, photos, tmp_path, *settings, NEVER, screen=RecordingScreen(1, ask.touch))
    assert not ask.exists() and [path.name for path in (folder / "samples").iterdir()] == ["step-000001.png"]
    assert bits(folder) == bits(whole) and steps_of(folder) == steps_of(whole)


def extended(folder, photos, runs, *settings):
    """A run extended by --extend -> its folder and what was said."""
    screen = RecordingScreen()
    settings = [f"base={folder}", *COMMON, "prior.count=0", *settings]
    return personalize.train(photos, settings=settings, runs=runs, extend=True, screen=screen).folder, "\n".join(screen.lines)


@pytest.mark.slow
def test_a_finished_run_that_is_extended_is_the_run_of_as_many_steps_from_the_start(tiny_sd, photos, tmp_path, settings, whole):
    short = run(tiny_sd, photos, tmp_path, *settings, "train.steps=3")
    rows = checkpoint_selection.read_scored(short / checkpoint_selection.FILE)
    assert {row.step for row in rows} == {2, 3} and {row.strength for row in rows} > {1.0}
    stale = short / "evaluation" / "pictures" / "model-of-three-steps"
    stale.mkdir(parents=True)
    folder, said = extended(tiny_sd, photos, tmp_path, *settings)
    assert folder == short and "after step 3" in said and not stale.exists()
    assert bits(folder) == bits(whole) and logged(folder) == logged(whole) == [1, 2, 3, 4, 5, 6]
    assert (folder / checkpoint_selection.FILE).read_text() == (whole / checkpoint_selection.FILE).read_text()
    kept = [{name for name in files(f) if not name.startswith("choosing/")} for f in (folder, whole)]
    assert kept[0] == kept[1]
    now, then = (run_folder.read_manifest(f) for f in (folder, whole))
    assert now.pop("extended") == [{"steps": 3, "step": 3}]
    for manifest in (now, then):
        assert manifest.pop("sha256")["step-000006"] and manifest["recipe"]["train"].pop("checkpoint_minutes") is not None
    assert now == then
    assert run(tiny_sd, photos, tmp_path, *settings) == folder and len(list(tmp_path.glob("*/manifest.json"))) == 1


@pytest.mark.slow
def test_an_interrupted_run_is_extended_and_a_stopped_extension_goes_on_by_either_command(tiny_sd, photos, tmp_path):
    settings = [*LORA, "train.lr_schedule=cosine", "token=zqv"]
    with pytest.raises(Interrupted):
        run(tiny_sd, photos, tmp_path, *settings, "train.steps=4", screen=RecordingScreen(2, terminate))
    (folder,) = tmp_path.iterdir()
    with pytest.raises(Interrupted):
        screen = RecordingScreen(3, terminate)
        options = {"settings": [f"base={tiny_sd}", *COMMON, "prior.count=0", *settings, "train.steps=5"], "screen": screen}
        personalize.train(photos, **options, runs=tmp_path, extend=True)
    again, said = extended(tiny_sd, photos, tmp_path, *settings, "train.steps=5")
    assert again == folder and "after step 3" in said and status(folder) == "finished" and logged(folder) == [1, 2, 3, 4, 5]
    assert "rates are up to step 2 those of 4 steps, then anew those of 5" in "\n".join(screen.lines) and "up to step 2" in said
    rates = [row["lr"] for row in read_jsonl(folder / "log.jsonl")]
    four, five = ([1e-2 * (1 + math.cos(math.pi * k / n)) / 2 for k in range(n)] for n in (4, 5))
    assert rates == pytest.approx([*four[:2], *five[2:]])
    screen = RecordingScreen()
    assert run(tiny_sd, photos, tmp_path, *settings, "train.steps=5", screen=screen) == folder
    assert "up to step 2 those of 4 steps" in "\n".join(screen.lines)


def test_what_cannot_be_extended_is_said_with_a_remedy(tiny_sd, photos, tmp_path):
    with pytest.raises(UserError, match=r"--extend finds no run in .* with fewer steps: leave it out"):
        extended(tiny_sd, photos, tmp_path, *LORA, "train.steps=2")
    folder = run(tiny_sd, photos, tmp_path, *LORA, "train.steps=2")
    with pytest.raises(UserError, match=r"with fewer steps: this is not the run in .*train.lr = 0.5, there 0.01"):
        extended(tiny_sd, photos, tmp_path, *LORA, "train.lr=0.5", "train.steps=3")
    with pytest.raises(UserError, match="has 2 steps, and --extend asks for 1: no run is made shorter. Give more --steps"):
        extended(tiny_sd, photos, tmp_path, *LORA, "train.steps=1")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=f"no checkpoint in {folder} to go on from. Leave out --extend .*--init-from {folder}"):
        extended(tiny_sd, photos, tmp_path, *LORA, "train.steps=3")
    assert status(folder) == "finished"
    assert run(tiny_sd, photos, tmp_path, *LORA, "train.steps=2") == folder
