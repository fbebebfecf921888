"""Rows shared by Ray's workers: the results of the plain loop, whatever dies meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from screens import RecordingScreen
from test_personalizer import bits

import personalize
from personalize.commands import many as command
from personalize.commands import many_ray
from personalize.commands.personalizer import Personalizer
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.training import loop

SHORT = [
    "device=cpu", "train.methods=lora", "train.steps=2", "train.lr=1e-3", "train.checkpoint_every=1", "prior.count=3",
    "prior.steps=2", "draw.steps=2", "draw.sampler=ddim", "choose.every=0",
]  # fmt: skip
ROOT = Path(personalize.__file__).parents[1]


class Mortal(Personalizer):
    """A worker that dies after the first step of a row called mortal, once, and each time in one called doomed."""

    def train(self, row):
        save, died = loop.save, self.runs / "died"

        def die(run, step, screen):
            save(run, step, screen)
            if run.folder.name == "doomed" or (run.folder.name == "mortal" and not died.exists()):
                died.write_text(f"{os.getpid()} {step}")
                os.kill(os.getpid(), signal.SIGKILL)

        loop.save = die
        return super().train(row)


@pytest.fixture
def table(photos, tmp_path):
    """Writes a manifest of rows with these changes -> its path."""
    shutil.copytree(photos, tmp_path / "dog")

    def write(*changes):
        rows = [{"id": f"r{k}", "photos": "dog", "class": "dog", **change} for k, change in enumerate(changes, 1)]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "m.jsonl"

    return write


@pytest.fixture
def short_place(monkeypatch):
    """Ray's own files in a folder whose sockets' names fit, and no cluster but a local one."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        monkeypatch.setenv("RAY_TMPDIR", place)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield Path(place)


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


@pytest.mark.ray
def test_two_workers_have_the_bits_of_the_loop_and_share_class_images(table, tiny_sd, tmp_path, short_place):
    manifest = table(*[{"seed": k // 2, "train.steps": 2 + k} for k in range(4)], {"photos": "none"})
    settings = [f"base={tiny_sd}", *SHORT]

    def run(name, **options):
        folders = {"runs": tmp_path / name / "runs", "priors": tmp_path / name / "priors"}
        return personalize.many(manifest, settings=settings, **folders, **options).rows, tmp_path / name

    local, loop_folder = run("loop")
    screen = RecordingScreen()
    rayed, ray_folder = run("ray", engine="ray", workers=2, screen=screen)
    assert screen.lines[0] == "2 workers of 1 CPUs each on a local Ray cluster"
    assert [row["status"] for row in rayed] == ["done"] * 4 + ["failed"] == [row["status"] for row in local]
    same = ("id", "status", "checkpoint", "key")
    assert [[row[key] for key in same] for row in rayed] == [[row[key] for key in same] for row in local]
    for name in ("r1", "r2", "r3", "r4"):
        assert bits(ray_folder / "runs" / name) == bits(loop_folder / "runs" / name)
    sets = {path.relative_to(ray_folder) for path in (ray_folder / "priors").rglob("*.safetensors")}
    assert sets == {path.relative_to(loop_folder) for path in (loop_folder / "priors").rglob("*.safetensors")}
    drawn = [(ray_folder / "priors").rglob(f"{k:05d}.png") for k in range(3)]
    assert [len(list(files)) for files in drawn] == [2, 2, 2]  # a set for each seed, not for each row
    import ray

    assert not ray.is_initialized()
    together, folder = run("together", engine="ray", workers=2, together=2)
    assert [row["status"] for row in together] == ["done"] * 4 + ["failed"]


@pytest.mark.ray
def test_the_row_of_a_killed_worker_goes_on_in_another_and_one_that_kills_always_is_a_failed_row(
    table, tiny_sd, tmp_path, short_place, monkeypatch
):
    manifest = table({"id": "mortal"}, {"id": "doomed"}, {"id": "third"})
    settings, folders = [f"base={tiny_sd}", *SHORT, "prior.count=0"], {"priors": tmp_path / "priors"}
    alone = personalize.many(manifest, settings=settings, runs=tmp_path / "loop", **folders).rows
    monkeypatch.setattr(command, "Personalizer", Mortal)
    rows = personalize.many(manifest, settings=settings, runs=tmp_path / "ray", engine="ray", workers=2, **folders).rows
    assert [row["status"] for row in rows] == ["done", "failed", "done"] and [row["status"] for row in alone] == ["done"] * 3
    assert "its worker died in it 3 times" in rows[1]["error"] and rows[1]["seconds"] is None
    assert (tmp_path / "ray" / "died").exists()
    assert bits(tmp_path / "ray" / "mortal") == bits(tmp_path / "loop" / "mortal")
    assert [row["step"] for row in read_jsonl(tmp_path / "ray" / "mortal" / "log.jsonl")] == [1, 2]  # it resumed


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_job_ends_its_workers_and_goes_on(table, tiny_sd, tmp_path, short_place, number):
    manifest = table(*[{"seed": k} for k in range(3)])
    long = [f"base={tiny_sd}", *SHORT, "prior.count=0", "train.steps=100000"]
    words = [word for text in long for word in ("--set", text)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-m", "personalize", "many", manifest, "--engine", "ray", "--workers", "2", "--json", *words],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    logs = [tmp_path / "runs" / name / "log.jsonl" for name in ("r1", "r2")]
    deadline = time.monotonic() + 200
    while not all(log.exists() for log in logs):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.2)
    pids = [json.loads((tmp_path / "runs" / name / "lock").read_text())["pid"] for name in ("r1", "r2")]
    if number == signal.SIGINT:
        os.killpg(job.pid, number)  # as a terminal does
    else:
        job.send_signal(number)
    out, err = job.communicate(timeout=60)
    if number == signal.SIGKILL:
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    else:
        error = json.loads(out)["error"]
        assert job.returncode == 130 and error["kind"] == "interrupted"
        assert error["message"].startswith("row 'r1', 'r2': stopped; the workers have ended. 0 of 3 rows done, 0 failed"), err
        assert [row["status"] for row in read_jsonl(tmp_path / "runs" / "results.jsonl")] == ["interrupted"] * 2
    assert not any(map(is_alive, pids))
    # Rows of other settings are other runs, so that this job is short.
    short = [f"base={tiny_sd}", *SHORT, "prior.count=0"]
    folders = {"runs": tmp_path / "runs", "priors": tmp_path / "priors"}
    result = personalize.many(manifest, settings=short, **folders, engine="ray", workers=2)
    assert result.failed == 0 and len(result.rows) == 3


@pytest.mark.ray
def test_what_is_wrong_with_the_base_is_refused_before_anything_runs(table, tmp_path, short_place):
    with pytest.raises(UserError, match="nowhere"):
        personalize.many(table({}), settings=["base=nowhere/at/all", *SHORT], runs=tmp_path / "runs", engine="ray")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match=r"2 workers of 0.5 GPUs each need 1, and 0 are here. Give fewer, or --gpus 0.5"):
        personalize.many(table({}), settings=SHORT, runs=tmp_path / "runs", engine="ray", workers=2, gpus=0.5)


def test_without_ray_the_error_says_what_to_install(table, monkeypatch):
    monkeypatch.setattr(many_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'personalize\[ray\]'"):
        personalize.many(table({}), settings=SHORT, engine="ray")
    with pytest.raises(UserError, match="--workers, --cpus and --gpus are of --engine ray"):
        personalize.many(table({}), settings=SHORT, workers=2)
    with pytest.raises(UserError, match="did you mean 'ray'"):
        personalize.many(table({}), settings=SHORT, engine="rai")
