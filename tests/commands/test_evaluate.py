"""The whole of evaluate and of choosing on a tiny base: what is drawn, kept, counted, refused."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from screens import RecordingScreen

import personalize
from personalize.cli import app
from personalize.common import prompts, run_folder
from personalize.common.errors import UserError
from personalize.common.files import read_json, read_jsonl
from personalize.common.recipe_sections import Evaluate
from personalize.evaluation import bleed, checkpoint_selection, image_cache, protocols, requirements
from personalize.training import load_run, noisy_classifier, steering

TINY = ["train.steps=6", "train.lr=1e-3", "prior.count=0", "photos.min_size=16", "draw.steps=2", "train.keep=9", "token=zqv"]
PROTOCOL = [
    "evaluate.count=2",
    "evaluate.class_count=3",
    "evaluate.prompts=a {token} {class} in the snow,a {class} with {token}",
]
CHOOSE = [
    "choose.every=2",
    "choose.prompts=a {token} {class} in the snow,a {class} with {token},a {token} {class}",
    "choose.count=1",
    "choose.class_count=2",
    "choose.drift=9",
    "choose.obedience=9",
    "choose.copying=9",
]


@pytest.fixture(scope="module")
def settings(tiny_sd, eyes):
    ours = [f"evaluate.dino={eyes}/encoders/identity", f"evaluate.clip={eyes}/encoders/clip"]
    return [f"base={tiny_sd}", "device=cpu", "dtype=float32", *TINY, *PROTOCOL, *ours]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos, the first of which has a mask."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((Path(__file__).parents[2] / "data_examples" / "dog").glob("*.png")):
        shutil.copy(path, folder)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(folder / "00.mask.png")
    return folder


@pytest.fixture(scope="module")
def runs(photos, settings, tmp_path_factory):
    """Two runs in a folder, one that chooses among its checkpoints and one at twice the learning rate."""
    root = tmp_path_factory.mktemp("runs")
    personalize.train(photos, class_word="dog", settings=[*settings, *CHOOSE, "train.held_out_every=1"], runs=root)
    personalize.train(photos, class_word="dog", settings=[*settings, "train.lr=2e-3"], runs=root)
    return root


@pytest.fixture(scope="module")
def result(runs):
    return personalize.evaluate(runs / "zqv-dog")


@pytest.fixture
def own_runs(runs, result, tmp_path):
    """A copy of the two runs, the first evaluated, for a test that changes what lies there."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def table(result):
    with open(result.report.parent / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- protocols ---


def test_no_dev_prompt_is_in_any_protocol():
    """Final numbers come from prompts that no checkpoint was chosen by."""
    reported = {*prompts.TOYLAND, *prompts.LIVE, *prompts.OBJECT}
    for dev in (protocols.DEV, protocols.TOYLAND_DEV):
        assert len(set(dev)) == 8 and not set(dev) & reported


@pytest.mark.parametrize(
    ("ask", "base", "word", "shape"),
    [
        ({}, "toyland", "dog", ("toyland", 8, 4, 16)),
        ({}, "sd", "dog", ("standard", 25, 4, 16)),
        ({"protocol": "quick"}, "sd", "backpack", ("quick", 8, 2, 8)),
        ({"protocol": "quick"}, "toyland", "dog", ("quick", 8, 2, 8)),
        ({"protocol": "standard", "count": 1, "class_count": 0}, "toyland", "dog", ("standard", 25, 1, 0)),
        ({"prompts": ("a {class}",)}, "sd", "dog", ("own prompts", 1, 4, 16)),
    ],
)
def test_protocols_are_these_prompts_and_counts(ask, base, word, shape):
    found = protocols.protocol(Evaluate(**ask), base == "toyland", word)
    assert (found.name, len(found.templates), found.count, found.class_count) == shape
    assert len(set(found.templates)) == len(found.templates)


def test_live_subjects_have_the_live_list():
    assert protocols.protocol(Evaluate(), False, "cat").templates == prompts.LIVE
    assert protocols.protocol(Evaluate(), False, "teapot").templates == prompts.OBJECT


# --- evaluate ---


def test_an_evaluation_is_these_files(result, runs):
    out = result.report.parent
    assert {p.name for p in out.iterdir()} == {"metrics.json", "per_image.csv", "report.md", "report.html", "pictures"}
    assert result.metrics == read_json(out / "metrics.json")
    (place,) = (out / "pictures").iterdir()
    assert len(list(place.glob("*.png"))) == 2 * 2 + 3 and len(list(place.glob("maps/*.png"))) == 2
    assert place.name.startswith("step-00000"), "pictures are kept by checkpoint"


def test_the_report_shows_the_losses_on_fixed_noise_that_the_run_logged(result, runs):
    rows = read_jsonl(runs / "zqv-dog" / "log.jsonl")
    kinds = ("step", "fixed_subject", "held_out")
    assert [[row[k] for k in kinds] for row in result.metrics["fixed_loss"]] == [[row[k] for k in kinds] for row in rows]
    assert len(rows) > 1 and "Loss on fixed noise" in result.report.read_text()


def test_the_report_shows_where_the_subjects_words_look(result):
    page = result.report.read_text()
    for prompt in ("a zqv dog in the snow", "a dog with zqv"):
        assert [page.count(f'alt="where “{prompt}” attends to {word}"') for word in ("zqv", "dog")] == [1, 1]


def test_every_image_is_a_row_by_the_run_and_by_the_base(result):
    rows = table(result)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in ("subject", "base", "class", "base class")}
    assert counts == {"subject": 4, "base": 4, "class": 3, "base class": 3}
    assert {row["prompt"] for row in rows if row["kind"] == "base"} == {"a dog in the snow", "a dog with"}
    for row in rows:
        assert all(row[name] for name in ("dino", "clip_i", "clip_t", "held_out", "dino_fg", "nearest", "diversity"))
        assert bool(row["clip_bg"]) == ("in the snow" in row["prompt"]), "where the prompt says a place"


