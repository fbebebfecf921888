"""`personalize evaluate --image-prompt`: a base that is told photos, by the protocol of runs."""

import csv

import pytest
from adapters import images, write_adapter

import personalize
from personalize import models
from personalize.common.errors import UserError
from personalize.models.image_adapter import ENCODER

PROTOCOL = [
    "evaluate.count=1",
    "evaluate.class_count=2",
    "evaluate.prompts=a {token} {class} in the snow,a {class} with {token}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_sd):
    place = tmp_path_factory.mktemp("told")
    write_adapter(place, models.load_model(str(tiny_sd), device="cpu", say=lambda line: None), "plain")
    (place / "photos").mkdir()
    for k, image in enumerate(images(3)):
        image.resize((32, 32)).save(place / "photos" / f"{k}.png")
    return place


@pytest.fixture
def told(folder, tiny_sd, eyes, tmp_path):
    def evaluate(**options):
        settings = ["device=cpu", "dtype=float32", "photos.min_size=16", "draw.steps=2", "draw.batch=2", *PROTOCOL]
        settings += [f"evaluate.dino={eyes}/encoders/identity", f"evaluate.clip={eyes}/encoders/clip"]
        given = {"image_prompt": folder / "photos", "class_word": "dog", "adapter": folder / "ip-adapter.safetensors"}
        options = given | {"base": str(tiny_sd), "runs": tmp_path / "runs"} | options
        return personalize.evaluate(settings=[*settings, *options.pop("settings", ())], **options)

    return evaluate


def rows_of(result):
    with open(result.report.parent / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def values(rows, kind):
    return [(row["prompt"], row["dino"]) for row in rows if row["kind"] == kind]


def test_photos_are_judged_as_a_run_is_and_at_scale_0_are_the_base(told):
    result, off = told(image_scale=1.0), told(image_scale=0.0)
    rows = rows_of(result)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in ("subject", "base", "class", "base class")}
    assert counts == {"subject": 2, "base": 2, "class": 2, "base class": 2}
    assert values(rows, "subject") != values(rows, "base"), "the photos changed no image"
    assert [row["prompt"] for row in rows if row["kind"] == "subject"] == ["a dog in the snow", "a dog with"]
    assert result.metrics["class"]["share"] == 0, "nothing was trained"
    assert result.metrics["run"]["checkpoint"] == "photos at scale 1" and result.metrics["run"]["methods"] == ["image-prompt"]
    assert "image-prompt" in result.report.read_text()
    assert values(rows_of(off), "subject") == values(rows_of(off), "base") and off.report != result.report


def test_a_run_is_told_photos_beside_its_subjects_prompts_alone(told, folder, tiny_sd, tmp_path):
    steps = [
        "train.steps=1",
        "train.checkpoint_every=0",
        "choose.every=0",
        "prior.count=0",
        "draw.steps=2",
        "photos.min_size=16",
    ]
    settings = [f"base={tiny_sd}", "device=cpu", "dtype=float32", *steps]
    run = personalize.train(folder / "photos", class_word="dog", settings=settings, runs=tmp_path / "runs").folder
    given = {"run": run, "class_word": ""}
    plain = told(**given, image_prompt="", adapter=None)
    on = told(**given, image_scale=1.0)
    assert on.report != plain.report
    for kind, same in (("subject", False), ("class", True), ("base", True)):
        assert (values(rows_of(on), kind) == values(rows_of(plain), kind)) == same
    assert on.metrics["run"]["checkpoint"] == "the last step, photos at scale 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_word": " "}, "what is on the photos"),
        ({"checkpoint": "2"}, "without a run is told to the bare base. Leave out --checkpoint"),
        ({"image_prompt": ""}, "--class is of photos that the bare base is told"),
        ({"image_prompt": "nowhere"}, "nowhere does not exist"),
        ({"settings": ["draw.like=2"]}, "--like is trained on the photos of a run"),
        ({"adapter": None}, "has no adapter for image prompts of its own"),
    ],
)
def test_what_cannot_be_judged_is_named(told, options, message):
    with pytest.raises(UserError, match=message):
        told(**options)


def test_a_folder_without_a_photo_is_named(told, folder):
    with pytest.raises(UserError, match=ENCODER):
        told(image_prompt=folder / ENCODER)
