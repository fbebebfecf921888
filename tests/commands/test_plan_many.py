"""`personalize plan --many`: hours, disk and memory of a job before it starts."""

import json

import pytest
from screens import RecordingScreen

import personalize
from personalize.commands import plan_many
from personalize.common.errors import UserError

SHORT = ["device=cpu", "train.methods=lora", "prior.count=3", "prior.steps=2", "choose.every=0"]


@pytest.fixture
def planned(tiny_sd, photos, tmp_path):
    """Plans rows with these changes."""

    def run(*changes, **options):
        rows = [{"id": f"r{k}", "photos": str(photos), "class": "dog", **change} for k, change in enumerate(changes)]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return personalize.plan_many(tmp_path / "m.jsonl", settings=[f"base={tiny_sd}", *SHORT], **options)

    return run


@pytest.fixture
def rehearsed(monkeypatch):
    """Kinds of known cost in place of rehearsals -> the rows of each kind."""
    kinds = []

    def known(members, screen):
        kinds.append([row["id"] for row, _ in members])
        return plan_many._Kind(peak=1000, disk=10_000, step=2.0, drawn=0.5, pixels=1024, has_world=False)

    monkeypatch.setattr(plan_many, "_rehearsed", known)
    return kinds


def test_a_job_takes_its_steps_and_each_set_of_class_images_once(planned, rehearsed):
    """100 steps of 2 s a row; a set is 3 images of 2 sampling steps of 0.5 s, and 3 × 1024 px × 1.75 bytes."""
    rows = [{"train.steps": 100}, {"train.steps": 100, "train.lr": 1e-3}, {"train.steps": 50, "class": "cat"}]
    screen = RecordingScreen()
    result = planned(*rows, workers=5, screen=screen)
    assert rehearsed == [["r0", "r1", "r2"]]
    assert result.seconds == 250 * 2.0 + 2 * 3 * 2 * 0.5 and result.disk == 3 * 10_000 + 2 * 5376
    assert (result.rows, result.workers, result.peak, result.fits) == (3, 5, 1000, True)
    assert screen.lines[-1].startswith("3 rows: about 8 min on one worker like this one, 101 s on 5, right to a factor of two")


def test_another_method_is_another_kind_and_checkpoints_that_are_scored_take_their_images(planned, rehearsed):
    choose = {
        "choose.every": 50,
        "choose.count": 1,
        "choose.class_count": 2,
        "choose.prompts": ["a {token}", "a red {token}", "{token}"],
        "choose.steps": 10,
    }
    rows = [{"train.steps": 100, "prior.count": 0}, {"train.steps": 100, "prior.count": 0, "train.methods": "full", **choose}]
    images = 3 + 2
    assert planned(*rows).seconds == 2 * 100 * 2.0 + 2 * images * 10 * 0.5
    assert rehearsed == [["r0"], ["r1"]]


@pytest.mark.slow
def test_a_rehearsal_gives_a_row_its_time_memory_and_disk(planned):
    few, many = (
        planned({"train.steps": 1000, "photos": "nowhere"}, {"train.steps": 1000}),
        planned(*[{"train.steps": 1000}] * 4),
    )
    assert few.peak == many.peak > 1e6 and few.fits and many.disk > 1.5 * few.disk


def test_rows_without_any_photos_are_refused(planned):
    with pytest.raises(UserError, match="no row of this kind has photos"):
        planned({"photos": "nowhere"})