def test_scores_are_the_means_of_their_rows_beside_floor_and_ceiling(result):
    rows, scores = table(result), result.metrics["scores"]
    for name in ("dino", "clip_t", "held_out", "dino_fg"):
        for kind, key in (("subject", "score"), ("base", "floor")):
            mean = np.mean([float(row[name]) for row in rows if row["kind"] == kind])
            assert scores[name][key] == pytest.approx(mean, abs=1e-6)
        assert scores[name]["low"] <= scores[name]["score"] <= scores[name]["high"]
    assert scores["dino"]["ceiling"] and scores["held_out"]["ceiling"] and scores["clip_t"]["ceiling"] is None
    pres = [np.mean([float(row["dino"]) for row in rows if row["kind"] == kind]) for kind in ("class", "base class")]
    assert result.metrics["class"]["excess"] == pytest.approx(pres[0] - pres[1], abs=1e-6)


def test_whether_the_subject_is_first_is_told_against_the_bases_class_images(result):
    told = {(row["kind"], row["first"]) for row in table(result)}
    assert {value for kind, value in told if kind == "base class"} == {""}, "these are the look-alikes"
    assert {value for kind, value in told if kind != "base class"} <= {"0.0", "1.0"}
    score = result.metrics["scores"]["first"]
    assert 0 <= score["floor"] <= 1 and 0 <= score["score"] <= 1 and 0 <= score["ceiling"] <= 1


def test_a_photo_is_held_out_of_five_and_none_of_four(result, photos, runs, settings, tmp_path):
    told = [(row["file"], row["trained"]) for row in result.metrics["photos"]]
    assert told == [("00.png", True), ("01.png", True), ("02.png", True), ("03.png", True), ("04.png", False)]
    (tmp_path / "four").mkdir()
    for name in ("00.png", "01.png", "02.png", "03.png"):
        shutil.copy(photos / name, tmp_path / "four")
    folder = personalize.train(tmp_path / "four", class_word="dog", settings=settings, runs=tmp_path / "runs").folder
    assert not any(row["held_out"] for row in run_folder.read_manifest(folder)["subjects"][0]["photos"])


