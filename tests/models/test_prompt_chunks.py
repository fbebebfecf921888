"""Long prompts: kohya's rule written out, learned words in one piece, and all that counts tokens at their new places."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from screens import RecordingScreen

import personalize
from personalize import models
from personalize.commands.export import verify
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe, recipe_to_dict
from personalize.common.recipe_sections import SamplingConfig
from personalize.data import class_images
from personalize.evaluation import image_cache
from personalize.generation import sampling
from personalize.generation.attention_maps import word_maps
from personalize.generation.editing import Edit, sample_edits
from personalize.generation.words import PLAIN, Emphasis, align, encode_words, tokens_of
from personalize.models.prompt_chunks import join_chunks, split_mask
from personalize.training.find_run import decisive_settings

ROOM = 30  # of these bases, where a release has 75
LENGTHS = (0, 1, ROOM - 1, ROOM, ROOM + 1, 2 * ROOM - 1, 2 * ROOM, 2 * ROOM + 1, 3 * ROOM, 3 * ROOM + 5)
PROMPTS = ["dog " * length for length in LENGTHS] + ["a photo of " * 12 + "a xylophone"]


def read(folder, chunks):
    return models.load_model(str(folder), device="cpu", dtype="float32", chunks=chunks, say=lambda line: None)


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def long(folder):
    return read(folder, 3)


@pytest.fixture
def two(long, monkeypatch):
    """Two chunks, and a learned word of two tokens, as textual inversion leaves it."""
    monkeypatch.setattr(long, "chunks", 2)
    for tokenizer in long.tokenizers.values():
        tokenizer.add_tokens(["<rex>", "<rex>_1"])  # ids past the embedding: for what counts tokens only
    monkeypatch.setitem(long.learned_words, "<rex>", "<rex> <rex>_1")
    return long


def kohya(tokenizer, text, chunks):
    """The rule of its `max_token_length`: the whole text padded once, and cut into [beginning, 75 tokens, end]."""
    room, end, pad = tokenizer.model_max_length - 2, tokenizer.eos_token_id, tokenizer.pad_token_id
    length = chunks * room + 2
    whole = tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
    rows = [[whole[0], *whole[1 + k * room :][:room], whole[-1]] for k in range(chunks)]
    for row in rows if pad != end else ():
        if row[-2] not in (end, pad):
            row[-1] = end
        if row[1] == pad:
            row[1] = end
    return torch.tensor(rows)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_tokens_are_cut_as_kohya_cuts_them(long, monkeypatch, chunks):
    monkeypatch.setattr(long, "chunks", chunks)
    for part, tokenizer in long.tokenizers.items():
        expected = torch.cat([kohya(tokenizer, text, chunks) for text in PROMPTS])
        assert torch.equal(long.tokens(part, PROMPTS), expected)


def test_chunks_are_encoded_apart_and_joined_without_the_ends_between_them(long):
    """SDXL's pooled text is the first chunk's, as in kohya's scripts."""
    states = []
    with torch.no_grad():
        cond = long.encode_prompts(PROMPTS)
        for part, encoder in long.text_encoders.items():
            rows = []
            for text in PROMPTS:
                outs = [encoder(ids[None], output_hidden_states=True) for ids in kohya(long.tokenizers[part], text, 3)]
                each = [out.last_hidden_state if len(long.text_encoders) == 1 else out.hidden_states[-2] for out in outs]
                rows.append(torch.cat([each[0][:, :1], *(one[:, 1:-1] for one in each), each[-1][:, -1:]], 1))
            states.append(torch.cat(rows))
    text = torch.cat(states, -1)
    if "pooled" in cond:
        text[[prompt == "" for prompt in PROMPTS]] = 0.0  # as the base learned "no prompt"
        long.chunks = 1
        with torch.no_grad():
            torch.testing.assert_close(cond["pooled"], long.encode_prompts(PROMPTS)["pooled"], rtol=0, atol=1e-5)
        long.chunks = 3
    assert text.shape[1] == 3 * ROOM + 2
    torch.testing.assert_close(cond["text"], text, rtol=0, atol=1e-5)


