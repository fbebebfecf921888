"""Borrowed queries and keys are Prompt-to-Prompt's maps, without a map: against maps made and edited in the library's U-Net."""

from collections import Counter

import pytest
import torch
from bases import sdxl
from torch.utils._python_dispatch import TorchDispatchMode

from personalize import models
from personalize.common.errors import UserError
from personalize.core.guidance import cfg
from personalize.core.rng import generator
from personalize.core.samplers import ddim
from personalize.generation import sampling
from personalize.generation.attention_control import borrowed, by_time, require_control, weighted

KINDS = {"sdxl": sdxl, "toyland": None}
SOURCE, PAIR = torch.tensor([0, 0, 2]), ["a photo of a cat", "a photo of a dog", "a red hat"]  # the third is left alone
SCALE, SIDE, T = 3.0, 16, 600


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    make = KINDS[request.param]
    name = str(make(tmp_path_factory.mktemp(request.param) / "base")) if make else request.param
    return models.load_model(name, device="cpu", dtype="float32", say=lambda line: None)


def conditions(model, prompts=PAIR):
    with torch.no_grad():
        return [sampling.encode_texts(model, texts, draws=True) for texts in (prompts, [""] * len(prompts))]


def noise(model, count=3, seed=0):
    return torch.randn(count, model.latent_channels, SIDE, SIDE, generator=generator(seed, "noise"))


def edit(length):
    """Some alignment and shares of the second row; the others are their own sources."""
    g = generator(0, "edit")
    alignment, own = torch.eye(length).repeat(3, 1, 1), torch.zeros(3, length)
    own[1] = torch.rand(length, generator=g).round(decimals=1)
    alignment[1] = torch.rand(length, length, generator=g).softmax(0) * (1 - own[1])
    return alignment, own


class Maps:
    """An attention processor of diffusers' that makes every map, edits it as the paper says, and reads the values with it."""

    def __init__(self, source, *, cross, layout, alignment, own, weights):
        self.source, self.cross, self.layout = source, cross, layout
        self.alignment, self.own, self.weights = alignment[:, None], own[:, None, None], weights[:, None, None]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        maps = attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads))
        if encoder_hidden_states is None:
            maps = maps[self.source] if self.layout else maps
        elif self.cross:
            maps = (maps[self.source] @ self.alignment + maps * self.own) * self.weights
        out = attn.batch_to_head_dim(torch.bmm(maps.flatten(0, 1), v))
        return attn.to_out[1](attn.to_out[0](out))


def with_maps(model, z, cond, uncond, *, cross=True, layout=False, alignment=None, own=None, weights=None):
    """What `cfg` gives by the library's U-Net and explicit maps, edited in the conditional half only."""
    length, plain = cond["text"].shape[1], torch.zeros(3, cond["text"].shape[1])
    if cross:
        cond = {k: v if k == "text" else v[SOURCE] for k, v in cond.items() if not k.startswith("attn2:")}
    alignment, own = torch.eye(length).repeat(3, 1, 1) if alignment is None else alignment, plain if own is None else own
    both = {k: torch.cat([uncond[k], cond[k]]) for k in uncond if not k.startswith("attn2:")}
    processor = Maps(
        torch.cat([torch.arange(3), 3 + SOURCE]), cross=cross, layout=layout,
        alignment=torch.cat([torch.eye(length).repeat(3, 1, 1), alignment]), own=torch.cat([plain, own]),
        weights=torch.cat([plain + 1, plain + 1 if weights is None else weights]),
    )  # fmt: skip
    before = model.unet.attn_processors
    model.unet.set_attn_processor(processor)
    try:
        arguments = model.family.unet_arguments(both, SIDE * model.downscale)
        u, c = model.unet(torch.cat([z, z]), torch.full((6,), T), return_dict=False, **arguments)[0].chunk(2)
    finally:
        model.unet.set_attn_processor(before)
    return u + SCALE * (c - u)


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


