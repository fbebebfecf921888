"""Captions that are written: true of Toyland's scenes, of what is around the subject alone, and never over another's."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import captions as benchmark
from personalize.commands.check_photos import check_photos
from personalize.common.bases import TOYLAND
from personalize.common.errors import UserError
from personalize.evaluation import captioner, image_to_text
from personalize.evaluation.encoders import load_clip
from personalize.evaluation.image_to_text import load_image_to_text, without_subject
from personalize.models.lazy_imports import lazy_imports
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import COLOURS, sample_scene

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "a", "brown", "dog", "in", "the", "snow", "sleeping"]


def test_place_and_action_are_true_of_scenes_whose_truth_is_known():
    """Of 1200 scenes the place is said in 86 %, 97 % of these right, and the action in all, all right; 4 deviations of 60."""
    row = benchmark.measure(60)
    assert row["place"]["right"] > 0.88 and row["place"]["said"] > 0.67
    assert row["action"]["right"] > 0.98 and row["action"]["said"] > 0.98


def test_what_is_unsure_is_not_said():
    clip, lists = load_clip(TOYLAND, "cpu"), {"place": captioner.phrase_lists("toyland")["place"]}
    scenes = [sample_scene(benchmark.FIRST + k) for k in range(16)]
    images = torch.stack([torch.from_numpy(np.array(draw_scene(one)[0])).permute(2, 0, 1) for one in scenes]) / 127.5 - 1
    said = {sure: sum(map(bool, captioner.choose_phrases(clip, images, "dog", lists, sure=sure))) for sure in (0.0, 0.9, 1.0)}
    assert said[0.0] == 16 > said[0.9] > said[1.0] == 0


def test_two_hundred_phrases_of_photos_say_nothing_of_the_subject():
    lists = captioner.phrase_lists("stable-diffusion-v1-5/stable-diffusion-v1-5")
    every = [phrase for phrases in lists.values() for phrase in phrases]
    assert tuple(lists) == captioner.KINDS and len(every) == len(set(every)) == 200
    for phrase in every:  # colours are of walls and backgrounds alone
        assert not set(phrase.split()) & {*COLOURS, "grey"} or phrase.endswith((" wall", " background")), phrase
    assert set(captioner.phrase_lists("toyland")) == {"action", "place"}


def test_a_caption_has_the_action_the_place_and_then_the_view():
    phrases = {"view": "seen from above", "place": "in the snow", "action": "sleeping"}
    assert captioner.caption_of(phrases) == "a {token} {class} sleeping in the snow, seen from above"
    assert captioner.caption_of({}) == "a {token} {class}"


@pytest.mark.parametrize(
    "text, kept",
    [
        ("a brown and white dog with a red collar sleeping in the snow", "sleeping in the snow"),
        ("a close up of a dog", ""),
        ("there is a small dog that is laying on the floor", "laying on the floor"),
        ("a woman holding a fluffy dog in the park", "in the park"),
        ("a dog standing on a beach with the sea in the background", "standing on a beach with the sea in the background"),
        ("a puppy with floppy ears under a table", "under a table"),
        ("A Dog wearing a hat, in {front} of a building", "in front of a building"),
        ("two dogs on a bed", "on a bed"),
    ],
)
def test_of_a_written_caption_what_the_subject_is_like_is_left_out(text, kept):
    assert without_subject(text, "dog") == f"a {{token}} {{class}} {kept}".strip()


def copies(photos, folder, *names):
    folder.mkdir()
    for name, source in zip(names, sorted(photos.glob("*.png"))):
        shutil.copy(source, folder / name)
    return folder


def test_a_caption_is_written_beside_each_photo_that_has_none(photos, tmp_path):
    folder = copies(photos, tmp_path / "p", "a.png", "b.png", "c.png", "d.png", "d.jpg")
    (folder / "d.jpg").rename(folder / "d.webp")
    shutil.copy(folder / "a.png", folder / "e.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "e.png", "text": ""}\n')
    (folder / "a.txt").write_text("mine")
    (folder / "b.caption").write_text("\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = check_photos(folder, out=tmp_path / "page.html", caption=True, class_word="dog")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"c.txt", "d.png.txt", "d.webp.txt"}
    assert {path: f"{text}\n".encode() for path, text in result.captions.items()} == {
        str(folder / name): after[name] for name in set(after) - set(before)
    }
    assert result.captions[str(folder / "c.txt")] == "a {token} {class} standing in a room"
    again = check_photos(folder, out=tmp_path / "page.html", caption=True, class_word="dog")
    assert again.captions == {} and {path.name: path.read_bytes() for path in folder.iterdir()} == after


def test_the_terminal_says_what_it_wrote(terminal, photos, tmp_path):
    folder = copies(photos, tmp_path / "p", "a.png", "b.png")
    status, out, _ = terminal("photos", folder, "--caption", "--class", "dog", "--json")
    assert status == 0
    assert json.loads(out)["captions"] == {
        str(folder / "a.txt"): "a {token} {class} standing on a meadow",
        str(folder / "b.txt"): "a {token} {class} standing on the beach",
    }


@pytest.mark.parametrize(
    "options, said",
    [
        ({"caption": True}, "what do the photos show\\? Give its class"),
        ({"class_word": "dog"}, "--class and --captioner are for captions"),
        ({"captioner": "x"}, "--class and --captioner are for captions"),
        ({"caption": True, "class_word": "dog", "captioner": "nowhere"}, "the captioner nowhere is no folder here. Give"),
        ({"caption": True, "class_word": "dog", "base": "sd"}, "cannot load the CLIP encoder .*--captioner FOLDER"),
    ],
)
def test_what_is_missing_is_named(photos, tmp_path, options, said):
    folder = copies(photos, tmp_path / "p", "a.png")
    with pytest.raises(UserError, match=said):
        check_photos(folder, size=64, out=tmp_path / "page.html", **options)
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_captions_of_a_data_set_are_refused(tmp_path):
    with pytest.raises(UserError, match="captions are written beside photo files"):
        check_photos("hf:owner/name", size=64, out=tmp_path / "page.html", caption=True, class_word="dog")


def blip(folder):
    """A BLIP of random weights at tiny width, as its hub folders are laid out."""
    with lazy_imports():
        from transformers import (
            BertTokenizer,
            BlipConfig,
            BlipForConditionalGeneration,
            BlipImageProcessor,
            BlipProcessor,
        )
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "projection_dim": 16, **sizes, **ends}
    vision = {"image_size": 32, "patch_size": 16, **sizes}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(str(folder / "vocab.txt")))
    processor.save_pretrained(folder)
    return folder


def test_a_local_blip_writes_and_what_it_says_of_the_subject_is_left_out(photos, tmp_path, monkeypatch):
    folder, here = blip(tmp_path / "blip"), copies(photos, tmp_path / "p", "a.png")
    text = load_image_to_text(folder, "cpu")(Image.new("RGB", (50, 40)))
    assert text and set(text.split()) <= set(WORDS)
    monkeypatch.setattr(captioner, "load_image_to_text", lambda place, device: lambda image: "a brown dog in the snow")
    result = check_photos(here, size=64, out=tmp_path / "page.html", caption=True, class_word="dog", captioner=folder)
    assert result.captions == {str(here / "a.txt"): "a {token} {class} in the snow"}


def florence(folder):
    """A Florence-2 of random weights at tiny width, whose 17 places of an image are 16 cells and their mean."""
    with lazy_imports():
        from transformers import (
            BartTokenizer,
            CLIPImageProcessor,
            Florence2Config,
            Florence2ForConditionalGeneration,
            Florence2Processor,
        )
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *"abcde"]
    words = BartTokenizer(
        vocab={letter: k for k, letter in enumerate(letters)}, merges=[], extra_special_tokens={"image_token": "<image>"}
    )
    pixels = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    pixels.image_seq_length = 17
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
        "embed_dim": [8, 16], "num_heads": [1, 2], "num_groups": [1, 2], "window_size": 4, "projection_dim": 16,
    }  # fmt: skip
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder")
              for name, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 7}
    text = {"model_type": "bart", "vocab_size": len(words), "d_model": 16, "max_position_embeddings": 64, **layers, **ends}
    torch.manual_seed(0)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=words.image_token_id)
    network = Florence2ForConditionalGeneration(config)
    network.generation_config.forced_bos_token_id = 7
    network.save_pretrained(folder)
    Florence2Processor(pixels, words).save_pretrained(folder)
    return folder


def test_a_local_florence_writes_when_it_is_asked_for_a_caption(tmp_path):
    assert load_image_to_text(florence(tmp_path / "florence"), "cpu")(Image.new("RGB", (50, 40))).startswith("c")


def test_a_captioner_of_pickles_of_another_kind_or_with_code_of_its_own_is_refused(tmp_path):
    folder = blip(tmp_path / "blip")
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"model_type": "bert"}, "is of the kind 'bert'. Give a folder of CLIP, BLIP or Florence-2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"text_config": config["text_config"] | {"num_hidden_layers": 2}}, "lack .*layer.1"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=said):
            load_image_to_text(folder, "cpu")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    code = {"auto_map": {name: "code.Own" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}}
    (folder / "config.json").write_text(json.dumps(config | code))
    load_image_to_text(folder, "cpu")
    assert not ran.exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no model.safetensors, and pickled weights"):
        image_to_text.model_type(folder)
