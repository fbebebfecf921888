"""Many subjects in one job: what is done stays done, a row that fails is a row, and a killed job goes on."""

import json
import os
import shutil
import signal

import pytest
from screens import RecordingScreen, terminate

import personalize
from personalize.commands import many as command
from personalize.commands.personalizer import Personalizer
from personalize.common.errors import Interrupted, UserError
from personalize.common.files import read_jsonl
from personalize.training import loop

SHORT = ["device=cpu", "train.methods=lora", "train.steps=2", "prior.count=0", "choose.every=0", "train.lr=1e-3"]


@pytest.fixture
def job(tiny_sd, photos, tmp_path):
    """Runs a manifest of rows with these changes -> the result."""
    shutil.copytree(photos, tmp_path / "dog")
    (tmp_path / "none").mkdir()

    def run(*changes, screen=None, **options):
        rows = [{"id": f"r{k}", "photos": "dog", "class": "dog", **change} for k, change in enumerate(changes, 1)]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders = {"runs": tmp_path / "runs", "priors": tmp_path / "priors"}
        settings = [f"base={tiny_sd}", *SHORT, *options.pop("settings", [])]
        return personalize.many(
            tmp_path / "m.jsonl", settings=settings, **folders, screen=screen or RecordingScreen(), **options
        )

    return run


def statuses(result):
    return {row["id"]: row["status"] for row in result.rows}


def test_a_row_that_fails_is_a_failed_row_and_is_tried_again_when_asked(job, tmp_path):
    screen = RecordingScreen()
    poison = {"train.lr": 1e30, "train.clip": 0.0}
    result = job({}, poison, {"photos": "none"}, screen=screen)
    assert statuses(result) == {"r1": "done", "r2": "failed", "r3": "failed"} and result.failed == 2
    assert "nan" in result.rows[1]["error"] and str(tmp_path / "none") in result.rows[2]["error"]
    assert result.rows[0]["run"] == str(tmp_path / "runs" / "r1") and result.rows[0]["peak_bytes"] > 0
    assert screen.lines[-3].startswith("r1: done. 1 of 3 rows done, 0 failed, ") and screen.lines[-3].endswith(" left")
    assert screen.lines[-1].startswith("r3: failed: ")
    from datasets import Dataset

    assert Dataset.from_parquet(str(result.file), cache_dir=str(tmp_path / "cache")).to_list() == result.rows
    rows = [{}, {}, {"photos": "none"}]  # the second has changed
    shutil.copytree(tmp_path / "dog", tmp_path / "none", dirs_exist_ok=True)
    again = job(*rows)
    assert statuses(again) == {"r1": "done", "r2": "done", "r3": "failed"}
    assert again.rows[0] == result.rows[0]  # its seconds too: nothing was trained
    assert job(*rows, retry_failed=True).failed == 0


@pytest.mark.slow
def test_a_job_that_is_killed_in_its_third_row_of_six_goes_on_and_has_the_same_bits(job, tmp_path):
    from test_personalizer import bits

    rows = [{"seed": k} for k in range(6)]
    child = os.fork()
    if not child:
        save = loop.save

        def kill_in_the_third_row(run, step, screen):
            save(run, step, screen)
            if run.folder.name == "r3":
                os.kill(os.getpid(), signal.SIGKILL)

        loop.save = kill_in_the_third_row
        try:
            job(*rows, settings=["train.checkpoint_every=1"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    runs = tmp_path / "runs"
    assert [row["id"] for row in read_jsonl(runs / "results.jsonl")] == ["r1", "r2"]
    before = {name: (runs / name / "manifest.json").stat().st_mtime_ns for name in ("r1", "r2")}
    screen = RecordingScreen()
    result = job(*rows, settings=["train.checkpoint_every=1"], screen=screen)
    assert statuses(result) == {f"r{k}": "done" for k in range(1, 7)}
    assert before == {name: (runs / name / "manifest.json").stat().st_mtime_ns for name in before}
    steps = [row["step"] for row in read_jsonl(runs / "r3" / "log.jsonl")]
    assert steps == [1, 2]
    resumed = bits(runs / "r3")
    shutil.rmtree(runs)
    assert job(*rows[:3], settings=["train.checkpoint_every=1"]).failed == 0 and bits(runs / "r3") == resumed


def test_a_stopped_job_says_where_it_goes_on(job, tmp_path, monkeypatch):
    def stop(run, start, **options):
        raise Interrupted("stopped at step 1 of 2; the same command goes on from there")

    monkeypatch.setattr(loop, "run_steps", stop)
    with pytest.raises(Interrupted, match="row 'r1': stopped at step 1.*0 of 2 rows done"):
        job({}, {"seed": 1})
    assert [row["status"] for row in read_jsonl(tmp_path / "runs" / "results.jsonl")] == ["interrupted"]


def test_sigterm_between_steps_stops_the_job_too(job, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Personalizer, "__call__", lambda self, row: terminate())
    with pytest.raises(Interrupted, match="row 'r1': stopped. 0 of 1 rows done"):
        job({})
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_shards_share_the_work_and_the_whole_command_gathers_it(job, tmp_path):
    rows = [{"seed": k, "train.steps": 1} for k in range(3)]
    assert list(statuses(job(*rows, shard="0/2"))) == ["r1", "r3"]
    second = job(*rows, shard="1/2")
    assert list(statuses(second)) == ["r2"] and second.file == tmp_path / "runs" / "results-1-of-2.parquet"
    assert statuses(job(*rows)) == {f"r{k}": "done" for k in (1, 2, 3)}


def test_nothing_runs_where_the_manifest_recipe_or_base_is_wrong(job, tmp_path):
    for change, settings in (({"train.lr": "fast"}, []), ({"id": "r1/x"}, []), ({}, ["base=nowhere/at/all"])):
        with pytest.raises(UserError):
            job({}, change, settings=settings)
    assert not (tmp_path / "runs").exists()


def test_two_processes_do_not_write_one_table(job, tmp_path):
    with command._held(tmp_path / "runs" / "results.jsonl"), pytest.raises(UserError, match="another process writes"):
        job({})


def test_exit_statuses_tell_a_retry_policy_what_to_do(terminal, tiny_sd, photos, tmp_path):
    (tmp_path / "m.csv").write_text(f"id,photos,class\na,{photos},dog\nb,nowhere,dog\n")
    options = [word for text in [f"base={tiny_sd}", *SHORT] for word in ("--set", text)]
    status, out, _ = terminal("many", "m.csv", *options, "--quiet")
    assert status == 3 and "failed   b: " in out and "1 done, 1 failed" in out
    status, out, _ = terminal("many", "m.csv", *options, "--json", "--shard", "0/2")
    assert status == 0 and json.loads(out)["failed"] == 0
    (tmp_path / "m.csv").write_text("id,photos,class\na,x,\n")
    status, _, err = terminal("many", "m.csv", *options)
    assert status == 2 and "row 1 ('a') does not say the class" in err
