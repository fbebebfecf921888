"""The stand-in neighbour is there when it should be, and the table says whether the demands are kept."""

import pytest

from benchmarks import neighbour


def test_it_alternates_alone_and_beside_processes_that_end(monkeypatch):
    began, seen = [], []
    popen = neighbour.subprocess.Popen
    monkeypatch.setattr(neighbour.subprocess, "Popen", lambda *a, **k: began.append(popen(*a, **k)) or began[-1])

    def run(job, environment):
        seen.append((environment.get("GOMP_SPINCOUNT"), sum(process.poll() is None for process in began)))
        return 1.0

    seconds = neighbour.measure(["draw"], rounds=2, count=2, run=run)
    assert seen == [(None, 0), ("300000", 0), (None, 2), ("300000", 2)] * 2
    assert len(began) == 4 and all(process.poll() is not None for process in began)
    assert {len(values) for values in seconds.values()} == {2} and len(seconds) == 4


@pytest.mark.parametrize("alone, beside, kept", [(10.2, 20.0, True), (10.4, 20.0, False), (10.0, 20.1, False)])
def test_the_demands(alone, beside, kept):
    times = {("draw", "ours", False): [alone], ("draw", "ours", True): [beside]}
    times |= {("draw", "GNU's", False): [10.0], ("draw", "GNU's", True): [60.0]}
    lines, found = neighbour.table(times)
    assert found is kept and lines[2].startswith(f"| draw | {alone:.1f} | 10.0 |")
