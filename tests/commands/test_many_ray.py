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
    """A worker that dies after the first step of a row called mortal, once, and each time that it begins one called doomed."""

    def train(self, row):
        if row["id"] == "doomed":
            os.kill(os.getpid(), signal.SIGKILL)
        save, died = loop.save, self.runs / "died"

        def die(run, step, screen):
            save(run, step, screen)
            if run.folder.name == "mortal" and not died.exists():
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
        known = [str(Path(__file__).parents[1]), str(Path(__file__).parent), str(ROOT)]  # where workers find `Mortal`
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(known))
        yield Path(place)


@pytest.mark.ray
def test_two_workers_have_the_bits_of_the_loop_whatever_dies_meanwhile(table, tiny_sd, tmp_path, short_place, monkeypatch):
    manifest = table(
        {}, {"id": "mortal", "train.steps": 3}, {"id": "doomed", "seed": 1}, {"seed": 1}, {"photos": "none"}, {"train.steps": 4}
    )
    settings = [f"base={tiny_sd}", *SHORT]

    def run(name, **options):
        folders = {"runs": tmp_path / name / "runs", "priors": tmp_path / name / "priors"}
        return personalize.many(manifest, settings=settings, **folders, **options).rows, tmp_path / name

    local, loop_folder = run("loop")
    screen = RecordingScreen()
    monkeypatch.setattr(command, "Personalizer", Mortal)
    rayed, ray_folder = run("ray", engine="ray", workers=2, screen=screen)
    assert screen.lines[0] == "2 workers of 1 CPUs each on a local Ray cluster"
    assert "4 of 6 rows done, 2 failed" in screen.lines[-1]
    assert [row["status"] for row in rayed] == ["done", "done", "failed", "done", "failed", "done"]
    assert "its worker died in it 3 times" in rayed[2]["error"] and rayed[2]["seconds"] is None
    same = ("id", "status", "checkpoint", "key", "identity")
    for k in (0, 1, 3, 4, 5):
        assert [rayed[k][key] for key in same] == [local[k][key] for key in same]
    for name in ("r1", "mortal", "r4", "r6"):
        assert bits(ray_folder / "runs" / name) == bits(loop_folder / "runs" / name)
    assert (ray_folder / "runs" / "died").exists()
    assert [row["step"] for row in read_jsonl(ray_folder / "runs" / "mortal" / "log.jsonl")] == [1, 2, 3]  # it resumed
    images = sorted(str(path.relative_to(ray_folder)) for path in (ray_folder / "priors").rglob("*.png"))
    assert len(images) == 2 * 3  # a set for each seed, not for each row
    assert images == sorted(str(path.relative_to(loop_folder)) for path in (loop_folder / "priors").rglob("*.png"))
    import ray

    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_killed_job_ends_its_workers_and_goes_on_and_so_does_one_that_ctrl_c_stops(table, tiny_sd, tmp_path, short_place):
    manifest = table(*[{"seed": k} for k in range(3)])
    settings = [f"base={tiny_sd}", *SHORT, "prior.count=0", "train.steps=100000", "train.keep=1"]
    words = [word for text in settings for word in ("--set", text)]
    words = [sys.executable, "-m", "personalize", "many", manifest, "--engine", "ray", "--workers", "2", "--json", *words]
    runs, names, deadline = tmp_path / "runs", ("r1", "r2"), time.monotonic() + 1000

    def step(name):
        logged = read_jsonl(runs / name / "log.jsonl")
        return logged[-1]["step"] if logged else 0

    def stopped_after(number, *steps):
        """Starts the job, and when its rows have passed these steps ends it -> status, output, the workers' processes."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        job = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while any(step(name) <= before for name, before in zip(names, steps)):
            assert job.poll() is None and time.monotonic() < deadline, job.communicate()
            time.sleep(0.2)
        pids = [json.loads((runs / name / "lock").read_text())["pid"] for name in names]
        (os.kill if number == signal.SIGKILL else os.killpg)(job.pid, number)  # Ctrl-C is for the whole group
        return job.wait(timeout=100), job.stdout.read(), pids

    status, _, pids = stopped_after(signal.SIGKILL, 1, 1)
    assert status == -signal.SIGKILL
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the workers outlive their job"
        time.sleep(0.1)
    steps = [step(name) for name in names]
    status, out, pids = stopped_after(signal.SIGINT, *steps)
    error = json.loads(out)["error"]
    assert status == 130 and error["kind"] == "interrupted"
    assert error["message"].startswith("row 'r1', 'r2': stopped; the workers have ended. 0 of 3 rows done, 0 failed")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [row["status"] for row in read_jsonl(runs / "results.jsonl")] == ["interrupted"] * 2
    for name in names:
        assert [row["step"] for row in read_jsonl(runs / name / "log.jsonl")][0:2] == [1, 2]
        assert len({row["step"] for row in read_jsonl(runs / name / "log.jsonl")}) == len(read_jsonl(runs / name / "log.jsonl"))


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
