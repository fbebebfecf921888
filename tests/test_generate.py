"""`generate` on a bare base: what lies on disk, what the files say, and that a seed is a picture."""

import json

import pytest
from PIL import Image

from personalize import api, config, models
from personalize.commands import generate
from personalize.errors import UserError
from personalize.terminal import Terminal

FAST = ["draw.steps=2", "device=cpu", "draw.count=2"]
PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(autouse=True)
def read_once(model, monkeypatch):
    monkeypatch.setattr(models, "load", lambda base, **options: model)


@pytest.fixture
def draw(tiny_sd, tmp_path):
    def call(prompts=(PROMPT,), *settings, out="out", **options):
        return api.generate(list(prompts), base=str(tiny_sd), settings=[*FAST, *settings], out=tmp_path / out, **options)

    return call


class Heard(Terminal):
    """A terminal that keeps its lines."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def rows(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_it_writes_the_pictures_the_grid_and_a_row_each_and_nothing_else(draw, tmp_path):
    result = draw([PROMPT, "a red hat"])
    assert len(result.files) == 4 and result.grid == tmp_path / "out" / "grid.png"
    names = {path.name for path in result.files}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"grid.png", "images.jsonl"}
    assert [row["file"] for row in rows(tmp_path / "out")] == [path.name for path in result.files]
    assert {Image.open(path).size for path in result.files} == {(32, 32)}


def test_a_row_says_all_that_decides_the_picture(draw, tmp_path, tiny_sd, model):
    draw([PROMPT], "seed=3", "draw.negative=a red hat", "draw.guidance=4")
    row = rows(tmp_path / "out")[1]
    assert row | {"file": ""} == {
        "run": "", "checkpoint": "", "file": "", "prompt": PROMPT, "negative": "a red hat", "sampler": "dpm++2m", "steps": 2,
        "guidance": 4.0, "rescale": 0.0, "interval": [], "seed": 3, "index": 1, "width": 32, "height": 32,
        "base": str(tiny_sd), "fingerprint": model.fingerprint,
    }  # fmt: skip


def test_a_picture_carries_its_parameters_as_automatic1111_writes_them(draw, tiny_sd):
    file = draw([PROMPT], "seed=3", "draw.negative=a red hat", "draw.guidance=4.5").files[1]
    lines = Image.open(file).text["parameters"].split("\n")
    assert lines[:2] == [PROMPT, "Negative prompt: a red hat"]
    fields = dict(part.split(": ", 1) for part in lines[2].split(", "))
    assert fields == {
        "Steps": "2", "Sampler": "dpm++2m", "CFG scale": "4.5", "Seed": "3", "Size": "32x32", "Model": str(tiny_sd),
        "Run": "none", "Image": "1",
    }  # fmt: skip


def test_without_a_negative_prompt_there_is_no_such_line(draw):
    assert "Negative" not in Image.open(draw().files[0]).text["parameters"]


def test_the_same_seed_gives_the_same_bytes_and_no_second_row(draw, tmp_path):
    first = {path.name: path.read_bytes() for path in draw().files}
    again = {path.name: path.read_bytes() for path in draw().files}
    assert first == again and len(rows(tmp_path / "out")) == 2


def test_the_pictures_of_a_seed_differ_and_another_seed_gives_others(draw):
    seen = [pixels(path) for seed in (0, 1) for path in draw([PROMPT], f"seed={seed}").files]
    assert len(set(seen)) == 4


def test_asking_for_more_pictures_keeps_the_first_ones(draw):
    one, three = draw([PROMPT], "draw.count=1", out="one").files, draw([PROMPT], "draw.count=3", out="three").files
    assert pixels(one[0]) == pixels(three[0])
    assert one[0].name == three[0].name, "the name does not depend on how many were asked for"


@pytest.mark.parametrize("setting", ["draw.negative=a red hat", "draw.guidance=1", "draw.sampler=ddim", "draw.steps=3"])
def test_a_setting_that_changes_the_picture_changes_its_name_too(draw, setting):
    plain, changed = draw().files[0], draw([PROMPT], setting).files[0]
    assert pixels(plain) != pixels(changed) and plain.name != changed.name


def test_a_size_is_drawn_as_asked(draw):
    assert Image.open(draw([PROMPT], "draw.size=48").files[0]).size == (48, 48)


def test_a_size_the_base_cannot_draw_is_the_users_error(draw, tmp_path):
    with pytest.raises(UserError, match="size 40 px is not a multiple of 16"):
        draw([PROMPT], "draw.size=40")
    assert not list((tmp_path / "out").glob("*.png"))


def test_an_unknown_sampler_suggests_the_one_that_was_meant(draw):
    with pytest.raises(UserError, match="unknown sampler 'eular'; did you mean 'euler'.*Known: ddim"):
        draw([PROMPT], "draw.sampler=eular")


def test_a_placeholder_without_a_run_is_the_users_error(draw):
    with pytest.raises(UserError, match=r"\{token\} and \{class\} stand for a run's"):
        draw(["a {token} {class}"])


def test_the_words_that_do_not_fit_are_told(draw):
    screen = Heard()
    draw(["dog " * 30 + "red hat"], screen=screen)
    assert len(screen.lines) == 1 and "does not see: 'red hat" in screen.lines[0]


def test_without_a_run_it_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no finished run in .*personalize train PHOTOS --class WORD"):
        api.generate([PROMPT], runs=tmp_path)


def test_pictures_of_a_run_and_of_its_checkpoints_do_not_take_each_others_place(model, tmp_path):
    how, files = config.load(None, FAST).draw, []
    for name, at in (("runs/a", "model"), ("runs/a", "step-000200"), ("runs/b", "model")):
        origin = {"run": name, "checkpoint": at}
        files += generate.run(model, [PROMPT], how, seed=0, out=tmp_path, origin=origin).files
    assert len(set(files)) == 6 and len(rows(tmp_path)) == 6


def test_two_prompts_that_make_the_same_name_make_two_files(draw):
    files = draw(["a dog!", "a dog?"]).files
    assert len(set(files)) == 4 and all(path.exists() for path in files)


def test_an_interrupted_write_leaves_no_half_picture(draw, tmp_path, monkeypatch):
    def broken(self, *args, **options):
        raise OSError("no more")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="no more"):
        draw()
    assert not list((tmp_path / "out").iterdir())