def test_a_mask_is_split_as_states_are_joined():
    kept = torch.randint(0, 2, (4, 3 * ROOM + 2))
    apart = split_mask(kept, 3)
    assert apart.shape == (12, ROOM + 2) and torch.equal(join_chunks(apart[..., None], 3)[..., 0], kept)
    assert apart[0::3, -1].all() and apart[1::3, [0, -1]].all() and apart[2::3, 0].all()


def test_what_does_not_fit_is_told_from_the_last_chunk_on(two):
    assert two.truncated_words("dog " * 60) == "" and two.truncated_words("dog " * 60 + "red hat").strip() == "red hat"
    assert two.says("dog " * 59 + "hat", "hat", whole=False) and not two.says("dog " * 60 + "hat", "hat", whole=False)


@pytest.mark.parametrize("before", [28, 29, 30, 59])
def test_a_learned_word_is_never_in_two_chunks(two, before):
    prompt = "dog " * before + "<rex> hat"
    part, ids = "text_encoder", two.tokens("text_encoder", [prompt])
    first, second = two.tokenizers[part].convert_tokens_to_ids(["<rex>", "<rex>_1"])
    places = [(chunk, i) for chunk in range(2) for i in range(ROOM + 2) if ids[chunk, i] == first]
    if before == 59:
        assert not places and two.truncated_words(prompt).replace(" ", "") == "<rex><rex>_1hat"
    else:
        ((chunk, place),) = places
        assert ids[chunk, place + 1] == second and (chunk, place) == ((0, 29) if before == 28 else (1, 1))
        rows = join_chunks(ids[..., None].float(), 2)[0, :, 0]
        assert rows[tokens_of(two, prompt, "<rex>")].tolist() == [first, second]
        assert rows[tokens_of(two, prompt, "hat")].tolist() == [ids[1, place + 2 if chunk else 1]]
    assert two.tokens(part, ["<rex> " * 40]).shape == (2, ROOM + 2)


def test_gradients_reach_the_words_of_every_chunk(long):
    table = long.text_encoders["text_encoder"].get_input_embeddings()
    table.weight.requires_grad_(True)
    long.encode_prompts(["dog " * (2 * ROOM) + "hat"])["text"].square().sum().backward()
    (hat,) = long.tokenizers["text_encoder"]("hat", add_special_tokens=False).input_ids[:1]
    assert table.weight.grad[hat].abs().sum() > 0
    table.weight.requires_grad_(False).grad = None


