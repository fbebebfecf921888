"""`generate`: what lies on disk, what the files say, that a seed is an image, and LoRA and embedding files on a base."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import personalize
from personalize import models
from personalize.commands import generate, image_source
from personalize.common.errors import UserError
from personalize.common.files import sha256
from personalize.common.recipe import load_recipe
from personalize.common.recipe_sections import SAMPLERS
from personalize.common.terminal import SILENT, Terminal
from personalize.formats import embedding, lora, safetensors_io
from personalize.generation.image_files import A1111_SAMPLERS

FAST = ["draw.steps=2", "device=cpu", "draw.count=2"]
PROMPT = "a photo of a dog"


pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture
def draw(tiny_sd, tmp_path):
    def call(prompts=(PROMPT,), *settings, out="out", **options):
        return personalize.generate(
            list(prompts), base=str(tiny_sd), settings=[*FAST, *settings], out=tmp_path / out, **options
        )

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


def test_it_writes_the_images_the_grid_and_a_row_each_and_nothing_else(draw, tmp_path):
    result = draw([PROMPT, "a red hat"])
    assert len(result.files) == 4 and result.grid == tmp_path / "out" / "grid.png"
    names = {path.name for path in result.files}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"grid.png", "images.jsonl"}
    assert [row["file"] for row in rows(tmp_path / "out")] == [path.name for path in result.files]
    assert {Image.open(path).size for path in result.files} == {(32, 32)}


def test_a_row_says_all_that_decides_the_image(draw, tmp_path, tiny_sd, model):
    draw([PROMPT], "seed=3", "draw.negative=a red hat", "draw.guidance=4")
    row = rows(tmp_path / "out")[1]
    assert row | {"file": ""} == {
        "run": "", "checkpoint": "", "file": "", "prompt": PROMPT, "negative": "a red hat", "sampler": "dpm++2m", "steps": 2,
        "guidance": 4.0, "rescale": 0.0, "interval": [], "seed": 3, "index": 1, "width": 32, "height": 32,
        "base": str(tiny_sd), "fingerprint": model.fingerprint,
    }  # fmt: skip


def test_an_image_carries_its_parameters_as_automatic1111_writes_them(draw, tiny_sd):
    file = draw([PROMPT], "seed=3", "draw.negative=a red hat", "draw.guidance=4.5").files[1]
    lines = Image.open(file).text["parameters"].split("\n")
    assert lines[:2] == [PROMPT, "Negative prompt: a red hat"]
    fields = dict(part.split(": ", 1) for part in lines[2].split(", "))
    assert fields == {
        "Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": "4.5", "Seed": "3", "Size": "32x32", "Model": tiny_sd.name,
        "Run": "none", "Image": "1",
    }  # fmt: skip


def test_without_a_negative_prompt_there_is_no_such_line(draw):
    assert "Negative" not in Image.open(draw().files[0]).text["parameters"]


def test_the_same_seed_gives_the_same_bytes_and_no_second_row(draw, tmp_path):
    first = {path.name: path.read_bytes() for path in draw().files}
    again = {path.name: path.read_bytes() for path in draw().files}
    assert first == again and len(rows(tmp_path / "out")) == 2


def test_the_images_of_a_seed_differ_and_another_seed_gives_others(draw):
    seen = [pixels(path) for seed in (0, 1) for path in draw([PROMPT], f"seed={seed}").files]
    assert len(set(seen)) == 4


def test_asking_for_more_images_keeps_the_first_ones(draw):
    one, three = draw([PROMPT], "draw.count=1", out="one").files, draw([PROMPT], "draw.count=3", out="three").files
    assert pixels(one[0]) == pixels(three[0])
    assert one[0].name == three[0].name, "the name does not depend on how many were asked for"


@pytest.mark.parametrize("setting", ["draw.negative=a red hat", "draw.guidance=1", "draw.sampler=ddim", "draw.steps=3"])
def test_a_setting_that_changes_the_image_changes_its_name_too(draw, setting):
    plain, changed = draw().files[0], draw([PROMPT], setting).files[0]
    assert pixels(plain) != pixels(changed) and plain.name != changed.name


def test_a_size_is_drawn_as_asked(draw):
    assert Image.open(draw([PROMPT], "draw.size=48").files[0]).size == (48, 48)


def test_an_image_of_any_shape_says_its_width_and_height_and_a_square_is_the_square_of_before(draw, tmp_path):
    file = draw([PROMPT], "draw.size=32x48").files[0]
    assert Image.open(file).size == (32, 48) and "Size: 32x48" in Image.open(file).text["parameters"]
    assert [(row["width"], row["height"]) for row in rows(tmp_path / "out")] == [(32, 48)] * 2
    other = draw([PROMPT], "draw.size=48x32").files[0]
    assert Image.open(other).size == (48, 32) and other.name != file.name
    square, text = draw([PROMPT], "draw.size=48", out="a").files[0], draw([PROMPT], "draw.size=48x48", out="b").files[0]
    assert square.name == text.name and square.read_bytes() == text.read_bytes()


def test_a_photo_is_drawn_anew_where_it_is_white_in_any_shape(draw, tmp_path, tiny_sd):
    Image.linear_gradient("L").convert("RGB").resize((100, 60)).save(tmp_path / "photo.png")
    mask = Image.new("L", (100, 60))
    mask.paste(255, (40, 10, 70, 50))
    mask.save(tmp_path / "mask.png")
    heard, options = Heard(), {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png"}
    file = draw([PROMPT], "draw.size=48x32", **options, screen=heard).files[0]
    assert any("its middle part in the shape of 48×32 is drawn" in line for line in heard.lines)
    kept = Image.open(tmp_path / "photo.png").resize((48, 32), Image.Resampling.LANCZOS, (5, 0, 95, 60)).crop((0, 0, 14, 32))
    assert Image.open(file).convert("RGB").crop((0, 0, 14, 32)).tobytes() == kept.tobytes()
    result = draw([PROMPT], "draw.size=48x32", maps=True, out="maps")
    assert Image.open(result.maps[0]).height == 4 * 32 + 4 * 48 // 9 + 4
    settings = [*FAST, "draw.size=48x32", "draw.count=1"]
    options = {"out": tmp_path / "edit", "local_blend": True, "image": tmp_path / "photo.png"}
    edited = personalize.edit(PROMPT, "a red hat", base=str(tiny_sd), settings=settings, **options)
    assert {Image.open(path).size for path in edited.files} == {(48, 32)}


def test_a_size_the_base_cannot_draw_is_the_users_error(draw, tmp_path):
    with pytest.raises(UserError, match="size 40 px is not a multiple of 16.* The nearest: 32 or 48"):
        draw([PROMPT], "draw.size=40")
    with pytest.raises(UserError, match="size 33×64 px is not a multiple of 16.* The nearest: 32x64 or 48x64"):
        draw([PROMPT], "draw.size=33x64")
    for wrong in ("0x64", "64x", "64x64x64", "9000", "-16", "wide", "1.5", "[32, 64]", "true"):
        with pytest.raises(UserError, match="draw.size = .* is not allowed; expected (an edge|edges of 1 to 8192)"):
            draw([PROMPT], f"draw.size={wrong}")
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_file_where_the_folder_should_be_is_the_users_error(draw, tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match="--out .*mine.png is a file, and images go into a folder"):
        draw(out="mine.png")


def test_an_unknown_sampler_suggests_the_one_that_was_meant(draw):
    with pytest.raises(UserError, match="draw.sampler = 'eular' .*one of dpm.*did you mean 'euler'"):
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
        personalize.generate([PROMPT], runs=tmp_path)


def test_images_of_a_run_and_of_its_checkpoints_do_not_take_each_others_place(model, tmp_path):
    recipe, files = load_recipe(None, FAST), []
    for name, at in (("runs/a", "model"), ("runs/a", "step-000200"), ("runs/b", "model")):
        origin = {"run": name, "checkpoint": at}
        files += generate._write_images(model, recipe, [PROMPT], out=tmp_path, origin=origin, screen=SILENT).files
    assert len(set(files)) == 6 and len(rows(tmp_path)) == 6


def test_two_prompts_that_make_the_same_name_make_two_files(draw):
    files = draw(["a dog!", "a dog?"]).files
    assert len(set(files)) == 4 and all(path.exists() for path in files)


def test_an_interrupted_write_leaves_no_half_image(draw, tmp_path, monkeypatch):
    def broken(self, *args, **options):
        raise OSError("no more")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(UserError, match="cannot write .*png: no more"):
        draw()
    assert not list((tmp_path / "out").iterdir())


LAYERS = {  # of the tiny base: (inputs, outputs)
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 16),
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (32, 16),
}  # fmt: skip
RANK, ALPHA = 2, 5.0


def adapter(seed=0):
    """A LoRA of some layers of the U-Net that changes the image."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for layer, (inputs, outputs) in LAYERS.items():
        made[f"unet.{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=g)
        made[f"unet.{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=g)
    names = [f"unet.{layer}" for layer in LAYERS]
    return lora.Adapter(made, dict.fromkeys(names, RANK), dict.fromkeys(names, ALPHA))


@pytest.fixture
def files(tmp_path, model, monkeypatch):
    """The same LoRA as diffusers, kohya and PEFT write it; another one; a word of two vectors."""
    from peft import LoraConfig

    # They are put into the model, so each command has a copy of its own.
    monkeypatch.setattr(models, "load_model", lambda base, **options: copy.deepcopy(model, {id(model.family): model.family}))
    lora.write_diffusers(tmp_path / "diffusers.safetensors", adapter())
    lora.write_kohya(tmp_path / "kohya.safetensors", adapter(), family="sd")
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS)).save_pretrained(tmp_path / "peft")
    bare = {key.replace("unet.", "base_model.model."): value for key, value in adapter().tensors.items()}
    safetensors_io.save_tensors(tmp_path / "peft" / "adapter_model.safetensors", bare)
    lora.write_kohya(tmp_path / "other.safetensors", adapter(1), family="sd")
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    embedding.write_diffusers(tmp_path / "learned.safetensors", "<rex>", {"text_encoder": rows})
    embedding.write_a1111(tmp_path / "rex-dog.safetensors", {"text_encoder": rows})
    return tmp_path


