"""From the events of runs to a table: how long each phase took, medians over rounds, and ratios with their range."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.jobs import FinishedRun

SKIP = 5  # steps at the start that say nothing of the later ones; our fourth records a CUDA graph
PHASES = {  # name: unit
    "start and load": "s",
    "prior": "s",
    "second load, cache": "s",
    "capture, compile": "s",
    "step, median": "ms",
    "step, p95": "ms",
    "step, mean": "ms",
    "save": "s",
    "peak memory": "GB",
    "cold job": "s",
}


def phases(run: FinishedRun) -> dict[str, float | None]:
    """What one run spent, in the units of PHASES; None for what it did not do. ValueError where it took too few steps.

    start and load     process start to the first class picture, or to the first step
    prior              first class picture to the last
    second load, cache from there to the first step
    capture, compile   what the first steps took over a usual one
    save               end of the last step to the end of the process
    """
    draws, begins, ends = run.events["draw"], run.events["begin"], run.events["step"]
    if not begins or len(ends) <= SKIP + 1:
        raise ValueError(f"{len(ends)} steps were seen, more than {SKIP + 1} are needed")
    durations = [end - before for before, end in zip([begins[0], *ends], ends)]
    steady = durations[SKIP:]
    usual = statistics.median(steady)
    return {
        "start and load": (draws[0][0] if draws else begins[0]) - run.start,
        "prior": draws[-1][1] - draws[0][0] if draws else None,
        "second load, cache": begins[0] - draws[-1][1] if draws else None,
        "capture, compile": sum(max(0.0, d - usual) for d in durations[:SKIP]),
        "step, median": 1e3 * usual,
        "step, p95": 1e3 * statistics.quantiles(steady, n=20, method="inclusive")[-1],
        "step, mean": 1e3 * statistics.fmean(steady),
        "save": run.end - ends[-1],
        "peak memory": run.events["peak"] / 1e9,
        "cold job": run.end - run.start,
    }


@dataclass(frozen=True)
class Ratio:
    """Theirs over ours: of the medians over rounds, and the least and the most of the rounds' own."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× ({self.low:.2f}–{self.high:.2f})"


def median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def ratio(theirs: Sequence[float | None], ours: Sequence[float | None]) -> Ratio | None:
    """A measure of each round on both sides -> how many times ours is less. None where one side has not the phase."""
    pairs = [(t, o) for t, o in zip(theirs, ours, strict=True) if t is not None and o]
    if not pairs:
        return None
    round_ratios = [t / o for t, o in pairs]
    return Ratio(
        statistics.median(t for t, _ in pairs) / statistics.median(o for _, o in pairs), min(round_ratios), max(round_ratios)
    )


def table(sides: Mapping[str, Sequence[dict]]) -> list[str]:
    """{column: a dict of `phases` each round}, theirs first -> Markdown: medians, and the ratio of the first to each other."""
    first, *others = sides
    lines = ["| | " + " | ".join([*sides, *(f"{first} / {other}" for other in others)]) + " |"]
    lines.append("|---" * (2 * len(sides)) + "|")
    for name, unit in PHASES.items():
        measured = {side: [phases_of_round[name] for phases_of_round in rounds] for side, rounds in sides.items()}
        cells = [number(median(values), unit) for values in measured.values()]
        cells += [str(ratio(measured[first], measured[other]) or "") for other in others]
        lines.append(f"| {name}, {unit} | " + " | ".join(cells) + " |")
    return lines


def number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f}" if unit in ("GB", "s") else f"{value:.1f}"
