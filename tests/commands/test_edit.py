"""`edit`, and words that count more or less in `generate`: files, names, what they say, and bad input."""

import json

import pytest
from PIL import Image

import personalize
from personalize.common.errors import UserError

FAST = ["draw.steps=2", "device=cpu", "draw.count=2"]
SOURCE, TARGET = "a photo of a dog", "a photo of a red hat"


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture
def edit(tiny_sd, tmp_path):
    def call(source=SOURCE, target=TARGET, *settings, out="out", **options):
        return personalize.edit(source, target, base=str(tiny_sd), settings=[*FAST, *settings], out=tmp_path / out, **options)

    return call


def rows(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_it_writes_three_images_an_edit_a_row_each_and_one_sheet(edit, tmp_path):
    result, folder = edit(), tmp_path / "out"
    assert len(result.files) == 6 and result.sheet == folder / "sheet.png"
    assert {path.name for path in folder.iterdir()} == {path.name for path in result.files} | {"sheet.png", "images.jsonl"}
    assert [row["file"] for row in rows(folder)] == [path.name for path in result.files]
    assert [(row["edit"]["part"], row["index"], row["prompt"]) for row in rows(folder)] == [
        (part, i, SOURCE if part == "source" else TARGET) for i in (0, 1) for part in ("source", "plain", "edited")
    ]
    assert Image.open(result.sheet).size == (3 * 32 + 2 * 4, 2 * 32 + 4)
    assert edit().files == result.files and len(rows(folder)) == 6, "the same edit once more is no other"


def test_the_source_is_the_image_that_generate_draws(edit, tiny_sd, tmp_path):
    image = personalize.generate([SOURCE], base=str(tiny_sd), settings=FAST, out=tmp_path / "plain").files[1]
    pairs = zip(Image.open(image).tobytes(), Image.open(edit().files[3]).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
    assert "edit" not in rows(tmp_path / "plain")[0] and "weights" not in rows(tmp_path / "plain")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5},
        {"keep_layout": 0.1},
        {"local_blend": True},
        {"weights": ["hat=2"]},
        {"ignore": ["red"]},
        {"target": "a photo of a hat"},
    ],
)
def test_every_option_is_part_of_the_name_and_said_in_the_image(edit, options):
    plain, other = edit().files, edit(**options).files
    assert not set(plain[1::3]) & set(other[1::3]) and not set(plain[2::3]) & set(other[2::3])
    text = Image.open(other[2]).text["parameters"]
    assert '"part": "edited"' in text and f'"source": "{SOURCE}"' in text
    assert ("Word weights: " in text) == ("weights" in options) and ("Ignored words: " in text) == ("ignore" in options)


def test_a_photo_is_edited_and_named_by_its_hash(edit, tmp_path, photos):
    (first, second, *_), folder = sorted(photos.glob("*.png")) or sorted(photos.glob("*.jpg")), tmp_path / "out"
    files = edit(image=first, strength=0.5).files
    row = rows(folder)[0]
    assert row["image"]["file"] == first.name and len(row["image"]["sha256"]) == 64
    assert (row["sampler"], row["strength"], row["edit"]["part"]) == ("ddpm", 0.5, "source")
    others = [*edit(image=second, strength=0.5).files, *edit(image=first, strength=1).files]
    assert len({*files, *others}) == 18


def test_words_of_a_generated_image_count_as_asked(tiny_sd, tmp_path):
    def draw(**options):
        return personalize.generate([TARGET], base=str(tiny_sd), settings=FAST, out=tmp_path / "out", **options).files[0]

    plain, heavy, less = draw(), draw(weights=["hat=3"]), draw(ignore=["red"])
    assert len({plain, heavy, less}) == 3 and len({Image.open(path).tobytes() for path in (plain, heavy, less)}) == 3
    assert (
        rows(tmp_path / "out")[2]["weights"] == [["hat", 3.0]]
        and 'Word weights: "hat: 3"' in Image.open(heavy).text["parameters"]
    )
    assert Image.open(draw(weights=["hat=1"])).tobytes() == Image.open(plain).tobytes()
    with pytest.raises(UserError, match="no prompt says 'hut'.*did you mean 'hat'"):
        draw(weights=["hut=2"])


def test_bad_input_is_said_before_anything_is_drawn(edit, tmp_path, photos):
    (tmp_path / "x.png").write_text("no image")
    for options, said in [
        ({"target": ""}, "what is to change. Give a second prompt"),
        ({"strength": 0, "image": "x.png"}, "--strength 0 is not a share"),
        ({"strength": 0.5}, "--strength is about a photo. Give it, as in: --image FILE"),
        ({"keep": 2}, "--keep 2 is not a share"),
        ({"ignore": ["wearing a blue hat"]}, "no prompt says 'wearing a blue hat'"),
        ({"weights": ["hat"]}, "weight 'hat' is not WORD=NUMBER"),
        ({"image": tmp_path / "none.png"}, "none.png"),
        ({"image": tmp_path / "x.png"}, "x.png"),
        ({"source": "a {token}"}, "stand for a run's"),
    ]:
        with pytest.raises(UserError, match=said):
            edit(**options)
    assert not (tmp_path / "out").exists()


def test_the_terminal_takes_it_all(terminal, tiny_sd):
    status, out, _ = terminal(
        "edit", TARGET, "--ignore", "red", "--weight", "hat=1.5", "--keep", "0.5", "--base", tiny_sd, "--steps", "2",
        "--count", "1", "--maps", "--local-blend", "--json",
    )  # fmt: skip
    assert status == 0 and json.loads(out)["sheet"] == "edits/sheet.png" and len(json.loads(out)["maps"]) == 1
    status, _, err = terminal("edit", SOURCE, TARGET, "--ignore", "blue", "--base", tiny_sd)
    assert status == 2 and "no prompt says 'blue'" in err