def apart(a, b):
    """The mean difference of two image files, of 255."""
    first, second = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (a, b))
    return np.abs(first - second).mean()


def test_a_lora_of_any_program_draws_the_same_and_not_the_bases_image(draw, files):
    base = draw(out="base").files[0]
    names = ("diffusers.safetensors", "kohya.safetensors", "peft")
    drawn = [draw(loras=[str(files / name)], out=f"by {name}").files[0] for name in names]
    assert [apart(drawn[0], other) for other in drawn[1:]] == [0, 0]
    assert apart(drawn[0], base) > 2


def test_a_weight_scales_a_lora_and_several_add_up(draw, files):
    first, other = str(files / "kohya.safetensors"), str(files / "other.safetensors")
    base, whole = draw(out="base").files[0], draw(loras=[first], out="whole").files[0]
    assert apart(draw(loras=[f"{first}:0"], out="none").files[0], base) == 0
    assert apart(draw(loras=[f"{first}:0.5", f"{first}:.5"], out="halves").files[0], whole) < 0.01
    assert apart(draw(loras=[f"{first}:2", f"{first}:-2.0"], out="undone").files[0], base) < 0.01
    both = draw(loras=[first, f"{other}:0.5"], out="both").files[0]
    assert apart(both, draw(loras=[f"{other}:0.5", first], out="turned").files[0]) < 0.01
    assert min(apart(both, whole), apart(both, base)) > 1