def test_a_second_evaluation_draws_only_what_is_missing(result, own_runs, monkeypatch):
    drawn, draw = [], image_cache.generate_missing

    def count(model, sat, **options):
        drawn.extend(image_cache.missing_images(sat.place, sat.jobs))
        draw(model, sat, **options)

    monkeypatch.setattr(image_cache, "generate_missing", count)
    again = personalize.evaluate(own_runs / "zqv-dog")
    assert not drawn and again.metrics["scores"] == result.metrics["scores"]
    assert again.report.read_text().count(" attends to ") == result.report.read_text().count(" attends to ") > 0
    (place,) = (again.report.parent / "pictures").iterdir()
    shutil.rmtree(place / "maps")  # as in a run that was evaluated before there were maps
    more = personalize.evaluate(own_runs / "zqv-dog", settings=["evaluate.count=3"])
    assert " attends to " not in more.report.read_text()
    assert len(drawn) == 2 * 2 and {number for _, number in drawn} == {2}


def test_another_checkpoint_is_scored_by_its_own_images(result, own_runs):
    other = "2" if run_folder.read_manifest(own_runs / "zqv-dog")["chosen"] != 2 else "4"
    first = personalize.evaluate(own_runs / "zqv-dog", checkpoint=other).metrics
    assert first["scores"]["dino"]["floor"] == result.metrics["scores"]["dino"]["floor"]
    assert first["run"]["checkpoint"] == f"checkpoint {other}"
    assert first["scores"]["dino"]["score"] != result.metrics["scores"]["dino"]["score"]


def test_a_deleted_or_changed_photo_is_named(own_runs, photos, tmp_path):
    moved, manifest = shutil.copytree(photos, tmp_path / "photos"), own_runs / "zqv-dog" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(photos), str(moved)))
    gone = moved / "02.png"
    gone.unlink()
    with pytest.raises(UserError, match="02.png of this run is no longer there"):
        personalize.evaluate(own_runs / "zqv-dog")
    Image.new("RGB", (64, 64)).save(gone)
    with pytest.raises(UserError, match="02.png is not the one"):
        personalize.evaluate(own_runs / "zqv-dog")


def test_a_run_without_a_result_says_so_before_anything_is_drawn(runs, tmp_path, monkeypatch):
    folder = tmp_path / "unfinished"
    shutil.copytree(runs / "zqv-dog", folder)
    run_folder.write_manifest(folder, run_folder.read_manifest(folder) | {"status": "interrupted"})
    monkeypatch.setattr(image_cache, "generate_missing", lambda *args, **options: pytest.fail("drawn"))
    with pytest.raises(UserError, match="interrupted, not finished"):
        personalize.evaluate(folder)
    with pytest.raises(UserError, match="no checkpoint '77'"):
        personalize.evaluate(runs / "zqv-dog", checkpoint="77")


def test_an_unknown_placeholder_is_named_before_anything_is_drawn(runs, monkeypatch):
    monkeypatch.setattr(image_cache, "generate_missing", lambda *args, **options: pytest.fail("drawn"))
    with pytest.raises(UserError, match="unknown placeholder {colour}"):
        personalize.evaluate(runs / "zqv-dog", settings=['evaluate.prompts="a {colour} {class}"'])


def test_an_encoder_that_is_not_there_is_named_before_anything_is_drawn(runs, monkeypatch):
    monkeypatch.setattr(image_cache, "generate_missing", lambda *args, **options: pytest.fail("drawn"))
    with pytest.raises(UserError, match="evaluate.dino=FOLDER"):
        personalize.evaluate(runs / "zqv-dog", settings=["evaluate.dino=/no/such/folder"])


def test_unusable_images_are_counted_shown_and_scored(own_runs, result):
    (place,) = (own_runs / "zqv-dog" / "evaluation" / "pictures").iterdir()
    victim = sorted(place.iterdir())[0]
    victim.unlink()
    import torch

    image_cache._write(victim, torch.full((3, 32, 32), torch.nan))
    found = personalize.evaluate(own_runs / "zqv-dog", checkpoint=str(int(place.name[5:11]))).metrics
    assert [row["why"] for row in found["unusable"]] == ["not a number"]
    assert any("1 image is unusable" in line for line in found["verdict"])
    assert len(table_of(own_runs / "zqv-dog")) == len(table(result))


