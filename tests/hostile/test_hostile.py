"""A stranger's file is read, or refused with its name and a remedy. Nothing hangs, and nothing else is raised.

A reader is a row: the name of its file, a good file, and the call. A damage is a row too. Each damage of a file meets each
reader; each damage of JSON meets the readers of JSON.
"""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personalize import models
from personalize.commands.compare import read_rows
from personalize.commands.export import RECORD_ROW
from personalize.common import checkpoint, prompts
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.common.recipe import load_recipe
from personalize.data import photos as photo_files
from personalize.data.captions import read_caption
from personalize.evaluation import checkpoint_selection
from personalize.formats import clip_tokenizer, safetensors_io
from personalize.generation.image_files import IMAGE_ROW
from personalize.models import loading
from personalize.models.lazy_imports import lazy_imports
from personalize.training import load_run

with lazy_imports():
    from transformers import CLIPTextModel

REMEDY = re.compile(
    r"(Check|Restore|Delete|Give|Save|Use|Download|Set|Write|Correct|Copy|Keep|Make|Convert|Texts|Name|Put|Move|Shorten|Update)\b[^.]*\.?"
)
BASE = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
MANIFEST = {"kind": "run", "status": "finished", "schema": 2, "base": "toyland", "fingerprint": "", "methods": ["full"],
            "recipe": {}, "subjects": [{"token": "sks", "class": "dog", "prompt": "a sks dog", "photos": []}]}  # fmt: skip