def test_an_embedding_is_the_word_it_names_or_the_files_name_or_the_one_given(draw, files):
    learned, plain = str(files / "learned.safetensors"), str(files / "rex-dog.safetensors")
    base = draw([PROMPT]).files[0]
    drawn = [
        draw([f"a photo of a {word} dog"], embeddings=[path], out=word).files[0]
        for word, path in (("<rex>", learned), ("rex-dog", plain), ("<bello>", f"{plain}:<bello>"))
    ]
    assert apart(drawn[0], base) > 1
    assert [apart(drawn[0], other) for other in drawn[1:]] == [0, 0]


def test_an_embedding_whose_word_nobody_says_is_told(draw, files):
    screen = Heard()
    draw(
        ["a <REX> dog", PROMPT],
        embeddings=[str(files / "learned.safetensors"), str(files / "rex-dog.safetensors")],
        screen=screen,
    )
    assert screen.lines == ["no prompt says 'rex-dog', the word of rex-dog.safetensors, which does nothing then."]


def test_embeddings_in_a_lora_file_are_loaded_under_their_words(draw, files):
    lora_file, word = files / "kohya.safetensors", files / "learned.safetensors"
    tensors, rows_of_word = safetensors_io.load_tensors(lora_file), safetensors_io.load_tensors(word)["<rex>"]
    more = {"string_to_param.*": ("<rex>", rows_of_word), "clip_l": ("dog", rows_of_word), "t5_out": ("qmj", rows_of_word)}
    bundled = {f"bundle_emb.{name}.{end}": rows for end, (name, rows) in more.items()}
    safetensors_io.save_tensors(files / "bundle.safetensors", tensors | bundled)
    screen = Heard()
    image = draw(["a <rex> dog"], loras=[f"{files / 'bundle.safetensors'}:0.5"], out="bundle", screen=screen).files[0]
    apart_files = draw(["a <rex> dog"], loras=[f"{lora_file}:0.5"], embeddings=[str(word)], out="apart").files[0]
    assert apart(image, apart_files) == 0
    assert apart(image, draw(["a <rex> dog"], loras=[f"{lora_file}:0.5"], out="unloaded").files[0]) > 0
    assert screen.lines == [
        "bundle.safetensors holds an embedding too: a prompt that says '<rex>' uses it",
        "bundle.safetensors holds an embedding 'dog', a word that has a meaning already: it is left out",
        "bundle.safetensors holds an embedding 'qmj' of a kind that is not read: it is left out",
    ]
    assert [entry["token"] for entry in rows(image.parent)[0]["embeddings"]] == ["<rex>"]