def table_of(run):
    with open(run / "evaluation" / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- what is required ---


def test_every_number_of_an_evaluation_has_a_name_that_can_be_required(result):
    written = dict(requirements.values(result.metrics))
    assert {*written} <= {*requirements.NAMES} and set(requirements.ALIASES.values()) <= {*requirements.NAMES}
    assert written["class.share"] == result.metrics["class"]["share"]
    dino = result.metrics["scores"]["dino"]
    assert written["dino.score"] == dino["score"] and written["dino.relative"] == dino["relative"]
    low, high = (written.get(f"dino.relative.{end}") for end in ("low", "high"))
    assert low is dino["relative"] is None or low <= dino["relative"] <= high


def test_a_requirement_is_met_or_says_which_value_missed_which_bound():
    score = {"score": 0.5, "low": 0.4, "high": 0.6, "floor": 0.2, "ceiling": 1.0, "relative": 0.375}
    towards = {"score": 0.9, "relative": None, "optimised": True}
    metrics = {"scores": {"dino": score, "clip_t": towards}, "class": {"share": 0.25, "share_low": None}, "truth": None}
    metrics["truth"] = {"identity error": {"score": 0.5}}

    def failed(*texts):
        return requirements.failures(requirements.read_requirements(texts), metrics)

    met = (
        "dino.relative.low>=0.25",
        " scores.dino.score < 0.51",
        "drift<=0.25",
        "truth.identity error.score<=0.5",
        "dino.high>-1e9",
    )
    assert failed(*met) == []
    assert failed("dino.relative<0.3", "drift<=0.2") == [
        "required dino.relative < 0.3: it is 0.375",
        "required drift <= 0.2: it is 0.25",
    ]
    assert failed("drift.low<9", "held_out.score>0") == [
        "required drift.low < 9.0: it was not measured",
        "required held_out.score > 0.0: it was not measured",
    ]
    assert failed("clip_t.score>0") == ["required clip_t.score > 0.0: the images were drawn towards it, so it is no score"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dino.relativ>=0.5", "no evaluation measures 'dino.relativ'; did you mean 'dino.relative'?"),
        ("dino>=0.5", "no evaluation measures 'dino'. It has score, low, .*; write dino.score"),
        ("drift=0.2", "'drift=0.2' is not a value, one of >= <= > <, and a bound, as in 'drift<=0.2'"),
        ("drift<=nan", "the bound 'nan' is not a number"),
        ("drift<=20%", "the bound '20%' is not a number"),
    ],
)
def test_a_requirement_that_cannot_be_read_is_refused_before_the_run_is_opened(text, said):
    with pytest.raises(UserError, match=said):
        personalize.evaluate("no such run", require=["drift<=0.2", text])


def test_a_missed_requirement_ends_the_command_with_3(runs, result, monkeypatch, capsys):
    share = result.metrics["class"]["share"]
    required = ["--require", f"drift<={share - 0.1}", "--require", f"drift<={share + 0.1}"]
    monkeypatch.setattr(sys, "argv", ["personalize", "evaluate", str(runs / "zqv-dog"), "--no-photos", "--quiet", *required])
    with pytest.raises(SystemExit) as end:
        app.main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 3 and lines[-1].endswith("report.html")
    assert [line for line in lines if "required" in line] == [f"required drift <= {share - 0.1}: it is {share:.6g}"]
    assert app._evaluated(result)[-1] == 0


def test_requirements_are_of_one_run(runs):
    with pytest.raises(UserError, match="--require is about one run"):
        personalize.compare([runs / "zqv-dog", runs / "zqv-dog-2"], require=["drift<=0.2"])


# --- comparing ---


