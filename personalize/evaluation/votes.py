"""Blind votes between two runs or checkpoints: the win rate with its interval, and whether the metrics say the same.

A side is named "RUN · STATE", where the state is "result" or a checkpoint's step.
"""

from collections.abc import Sequence
from pathlib import Path

from personalize.common.files import read_jsonl
from personalize.common.run_list import evaluation, list_runs
from personalize.common.untrusted import Number, Table, Text
from personalize.evaluation.bootstrap import bootstrap_interval

VALUES = {"a": 1.0, "b": 0.0, "neither": 0.5}
VOTE = Table(
    {"a": Text(), "b": Text(), "prompt": Text(), "index": Number(0, 10_000), "vote": Text(tuple(VALUES))},
    ("a", "b", "prompt", "index", "vote"),
)


def standing(file: Path, runs: Path) -> list[dict]:
    """For each two that were compared: votes, the first one's win rate with its interval, and what the metrics say."""
    groups: dict[tuple, list[dict]] = {}
    for row in read_jsonl(file, VOTE):
        turned = row["a"] > row["b"]  # the same two, whichever was named first
        key = tuple(sorted((row["a"], row["b"])))
        value = VALUES[row["vote"]]
        groups.setdefault(key, []).append({"value": 1 - value if turned else value, "prompt": row["prompt"]})
    rows = []
    for (a, b), votes in groups.items():
        values = [vote["value"] for vote in votes]
        interval = bootstrap_interval(values, [(vote["prompt"],) for vote in votes])
        rows.append({"a": a, "b": b, "votes": len(votes), "neither": values.count(0.5), "rate": interval,
                     "metrics": agreement(runs, a, b, values)})  # fmt: skip
    return rows


def agreement(runs: Path, a: str, b: str, values: Sequence[float]) -> list[dict]:
    """For each score that both runs' results have: which it prefers, and in how many of the decided votes you did too."""
    scores = []
    for side in (a, b):
        name, _, at = side.partition(" · ")
        run = next((run for run in list_runs(runs) if run.name == name), None)
        scores.append((evaluation(run) or {}).get("scores", {}) if run and at == "result" else {})
    decided, rows = [value for value in values if value != 0.5], []
    for key in [key for key in scores[0] if key in scores[1]]:
        means = [score[key].get("score") for score in scores]
        if None in means or means[0] == means[1] or not decided:
            continue
        prefers = float(means[0] > means[1])
        title = scores[0][key].get("title", key)
        rows.append({"title": title, "prefers": a if prefers else b, "agrees": decided.count(prefers), "of": len(decided)})
    return rows