def test_a_row_and_an_image_name_the_files_with_hash_and_weight(draw, files, tmp_path):
    path, word = files / "kohya.safetensors", files / "learned.safetensors"
    image = draw(["a <rex> dog"], loras=[f"{path}:0.75"], embeddings=[str(word)]).files[0]
    row = rows(tmp_path / "out")[0]
    assert row["loras"] == [{"file": "kohya.safetensors", "sha256": sha256(path), "weight": 0.75}]
    assert row["embeddings"] == [{"file": "learned.safetensors", "sha256": sha256(word), "token": "<rex>"}]
    last = Image.open(image).text["parameters"].split("\n")[-1]
    assert f'Lora hashes: "kohya: {sha256(path)[:12]}", Lora weights: "kohya: 0.75"' in last
    assert last.endswith(f'TI hashes: "<rex>: {sha256(word)[:12]}"')
    again = draw(["a <rex> dog"], loras=[f"{path}:0.5"], embeddings=[str(word)]).files[0]
    assert again.name != image.name and "loras" not in rows(draw(out="bare").grid.parent)[0]


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1),
        ("C:\\loras\\a.safetensors:.5", "C:\\loras\\a.safetensors", 0.5),
        ("runs/12:30/model", "runs/12:30/model", 1),
        ("a.safetensors:x", "a.safetensors:x", 1),
        ("a.safetensors:", "a.safetensors:", 1),
        ("a.safetensors:nan", "a.safetensors:nan", 1),
    ],
)
def test_a_weight_is_a_number_after_the_last_colon(text, path, weight):
    assert image_source._lora_argument(text) == (Path(path), weight)


