"""Heat maps of words: the softmax that the library's U-Net computes, averaged, and drawing that does not feel it."""

from dataclasses import replace

import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.core.guidance import cfg
from personalize.core.rng import generator
from personalize.generation import sampling
from personalize.generation.attention_maps import AttentionMaps, normalised, require_maps, word_maps
from personalize.generation.editing import Edit, sample_edits
from personalize.generation.local_blend import BLEND
from personalize.generation.words import PLAIN, Emphasis, changed_tokens, words_of

PROMPTS, SIDE, T = ["a photo of a cat", "a photo of a dog"], 16, 600


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl", "toyland"])
def model(request):
    name = request.param if request.param == "toyland" else str(request.getfixturevalue(request.param))
    return models.load_model(name, device="cpu", dtype="float32", say=lambda line: None)


class Recorded:
    """An attention processor of diffusers' that keeps the maps (B,H,N,L) of the attention to the text."""

    def __init__(self):
        self.maps = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        maps = attn.get_attention_scores(q, k)
        if encoder_hidden_states is not None:
            self.maps.append(maps.unflatten(0, (-1, attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(maps, v))))


def librarys_maps(model, z, prompts):
    """The mean over heads and layers, each enlarged by itself."""
    cond, recorded, before = sampling.encode_texts(model, prompts), Recorded(), model.unet.attn_processors
    model.unet.set_attn_processor(recorded)
    try:
        arguments = model.family.unet_arguments(cond, SIDE * model.downscale)
        model.unet(z, torch.full((len(z),), T), return_dict=False, **arguments)
    finally:
        model.unet.set_attn_processor(before)
    sides = [int(maps.shape[2] ** 0.5) for maps in recorded.maps]
    layers = [m.mean(1).transpose(1, 2).unflatten(2, (s, s)) for m, s in zip(recorded.maps, sides, strict=True)]
    return torch.stack([torch.nn.functional.interpolate(m, size=(SIDE, SIDE), mode="bilinear") for m in layers]).mean(0)


def test_maps_are_the_librarys_softmax_of_the_prompts_rows_and_sum_to_1(model):
    z = torch.randn(2, model.latent_channels, SIDE, SIDE, generator=generator(0, "noise"))
    with torch.inference_mode():
        cond, uncond = (sampling.encode_texts(model, texts, draws=True) for texts in (PROMPTS, ["", ""]))
        guided, plain = AttentionMaps(2), AttentionMaps(2)
        for maps, scale in ((guided, 3.0), (plain, 1.0)):
            cfg(lambda *inputs, maps=maps: model.predict(*inputs, watch=maps), cond, uncond, scale)(z, T)
        expected = librarys_maps(model, z, PROMPTS)
    for maps in (guided, plain):
        torch.testing.assert_close(maps.mean((SIDE, SIDE)), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(guided.mean((SIDE, SIDE)).sum(1), torch.ones(2, SIDE, SIDE))


def test_maps_change_no_bit_of_an_image_and_are_each_rows_own(model, monkeypatch):
    config = SamplingConfig(sampler="ddpm", steps=2, guidance=3.0)
    maps, alone = [], []
    plain = sampling.sample_latents(model, PROMPTS, sampling.image_generators(0, [0, 1]), config)
    assert torch.equal(plain, sampling.sample_latents(model, PROMPTS, sampling.image_generators(0, [0, 1]), config, maps=maps))
    sampling.sample_latents(model, PROMPTS[1:], sampling.image_generators(0, [1]), config, maps=alone)
    assert maps[0].shape[1:] == plain.shape[2:]
    torch.testing.assert_close(maps[1], alone[0], rtol=1e-3, atol=1e-5)
    predict, again = model.predict, []

    def tight(z, t, cond, **options):
        if len(z) > 1 and t[0] < 900:  # in the middle of sampling
            raise torch.OutOfMemoryError("no more")
        return predict(z, t, cond, **options)

    monkeypatch.setattr(model, "predict", tight)
    monkeypatch.setattr(model, "most_at_once", {})
    sampling.sample_latents(model, PROMPTS, sampling.image_generators(0, [0, 1]), config, maps=again)
    torch.testing.assert_close(torch.stack(again), torch.stack(maps), rtol=1e-3, atol=1e-5)
    second = []
    sampling.sample_latents(model, PROMPTS, sampling.image_generators(0, [0, 1]), config, maps=second, mapped=[1])
    torch.testing.assert_close(torch.stack(second), torch.stack(again[1:]))


def test_a_word_has_the_mean_of_its_tokens(model):
    prompt = "A photo of a dog, the (photo)."
    words = words_of(model, prompt)
    assert [word for word in words] == ["A", "photo", "of", "dog", "the"]
    length = next(iter(model.tokenizers.values())).model_max_length
    maps = torch.arange(length).float()[:, None, None].expand(length, 4, 4)
    for word, each in word_maps(model, prompt, maps).items():
        assert each[0, 0] == sum(words[word]) / len(words[word])
    assert "dog" not in words_of(model, "photo " * 90 + "dog"), "it is cut off"


def test_a_map_is_normalised_by_itself():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[0.2, 0.2], [0.2, 0.2]]])
    assert normalised(maps).tolist() == [[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]]


def test_local_blend_leaves_the_source_exactly_where_no_word_changes(model):
    config, edit = SamplingConfig(sampler="dpm++2m", steps=2, guidance=3.0), Edit("a photo of a dog", "a photo of a red hat")
    maps, streams = [], sampling.image_generators(0, [0])
    plain = sample_edits(model, edit, streams, config)
    source, same_noise, edited = sample_edits(model, replace(edit, local_blend=True), streams, config, maps=maps)
    assert torch.equal(source, plain[0]) and torch.equal(same_noise, plain[1])
    kept = (edited == source).all(1)
    hat = torch.stack([m[changed_tokens(model, edit.source, edit.target, PLAIN)[1]] for m in maps]).mean(1)
    assert 0 < kept.float().mean() < 1 and not (kept & (normalised(hat) > BLEND)).any()
    source, _, edited = sample_edits(model, Edit("a dog", "a dog", local_blend=True), streams, config)
    assert torch.equal(source, edited)


def test_changed_words_are_those_of_either_prompt_and_those_that_count_otherwise(model):
    def changed(source, target, emphasis=PLAIN):
        pairs = zip((source, target), changed_tokens(model, source, target, emphasis), strict=True)
        return tuple([word for word, ks in words_of(model, text).items() if set(ks) & set(tokens)] for text, tokens in pairs)

    assert changed("a photo of a dog", "a photo of a cat") == (["dog"], ["cat"])
    assert changed("a photo of a dog", "a photo of a red dog") == ([], ["red"])
    assert changed("a photo of a red dog", "a photo of a dog") == (["red"], [])
    hat = "a dog in a hat"
    assert changed(hat, hat, Emphasis((("hat", 2.0),))) == (["hat"], ["hat"])
    assert changed(hat, hat, Emphasis(ignored=("hat",))) == (["hat"], [])


def test_a_base_or_a_scale_without_maps_is_refused(model, monkeypatch):
    require_maps(model, SamplingConfig())
    with pytest.raises(UserError, match="guidance 0 never reads the prompt.*or --maps"):
        require_maps(model, SamplingConfig(guidance=0))
    monkeypatch.setattr("personalize.generation.attention_control.why_not_fast", lambda unet: "act_fn is 'gelu'")
    with pytest.raises(UserError, match="attention cannot be controlled, for act_fn is 'gelu'"):
        require_maps(model, SamplingConfig())