def test_runs_are_compared_image_by_image(runs):
    found = personalize.compare([runs / "zqv-dog", runs / "zqv-dog-2"])
    (row,) = found.rows
    one, two = (read_json(runs / name / "evaluation" / "metrics.json") for name in ("zqv-dog", "zqv-dog-2"))
    want = two["scores"]["dino"]["score"] - one["scores"]["dino"]["score"]
    assert row["changes"]["dino"]["mean"] == pytest.approx(want) and 0 <= row["changes"]["dino"]["above"] <= 1
    assert (
        "PRES" in found.text
        and found.file.read_text() == found.text
        and json.loads(found.file.with_suffix(".json").read_text())
    )


def test_one_run_cannot_be_compared(runs):
    with pytest.raises(UserError, match="two or more"):
        personalize.compare([runs / "zqv-dog"])


def test_dreambench_is_every_subject_of_a_folder(photos, settings, tmp_path):
    source = tmp_path / "subjects"
    for name, word in (("rex", "dog"), ("tom", "cat")):
        shutil.copytree(photos, source / name)
        (source / name / "subject.toml").write_text(f'class = "{word}"\n')
    short = [*settings, "train.steps=1", "evaluate.count=1", "evaluate.class_count=1"]
    found = personalize.dreambench(str(source), settings=short, runs=tmp_path / "runs", priors=tmp_path / "priors")
    assert [row["subject"] for row in found.rows] == ["rex", "tom"] and "**mean**" in found.text
    with pytest.raises(UserError, match="subject.toml"):
        personalize.dreambench(str(tmp_path / "empty"), settings=short)
    page = read_json(tmp_path / "runs" / "rex" / "evaluation" / "metrics.json")
    assert page["photos_included"]
    with pytest.raises(UserError, match="hf:google/dreambooth"):
        personalize.dreambench("hf:someone/else", settings=short)


# --- choosing while training ---


def test_a_run_keeps_the_checkpoint_that_its_scores_choose(runs, settings):
    folder = runs / "zqv-dog"
    manifest = run_folder.read_manifest(folder)
    scored = checkpoint_selection.read_scored(folder / checkpoint_selection.FILE)
    assert [s.step for s in scored] == [2, 4, 6]
    limits = personalize.resolve(None, [*settings, *CHOOSE]).choose
    assert (
        manifest["chosen"] == checkpoint_selection.choose_checkpoint(scored, limits).step
        and f"step {manifest['chosen']}" in manifest["why"]
    )


def test_the_result_is_the_chosen_checkpoint_bit_for_bit(runs, settings):
    """What `generate` uses, unless told otherwise."""
    import torch

    from personalize import models

    folder = runs / "zqv-dog"
    manifest = load_run.require_run(folder)
    base = personalize.resolve(None, settings).base
    found = []
    for at in ("", str(manifest["chosen"]), "last"):
        model = models.load_model(base, device="cpu", dtype="float32", say=lambda line: None)
        name = load_run.load_run(model, folder, manifest, at=at)
        found.append((name, torch.cat([p.flatten() for p in model.unet.parameters()])))
    assert found[0][0] == found[1][0] == f"step-{manifest['chosen']:06d}" and found[2][0] == "step-000006"
    assert torch.equal(found[0][1], found[1][1])