def test_a_file_whose_name_ends_like_a_weight_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30").write_bytes(b"")
    lora, embedding, file = image_source._lora_argument, image_source._embedding_argument, Path("12:30")
    assert lora("12:30") == (file, 1) and lora("12:30:0.5") == (file, 0.5)
    assert embedding("12:30") == (file, "") and embedding("12:30:<x>") == (file, "<x>")


def test_a_file_that_cannot_be_used_is_the_users_error_and_nothing_is_drawn(draw, files, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x02")
    strange = {
        "unet.down_blocks.7.attn.to_q.lora_A.weight": torch.zeros(2, 8),
        "unet.down_blocks.7.attn.to_q.lora_B.weight": torch.zeros(8, 2),
    }
    safetensors_io.save_tensors(tmp_path / "strange.safetensors", strange)
    wide = {key: torch.cat([value, value], 1 if "lora_A" in key else 0) for key, value in adapter().tensors.items()}
    safetensors_io.save_tensors(tmp_path / "wide.safetensors", wide)
    embedding.write_a1111(tmp_path / "wide-word.safetensors", {"text_encoder": torch.zeros(1, 768)})
    embedding.write_a1111(tmp_path / "dog.safetensors", {"text_encoder": torch.zeros(1, 32)})
    for options, said in [
        ({"loras": ["no.safetensors:0.5"]}, "there is no adapter 'no.safetensors'"),
        ({"loras": [str(tmp_path / "x.pt")]}, "x.pt is a pickle.* not read as an adapter"),
        ({"loras": [str(tmp_path / "strange.safetensors")]}, "made for another base than .*belong to no layer"),
        ({"loras": [str(tmp_path / "wide.safetensors")]}, "wide.safetensors was made for another base .*expected is"),
        ({"loras": [str(tmp_path / "learned.safetensors")]}, "is not a LoRA"),
        ({"embeddings": ["no.safetensors"]}, "there is no embedding 'no.safetensors'"),
        ({"embeddings": [str(tmp_path / "x.pt")]}, "x.pt is a pickle.* not read as a textual-inversion embedding"),
        ({"embeddings": [str(tmp_path / "wide-word.safetensors")]}, "another base .*768.*expected are .*32"),
        ({"embeddings": [str(tmp_path / "kohya.safetensors")]}, "is not a textual-inversion embedding"),
        ({"embeddings": [str(tmp_path / "dog.safetensors")]}, "'dog' has a meaning in base"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            draw(**options)
    assert not (tmp_path / "out").exists()


def test_every_sampler_has_a_name_of_automatic1111s():
    assert A1111_SAMPLERS.keys() == set(SAMPLERS)


@pytest.mark.parametrize(
    "prompt, said",
    [("a dog <lora:x:0.8>", "<lora:x:0.8>"), ("a (red:1.2) dog", "(red:1.2)"), ("a dog BREAK snow", "BREAK"), ("a dog", None)],
)
def test_marks_of_other_programs_are_said_to_be_letters_once(draw, prompt, said):
    screen = Heard()
    draw([prompt, prompt + " again"], screen=screen)
    lines = [line for line in screen.lines if "is read as letters" in line]
    assert [f"'{said}'" in line for line in lines] == ([True] if said else [])


def test_what_is_cut_from_a_negative_prompt_is_said(draw):
    screen = Heard()
    draw(["a dog"], "draw.negative=" + "snow " * 100, screen=screen)
    assert any("the negative prompt" in line and "does not see" in line for line in screen.lines)


def test_images_that_are_no_numbers_are_not_saved(draw, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "decode_latents", lambda z0: torch.full((len(z0), 3, 32, 32), torch.nan))
    with pytest.raises(UserError, match="draws images that are not numbers in float32. Draw with fewer LoRAs"):
        draw()
    assert not list((tmp_path / "out").glob("*.png"))