def test_ignored_words_of_a_later_chunk_are_not_read(long):
    texts, options = ["dog " * 40 + "red hat", "dog " * 40 + "photo hat"], [Emphasis(ignored=(w,)) for w in ("red", "photo")]
    with torch.no_grad():
        masked, plain = encode_words(long, texts, options), encode_words(long, texts, [PLAIN] * 2)
    (place,) = tokens_of(long, texts[0], "red")
    assert place == 41
    torch.testing.assert_close(masked["text"][0, place + 1 :], masked["text"][1, place + 1 :], rtol=0, atol=1e-5)
    assert (plain["text"][0, place + 1] - plain["text"][1, place + 1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("source", "target"),
    [("a dog", "dog " * 40 + "hat"), ("dog " * 29 + "<rex> hat", "dog " * 29 + "<rex> red hat"), ("dog " * 29 + "<rex>", "")],
)
def test_every_token_of_both_chunks_has_a_map_of_the_source_or_its_own(two, source, target):
    shares, own = align(two, source, target)
    assert shares.shape == (2 * ROOM + 2,) * 2 and ((shares.sum(0) > 0) != (own > 0)).all()
    same, none = align(two, source, source)
    assert torch.equal(same, torch.eye(2 * ROOM + 2)) and not none.any()


def test_a_word_past_the_first_chunk_is_drawn_edited_and_mapped(long):
    config = SamplingConfig("ddim", 2, 4.0, negative="a red hat")
    texts, maps = ["dog " * 35 + "hat", "dog " * 35 + "cat"], []

    def drawn(prompt, **options):
        return sampling.sample_latents(long, [prompt], sampling.image_generators(0, [0]), config, **options)

    one, other = drawn(texts[0], maps=maps), drawn(texts[1])
    assert (one - other).abs().max() > 1e-4
    assert word_maps(long, texts[0], maps[0]).keys() == {"dog", "hat"} and maps[0].shape[0] == 3 * ROOM + 2
    source, plain, edited = sample_edits(long, Edit(*texts), sampling.image_generators(0, [0]), config)
    torch.testing.assert_close(source, one, rtol=0, atol=1e-4)
    assert (edited - plain).abs().max() > 1e-4


def test_records_name_the_chunks_and_are_as_before_without(tiny_sd, long, monkeypatch):
    monkeypatch.setattr(long, "chunks", 1)
    recipe, config = load_recipe(None, [f"base={tiny_sd}"]), SamplingConfig()
    options = {"seed": 0, "purpose": "evaluate", "config": config}
    before = class_images.class_image_settings(long, recipe, "dog"), image_cache.cache_folder(tiny_sd, "x", long, **options)
    monkeypatch.setattr(long, "chunks", 2)
    after = class_images.class_image_settings(long, recipe, "dog"), image_cache.cache_folder(tiny_sd, "x", long, **options)
    assert after[0] == before[0] | {"prompt_chunks": 2} and after[1] != before[1]


def test_class_images_of_other_chunks_are_refused_in_both_directions(tmp_path):
    plain, long = {"base": "x", "prompt": "a dog"}, {"base": "x", "prompt": "a dog", "prompt_chunks": 2}
    for there, wanted, said in ((plain, long, "None there, 2 here"), (long, plain, "2 there, None here")):
        class_images._write_manifest(tmp_path, there, "finished", 0)
        with pytest.raises(UserError, match=f"do not fit this run: prompt_chunks is {said}"):
            class_images.check_folder(tmp_path, wanted)


def test_chunks_decide_a_run_and_one_is_the_run_from_before_the_setting():
    default, two = (recipe_to_dict(load_recipe(None, [f"prompt.chunks={n}"])) for n in (1, 2))
    before = {key: value for key, value in default.items() if key != "prompt"}
    assert decisive_settings(default) == decisive_settings(before) != decisive_settings(two)
    assert decisive_settings(two)["prompt"] == {"chunks": 2}


def test_a_run_is_trained_and_drawn_with_its_chunks(tiny_sd, photos, tmp_path):
    """Its base is opened as its recipe says, by every command."""
    prompt = "a {token} {class} " + "dog " * 30 + "in the snow"
    settings = [f"base={tiny_sd}", "device=cpu", "prior.count=0", "photos.hold_out=0", "train.methods=lora", "train.steps=1"]
    settings += ["draw.steps=2", "draw.count=1", f"train.prompt={prompt}", "train.text_encoder=true"]
    plain, long, runs = RecordingScreen(), RecordingScreen(), []
    for more, screen in (([], plain), (["prompt.chunks=2"], long)):
        result = personalize.train(photos, class_word="dog", settings=[*settings, *more], runs=tmp_path, screen=screen)
        runs.append(result.folder)
    assert runs[0] != runs[1]
    assert any("too long" in line for line in plain.lines) and not any("too long" in line for line in long.lines)
    files = [personalize.generate([prompt], run=run, out=run / "out", screen=s).files[0] for run, s in zip(runs, (plain, long))]
    rows = [json.loads((run / "out" / "images.jsonl").read_text()) for run in runs]
    assert "prompt_chunks" not in rows[0] and rows[1]["prompt_chunks"] == 2
    parameters = [Image.open(file).text["parameters"] for file in files]
    assert "Prompt chunks: 2" in parameters[1] and "Prompt chunks" not in parameters[0]
    assert "(--set prompt.chunks=2 reads 30 tokens more)" in plain.lines[-1]
    changed = personalize.generate([prompt], run=runs[1], out=runs[1] / "out", settings=["prompt.chunks=3"]).files[0]
    assert changed.name != files[1].name and changed.read_bytes() != files[1].read_bytes()


def test_the_check_of_an_export_draws_with_the_runs_chunks(two, tmp_path, monkeypatch):
    said = []

    def run(command, **options):
        said.extend(command)
        return SimpleNamespace(returncode=2, stderr="error: enough")

    monkeypatch.setattr(verify.subprocess, "run", run)
    with pytest.raises(UserError, match="enough"):
        verify.draw_in_fresh_process(two, verify.Files(two.folder), "a dog", 1.0, scratch=tmp_path)
    assert said[said.index("prompt.chunks=2") - 1] == "--set" and "prompt.weighting=" in said