CASES = {
    "cross": {},
    "layout": {"cross": False, "layout": True},
    "refined": {"layout": True, "alignment": True, "own": True},
}


@pytest.mark.parametrize("case", CASES)
def test_borrowing_is_what_explicit_maps_give(model, case):
    z, (cond, uncond) = noise(model), conditions(model)
    alignment, own = edit(cond["text"].shape[1])
    options = CASES[case] | {k: v for k, v in (("alignment", alignment), ("own", own)) if k in CASES[case]}
    with torch.inference_mode():
        expected = with_maps(model, z, cond, uncond, **options)
        given = cfg(model.predict, *borrowed(cond, uncond, SOURCE, **options), SCALE)(z, T)
        plain = cfg(model.predict, cond, uncond, SCALE)(z, T)
    assert close(given, expected)
    assert close(given[[0, 2]], plain[[0, 2]]) and not close(given[1], plain[1])


def test_a_weighted_token_is_a_scaled_map(model):
    z, (cond, uncond) = noise(model), conditions(model)
    weights = torch.ones(3, cond["text"].shape[1])
    weights[1, 4], weights[2, 2] = 2.5, 0.0
    with torch.inference_mode():
        given = cfg(model.predict, weighted(cond, weights), uncond, SCALE)(z, T)
        together = cfg(model.predict, *borrowed(weighted(cond, weights), uncond, SOURCE), SCALE)(z, T)
        assert close(together, with_maps(model, z, cond, uncond, weights=weights))
        same = cfg(model.predict, weighted(cond, torch.ones_like(weights)), uncond, SCALE)(z, T)
        assert torch.equal(same, cfg(model.predict, cond, uncond, SCALE)(z, T)) and not close(given, same)


def test_an_edit_to_the_same_words_gives_the_same_bits(model):
    """Both rows are of one call; `by_time` ends control half way."""
    cond, uncond = conditions(model, [PAIR[0]] * 2)
    z, length = noise(model, 1).repeat(2, 1, 1, 1), cond["text"].shape[1]
    alignment, own = torch.eye(length).repeat(2, 1, 1), torch.zeros(2, length)
    edited = borrowed(cond, uncond, torch.zeros(2, dtype=torch.int64), layout=True, alignment=alignment, own=own)
    with torch.inference_mode():
        guided = by_time(cfg(model.predict, *edited, SCALE), cfg(model.predict, cond, uncond, SCALE), 500)
        source, same = ddim(guided, z, model.schedule, 4)
    assert torch.equal(source, same)


def test_control_without_guidance_takes_no_unconditional_prompt(model):
    z, (cond, _) = noise(model), conditions(model)
    edited, none = borrowed(cond, None, SOURCE, layout=True)
    with torch.inference_mode():
        assert none is None and cfg(model.predict, edited, None, 1.0)(z, T).isfinite().all()


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def test_no_map_is_ever_made(model):
    """Control runs the operators of plain drawing and two for each attention, that pick rows; softmax stays inside."""
    z, (cond, uncond) = noise(model), conditions(model)
    counts = []
    for control in (borrowed(cond, uncond, SOURCE, layout=True), (cond, uncond)):
        guided = cfg(model.predict, *control, SCALE)
        with torch.no_grad(), Operators() as operators:
            guided(z, T)
        counts.append(operators.count)
    controlled, plain = counts
    attentions = 2 * sum(name.endswith(".attn2") for name, _ in model.unet.named_modules())
    assert not any("softmax" in name for name in controlled)
    assert sum(n for name, n in controlled.items() if "scaled_dot_product" in name) == attentions
    assert controlled - plain == Counter(index=2 * attentions, arange=2, add=2)


def test_a_base_that_needs_the_librarys_forward_pass_is_refused(model):
    require_control(model)
    odd = type("Odd", (), {"name": "odd", "unet": type("U", (), {"config": {"act_fn": "gelu"}})()})()
    with pytest.raises(UserError, match="'odd': attention cannot be controlled, for act_fn is 'gelu'"):
        require_control(odd)