@pytest.fixture(scope="module")
def good(tiny_sd, photos, tmp_path_factory):
    """One folder with a good file for every reader."""
    place = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_sd, place / "base")
    (place / "base" / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    shutil.copy(photos / "00.png", place / "a.png")
    shutil.copy(photos / "01.png", place / "b.png")
    (place / "b.txt").write_text("a sks dog")
    (place / "captions.toml").write_text('"a.png" = "a sks dog"')
    save_file({"trained/a": torch.ones(2)}, place / "state.safetensors", metadata={"step": "3"})
    (place / "recipe.toml").write_text("seed = 3\n")
    (place / "prompts.txt").write_text("a dog\n")
    (place / "images.jsonl").write_text('{"file": "a.png", "prompt": "a dog"}\n')
    (place / "exports.jsonl").write_text('{"path": "a", "sha256": "b"}\n')
    (place / "choosing.jsonl").write_text(
        '{"step": 3, "ceiling": 1.0, "copied": 0.0, "identity": [["sks", "a", 0, 0.5]], "obeys": [],'
        ' "base_obeys": [], "pres": [], "base_pres": []}\n'
    )
    (place / "manifest.json").write_text(json.dumps(MANIFEST))
    (place / "per_image.csv").write_text("kind,prompt,index,dino\nsubject,a dog,0,0.5\n")
    return place


def base(place):
    loading.read_configs(place / "base", "base")
    loading.load_schedule(place / "base")
    models.family_of(place / "base", "base")


READERS = {  # file -> the call
    "a.png": lambda p: photo_files.read_photo(p / "a.png"),
    "b.txt": lambda p: read_caption(p / "b.png"),
    "captions.toml": lambda p: read_caption(p / "c.png"),
    "state.safetensors": lambda p: checkpoint.load_state(p / "state.safetensors"),
    "recipe.toml": lambda p: load_recipe(p / "recipe.toml", []),
    "prompts.txt": lambda p: prompts.read_prompts(p / "prompts.txt"),
    "images.jsonl": lambda p: read_jsonl(p / "images.jsonl", IMAGE_ROW),
    "exports.jsonl": lambda p: read_jsonl(p / "exports.jsonl", RECORD_ROW),
    "choosing.jsonl": lambda p: checkpoint_selection.read_scored(p / "choosing.jsonl"),
    "manifest.json": load_run.require_run,
    "per_image.csv": read_rows,
    **{f"base/{name}": base for name in BASE},
    "base/text_encoder/config.json": lambda p: loading.encoder_options(p / "base" / "text_encoder", CLIPTextModel),
    "base/unet/diffusion_pytorch_model.safetensors": lambda p: safetensors_io.load_tensors(
        p / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    ),
    "base/tokenizer/vocab.json": lambda p: clip_tokenizer.read_vocabulary(p / "base" / "model.safetensors"),
}
OPTIONAL = {
    "b.txt",
    "captions.toml",
    "images.jsonl",
    "exports.jsonl",
    "choosing.jsonl",
}  # where none is there, there is nothing to read
JSON = [name for name in READERS if name.endswith(".json")]


def _socket(path):
    os.chdir(path.parent)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(path.name)


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(80_000_000_000)


FILES = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "80 GB of nothing": _sparse,
    "not Unicode": lambda path: path.write_bytes(b"\xc3\x28\xff" * 9 + b"\n"),
    "nothing": lambda path: path.unlink(missing_ok=True),
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("file", READERS)
def test_what_is_no_plain_file_is_refused_at_once(good, tmp_path, monkeypatch, file, damage):
    monkeypatch.chdir(tmp_path)
    place = shutil.copytree(good, tmp_path / "p", copy_function=os.link)
    READERS[file](place)
    (place / file).unlink()
    FILES[damage](place / file)
    if file in OPTIONAL and damage == "nothing":
        READERS[file](place)
        return
    if file.endswith(".safetensors") and damage == "80 GB of nothing":
        return  # weights may be large; what is none is refused by its header
    if file == "per_image.csv" and damage == "not Unicode":
        return
    with pytest.raises(UserError) as refusal:
        READERS[file](place)
    said = str(refusal.value)
    assert Path(file).name in said and REMEDY.search(said), said


DAMAGES = {
    "a list": b"[]", "a number": b"3", "a text": b'"x"', "null": b"null", "a torn end": b'{"a": 1', "nothing": b"",
    "deep lists": b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "deep objects": b'{"a": ' * 40 + b"1" + b"}" * 40,
    "a number of 6,000 digits": b'{"a": ' + b"1" * 6000 + b"}", "half a character": b'{"a": "\xc3"}',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", JSON)
def test_json_that_is_no_object_is_refused(good, tmp_path, file, damage):
    place = shutil.copytree(good, tmp_path / "p", copy_function=os.link)
    (place / file).unlink()
    (place / file).write_bytes(DAMAGES[damage])
    with pytest.raises(UserError) as refusal:
        READERS[file](place)
    said = str(refusal.value)
    assert Path(file).name in said and REMEDY.search(said), said


FIELDS = {
    "base/unet/config.json": {
        "sample_size": [0, -1, "64", 1.5, [], 10**9], "in_channels": [0, "4", None, 10**9], "norm_num_groups": [0, -4, "x"],
        "layers_per_block": [0, 10**7, "2", [1, "x"]], "block_out_channels": [[], [0], "x", [10**9], 3],
        "cross_attention_dim": [0, "x"], "attention_head_dim": [0, {}], "down_block_types": [[], "x", [3]],
        "act_fn": ["exec", 3], "time_cond_proj_dim": [256], "class_embed_type": ["timestep"], "encoder_hid_dim": [768],
        "attention_type": ["gated"], "addition_embed_type": ["image"], "quantization_config": [{"quant_method": "x"}],
    },
    "base/vae/config.json": {
        "scaling_factor": [0, "x", None], "latent_channels": [0, "4"], "latents_mean": [[0.0] * 4], "norm_num_groups": [0],
        "layers_per_block": [10**7], "block_out_channels": [[], "x"],
    },
    "base/text_encoder/config.json": {
        "vocab_size": [0, "x", 10**12], "hidden_size": [0, -1], "num_hidden_layers": [0, 10**6], "num_attention_heads": [0],
        "hidden_act": ["exec"], "max_position_embeddings": [0, "77"], "eos_token_id": ["x"],
    },
    "base/scheduler/scheduler_config.json": {
        "num_train_timesteps": ["1000", 0, 10**12], "beta_start": ["x", -1], "beta_end": [2, None], "trained_betas": [["x"], 3],
        "beta_schedule": ["x", 3], "prediction_type": ["x", 3], "timestep_spacing": ["x"], "steps_offset": [-1, "1"],
        "set_alpha_to_one": ["yes"],
    },
    "base/model_index.json": {"_class_name": [3, None, "Other", []]},
    "manifest.json": {
        "status": [None, 3, "done"], "kind": [None, "prior", 3], "schema": ["2", -1, 99], "recipe": [None, [], 3],
        "fingerprint": [None, 3], "methods": [[], "full", [3]], "base": [None, 3],
        "subjects": [[], {}, [{}], [{"token": 3, "class": "dog", "prompt": "", "photos": []}]], "sha256": [3],
    },
}  # fmt: skip
VALUES = [(file, name, value) for file, fields in FIELDS.items() for name, values in fields.items() for value in values]


@pytest.mark.parametrize("file, name, value", VALUES, ids=lambda v: str(v)[:40])
def test_a_field_of_another_kind_is_named_with_its_value(good, tmp_path, file, name, value):
    place = shutil.copytree(good, tmp_path / "p", copy_function=os.link)
    content = json.loads((place / file).read_text()) | {name: value}
    (place / file).unlink()
    (place / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        READERS[file](place)
    said = str(refusal.value)
    assert REMEDY.search(said) and (name in said or str(value) in said), said


@pytest.mark.parametrize("name", ["status", "recipe", "fingerprint", "methods", "base"])
def test_a_manifest_without_a_field_is_refused_by_its_name(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in MANIFEST.items() if k != name}))
    with pytest.raises(UserError, match=f"manifest.json: .* without {name}; .*Restore or delete"):
        load_run.require_run(tmp_path)


ROWS = [
    "[]", "3", "{", '{"prompt": "x"}', '{"file": "a"}', '{"file": 3, "prompt": "x"}', '{"file": null, "prompt": "x"}',
    json.dumps({"file": "x" * 300, "prompt": ""}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_row_in_the_middle_is_named_by_its_line(tmp_path, row):
    path = tmp_path / "images.jsonl"
    path.write_text(f'{{"file": "a.png", "prompt": "a"}}\n{row}\n{{"file": "b.png", "prompt": "b"}}\n')
    with pytest.raises(UserError, match="images.jsonl, line 2: .*Delete the line"):
        read_jsonl(path, IMAGE_ROW)


TEXTS = [
    "train.steps=" + "1" * 6000, "train.steps=" + "[" * 5000, "seed=-1", "seed=" + "9" * 30, "train.batch=0", "draw.count=1e3",
    "train.lr=nan", "train.lr=inf", "train.methods=x", "nothing=3", "train.steps", "train.methods=lora,lora,x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:24])
def test_a_setting_from_the_terminal_is_refused_by_its_key(text):
    with pytest.raises(UserError) as refusal:
        load_recipe(None, [text])
    assert text.partition("=")[0] in str(refusal.value)


@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number_is_named_with_its_file(tmp_path, name):
    path = tmp_path / "w.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, float(name)])}, path)
    with pytest.raises(UserError, match="w.safetensors: tensor 'bad' holds .*Download the file again"):
        safetensors_io.load_tensors(path)
