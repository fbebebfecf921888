"""Votes: the win rate with its interval, whoever was named first, and how often a metric says the same."""

import json

import pytest

from personalize.common.errors import UserError
from personalize.common.files import append_jsonl
from personalize.evaluation.votes import standing


def vote(file, a, b, said, k=0):
    append_jsonl(file, {"a": a, "b": b, "prompt": f"p{k}", "index": 0, "vote": said})


def scored(runs, name, value):
    (runs / name / "evaluation").mkdir(parents=True)
    (runs / name / "manifest.json").write_text('{"status": "finished"}')
    (runs / name / "evaluation" / "metrics.json").write_text(
        json.dumps({"scores": {"dino": {"score": value, "title": "DINO"}}})
    )


def test_the_win_rate_and_what_the_metric_prefers(tmp_path):
    runs, file = tmp_path / "runs", tmp_path / "votes.jsonl"
    scored(runs, "x", 0.7), scored(runs, "y", 0.5)
    for k, said in enumerate(["a", "a", "b", "neither"]):
        vote(file, "x · result", "y · result", said, k)
    vote(file, "y · result", "x · result", "b", 4)  # for x, which stood second
    (row,) = standing(file, runs)
    assert (row["a"], row["votes"], row["neither"]) == ("x · result", 5, 1)
    assert row["rate"].mean == pytest.approx(3.5 / 5) and row["rate"].low < 0.7 < row["rate"].high
    assert row["metrics"] == [{"title": "DINO", "prefers": "x · result", "agrees": 3, "of": 4}]


def test_a_checkpoint_that_was_not_evaluated_has_no_agreement(tmp_path):
    runs, file = tmp_path / "runs", tmp_path / "votes.jsonl"
    scored(runs, "x", 0.7)
    vote(file, "x · 200", "x · result", "a")
    assert standing(file, runs)[0]["metrics"] == []


def test_a_vote_that_is_none_is_refused(tmp_path):
    vote(tmp_path / "votes.jsonl", "x", "y", "<b>")
    with pytest.raises(UserError, match="vote"):
        standing(tmp_path / "votes.jsonl", tmp_path)
