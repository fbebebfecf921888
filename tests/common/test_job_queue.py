"""Jobs run one after the other, outlive whoever started them, and end as what they were."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from personalize.common import job_queue
from personalize.common.errors import UserError
from personalize.common.job_queue import FAILED, FINISHED, QUEUED, RUNNING, STOPPED, Jobs

SLEEPS = "import time; print(end=''); time.sleep(60)"


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(job_queue, "command", lambda words: [sys.executable, "-S", "-c", words[0]])
    (tmp_path / "runs").mkdir()
    queue = made(tmp_path)
    yield queue
    for job in queue.all():
        queue.stop(job.path.stem)


def made(folder):
    return Jobs(folder / "jobs", root=folder, runs=folder / "runs")


def until(queue, job, state):
    end = time.monotonic() + 30
    while (now := queue.read(job.path)).state != state:
        assert time.monotonic() < end, now
        time.sleep(0.02)
    return now


def test_one_runs_the_next_waits_and_the_same_is_refused(jobs):
    first, second = jobs.add([SLEEPS], "one"), jobs.add([SLEEPS + "#"], "two")
    assert (first.state, second.state) == (RUNNING, QUEUED)
    for words in ([SLEEPS], [SLEEPS + "#"]):
        with pytest.raises(UserError, match="already"):
            jobs.add(words, "again")
    jobs.stop(first.path.stem)
    until(jobs, first, STOPPED)
    jobs.tick()
    assert jobs.read(second.path).state == RUNNING


def test_a_queue_of_another_process_finds_a_job_whose_starter_was_killed(tmp_path, jobs):
    script = (
        "from pathlib import Path\nimport os, signal\nfrom personalize.common import job_queue as q\n"
        f"q.command = lambda words: [{sys.executable!r}, '-S', '-c', words[0]]\nhere = Path({str(tmp_path)!r})\n"
        f"q.Jobs(here / 'jobs', root=here, runs=here / 'runs').add([{SLEEPS!r}], 'one')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (job,) = jobs.all()
    assert job.state == RUNNING
    (tmp_path / "runs/sks-dog").mkdir()
    (tmp_path / "runs/sks-dog/lock").write_text(json.dumps({"host": "here", "pid": job.pid}))
    assert jobs.read(job.path).run == "sks-dog"
    row = json.loads(job.path.read_text())
    job.path.write_text(json.dumps(row | {"pid": 0}))  # killed before it wrote the number down: still not started twice
    jobs.tick()
    assert json.loads(job.path.read_text())["pid"] == 0 and jobs.read(job.path).state == RUNNING
    job.path.write_text(json.dumps(row))


def test_what_a_job_ended_as(jobs):
    done = until(jobs, jobs.add(["print('runs/x')"], "done"), FINISHED)
    assert done.run == "x" and not done.error
    wrong = until(jobs, jobs.add(["import sys; sys.exit('error: no photos')"], "wrong"), FAILED)
    assert wrong.error == "no photos"
    killed = jobs.add([SLEEPS], "killed")
    os.kill(killed.pid, signal.SIGKILL)
    assert "resume" in until(jobs, killed, FAILED).error
    jobs.resume(killed.path.stem)
    assert jobs.read(killed.path).state == RUNNING