def test_scoring_does_not_change_the_training(runs, photos, settings, tmp_path):
    """The last checkpoint of a run that scores on the way is that of one that does not."""
    plain = personalize.train(photos, class_word="dog", settings=settings, runs=tmp_path).folder
    last = [run_folder.checkpoints(folder)[-1] / load_run.STATE for folder in (plain, runs / "zqv-dog")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_that_was_stopped_before_scoring_chooses_as_one_that_was_not(at, runs, photos, settings, tmp_path, monkeypatch):
    from personalize.training import run as training_run

    score, steps = training_run._score_checkpoint, []

    def cut(run, step, screen):
        if step == at:
            raise RuntimeError("the power went")
        steps.append(step)
        score(run, step, screen)

    monkeypatch.setattr(training_run, "_score_checkpoint", cut)
    with pytest.raises(RuntimeError, match="power"):
        personalize.train(photos, class_word="dog", settings=[*settings, *CHOOSE], runs=tmp_path)
    assert at not in steps
    monkeypatch.setattr(training_run, "_score_checkpoint", score)
    folder = personalize.train(photos, class_word="dog", settings=[*settings, *CHOOSE], runs=tmp_path).folder
    assert run_folder.read_manifest(folder)["chosen"] == run_folder.read_manifest(runs / "zqv-dog")["chosen"]
    assert checkpoint_selection.read_scored(folder / checkpoint_selection.FILE) == checkpoint_selection.read_scored(
        runs / "zqv-dog" / checkpoint_selection.FILE
    )


def test_the_best_checkpoint_outlives_newer_ones(photos, settings, tmp_path, monkeypatch):
    real = checkpoint_selection.choose_checkpoint
    monkeypatch.setattr(checkpoint_selection, "choose_checkpoint", lambda scored, limits: real(scored[:1], limits))
    folder = personalize.train(photos, class_word="dog", settings=[*settings, *CHOOSE, "train.keep=1"], runs=tmp_path).folder
    assert [path.name for path in run_folder.checkpoints(folder)] == ["step-000002", "step-000006"]
    assert run_folder.read_manifest(folder)["chosen"] == 2


def test_a_run_ends_early_where_more_only_harms(photos, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_selection, "stalled", lambda scored, patience: len(scored) == 2)
    screen = RecordingScreen()
    found = personalize.train(photos, class_word="dog", settings=[*settings, *CHOOSE], runs=tmp_path, screen=screen)
    assert found.steps == 4 and [path.name for path in run_folder.checkpoints(found.folder)][-1] == "step-000004"
    assert any("ended after step 4 of 6" in line for line in screen.lines)
    assert run_folder.read_manifest(found.folder)["status"] == "finished"


@pytest.mark.slow
def test_several_subjects_are_chosen_for_together_and_held_against_each_other(photos, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bleed, "shares", lambda values, base, **_: {key: values[key] - base[key] for key in values})
    words, cat = ["token=zqv,zzk", *CHOOSE], str(Path(__file__).parents[2] / "data_examples" / "cat")
    found = personalize.train([photos, cat], class_word=["dog", "cat"], settings=[*settings, *words], runs=tmp_path)
    (first, *_) = checkpoint_selection.read_scored(found.folder / checkpoint_selection.FILE)
    assert {key[0] for key in first.identity} == {"zqv", "zzk"} and len(first.identity) == 6
    assert {key[:2] for key in first.bleed} == {("zqv", "zzk"), ("zzk", "zqv")} and len(first.bleed) == 6
    scores = personalize.evaluate(found.folder, token="zzk", require=["bleed<=2", "bleed<=-2"])
    assert scores.metrics["run"]["class"] == "cat" and scores.report.parent.name == "zzk"
    table = scores.metrics["bleed"]
    assert [(p["word"], p["photos"]) for p in table["pairs"]] == [(a, b) for a in ("zqv", "zzk") for b in ("zqv", "zzk")]
    assert table["pairs"][3]["score"] == pytest.approx(scores.metrics["scores"]["dino"]["score"])
    assert scores.failed == [f"required bleed <= -2.0: it is {table['share']:.6g}"]
    assert "The subjects stay apart" in " ".join(scores.metrics["verdict"])
    for text in (scores.report.read_text(), scores.report.with_suffix(".md").read_text(), app._evaluated(scores)[1]):
        assert "photos of zqv" in text and "photos of zzk" in text
    assert personalize.evaluate(found.folder).metrics["bleed"] == table, "whoever is asked for"


def test_half_precision_draws_and_the_judges_see_in_float32(photos, settings, tmp_path, monkeypatch):
    from personalize.evaluation import scoring

    seen, rows = [], scoring.score_images

    def look(*given):
        found = rows(*given)
        seen.append(max(abs(row["dino"] - round(row["dino"] * 128) / 128) for row in found))
        return found

    monkeypatch.setattr(scoring, "score_images", look)
    words = [*settings, *CHOOSE, "choose.count=2", "dtype=bfloat16", "train.steps=2"]
    personalize.train(photos, class_word="dog", settings=words, runs=tmp_path)
    assert len(seen) == 2 and min(seen) > 1e-4, "bfloat16 has 8 bits"


def test_one_photo_is_enough_to_choose_and_to_evaluate(photos, settings, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "01.png", tmp_path / "one")
    folder = personalize.train(tmp_path / "one", class_word="dog", settings=[*settings, *CHOOSE], runs=tmp_path / "runs").folder
    metrics = personalize.evaluate(folder).metrics
    assert metrics["copying"] is None and "one photo only" in metrics["verdict"][0]


def test_what_choosing_needs_is_checked_before_any_class_image_is_drawn(photos, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("personalize.data.class_images.complete_set", lambda *args, **options: pytest.fail("drawn"))
    asked = [*settings, *CHOOSE, "prior.count=3"]
    for wrong, words in (('choose.prompts="a {colour}"', "unknown placeholder"), ("evaluate.dino=/no/such", "no such folder")):
        with pytest.raises(UserError, match=words):
            personalize.train(photos, class_word="dog", settings=[*asked, wrong], runs=tmp_path)


def test_a_page_without_photos_names_neither_them_nor_where_the_base_lies(own_runs, tiny_sd, photos):
    out = personalize.evaluate(own_runs / "zqv-dog", photos=False).report.parent
    for file in ("report.html", "report.md", "metrics.json", "per_image.csv"):
        text = (out / file).read_text()
        assert "04.png" not in text and str(tiny_sd.parent) not in text and str(photos) not in text


def test_a_template_given_twice_counts_once(own_runs):
    twice = personalize.evaluate(
        own_runs / "zqv-dog", settings=['evaluate.prompts="a {token} {class},a {token} {class}"']
    ).metrics
    assert len(twice["prompts"]) == 1 and twice["protocol"]["prompts"] == 1


def test_dreambooths_own_subjects_are_thirty_of_fifteen_classes():
    from personalize.data.subjects import list_subjects

    found = list_subjects("hf:google/dreambooth")
    assert len(found) == 30 and len({word for _, word in found.values()}) == 15
    assert sum(word in prompts.LIVE_CLASSES for _, word in found.values()) == 9
    assert found["dog3"] == ("hf:google/dreambooth/dog3", "dog")


@pytest.mark.slow
def test_images_drawn_towards_a_metric_are_marked_as_no_score_of_it(own_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steering, "CLASS_IMAGES", 3)
    monkeypatch.setattr(noisy_classifier, "STEPS", 3)
    run, drawn_by_base = own_runs / "zqv-dog", sorted(own_runs.glob("*/base-*/*.png"))
    plain = personalize.evaluate(run).metrics
    compared = personalize.compare([run, own_runs / "zqv-dog-2"], settings=["draw.guide_clip=50", "draw.like=5"])
    metrics = read_json(run / "evaluation" / "metrics.json")
    assert metrics["scores"]["clip_t"]["title"] == "CLIP-T: follows the prompt (no score: drawn towards it)"
    assert [name for name, score in metrics["scores"].items() if "no score" in score["title"]] == ["clip_t", "clip_bg"]
    assert any("drawn towards CLIP-T, which is no score of them" in sentence for sentence in metrics["verdict"])
    assert metrics["steering"]["like"] == 5 and metrics["steering"]["guide_clip"] == 50
    assert "no score: drawn towards it" in (run / "evaluation" / "report.md").read_text() and "no score" in compared.text
    assert metrics["scores"]["clip_t"]["score"] != plain["scores"]["clip_t"]["score"]
    assert metrics["scores"]["clip_t"]["floor"] == plain["scores"]["clip_t"]["floor"], "the base draws as it always does"
    assert (run / steering.FILE).exists() and sorted(own_runs.glob("*/base-*/*.png")) == drawn_by_base
    again = personalize.evaluate(run).metrics
    assert again["scores"] == plain["scores"] and "steering" not in again
