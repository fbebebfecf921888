"""The ablation's networks do what their papers say, and a row that is there is not made again."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from benchmarks import ablation, ablation_data, ablation_networks
from benchmarks.ablation_data import Size
from personalize.common.bases import TOYLAND
from personalize.core import elbo
from personalize.core import schedule as S

TINY = Size(steps=2, batch=2, scenes=8, pictures=4)


def randn(*shape, k=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(k))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_networks, "CHANNELS", (16, 16, 16))
        yield


def schedule():
    return S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction")


def network(name):
    torch.manual_seed(0)
    return getattr(ablation_networks, name)(schedule())


@pytest.mark.parametrize("t", [1, 2, 400, 999])
def test_the_learned_variance_lies_between_those_of_the_bound(t):
    own, error, rows = network("LearnedVariance"), 0.1 * randn(2, 4, 3, 3), torch.full((2,), t)
    abar = own.schedule.alphas_cumprod
    beta = 1 - (abar[t] / abar[t - 1]).item()
    for share, variance in ((1.0, beta), (-1.0, None)):
        expected = elbo.step_term(own.schedule, error.double(), t, t - 1, variance=variance)
        ours = own._terms(error, torch.full_like(error, share), rows).double().flatten(1).sum(1)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_the_learned_variance_s_last_step_is_the_density_of_the_data():
    own, error = network("LearnedVariance"), 0.1 * randn(2, 4, 3, 3)
    ours = own._terms(error, torch.ones_like(error), torch.zeros(2, dtype=torch.long)).flatten(1).sum(1)
    torch.testing.assert_close(ours, elbo.data_term(error, 1 - own.schedule.alphas_cumprod[0].item()), rtol=1e-4, atol=1e-4)


def test_the_bound_trains_the_variance_and_not_the_mean():
    own = network("LearnedVariance")
    batch = ablation_data.Batch(randn(2, 4, 16, 16), randn(2, 4, 16, 16, k=1), torch.tensor([3, 700]), None, randn(2, 5, 192))
    out, share = own.unet(batch.z_t, batch.t, batch.text).sample.chunk(2, 1)
    own.loss(batch._replace(target=out.detach()), torch.Generator()).mean().backward()  # nothing is left for the mean to learn
    mean, variance = own.unet.conv_out.weight.grad.chunk(2)
    assert mean.abs().max() == 0 and variance.abs().max() > 0


def test_terms_between_two_timesteps_are_a_straight_line_over_the_log():
    terms = torch.tensor([[5.0], [0.5], [0.01]]).double()  # 1 / (t + 1) at t = 1 and 99
    total = ablation_networks.sum_of_terms([0, 1, 99], terms, 100)
    assert total.item() == pytest.approx(5 + sum(1 / (t + 1) for t in range(1, 100)))


def test_linear_attention_weighs_features_then_tokens():
    torch.manual_seed(0)
    part, x = Attention(8, heads=2, dim_head=4), randn(1, 6, 8)
    q, k, v = (layer(x)[0].reshape(6, 2, 4) for layer in (part.to_q, part.to_k, part.to_v))
    heads = [torch.einsum("nd,md,me->ne", q[:, h].softmax(1), k[:, h].softmax(0), v[:, h]) for h in range(2)]
    ours = ablation_networks._linear_attention(part, x, encoder_hidden_states=None)
    torch.testing.assert_close(ours[0], part.to_out[0](torch.cat(heads, 1)))
    own = network("LinearAttention").unet.attn_processors
    assert {name for name, f in own.items() if f is ablation_networks._linear_attention} == {n for n in own if "attn1" in n}


def test_self_conditioning_tells_the_network_what_it_said_before():
    own, z, text = network("SelfConditioned").eval(), randn(1, 4, 16, 16), randn(1, 5, 192)
    with torch.no_grad():
        first = own(z, torch.tensor([900]), text)
        guided = own.guided(text, text, 1.0)
        assert torch.equal(guided(z, 900), first), "nothing was said before the first step"
        known = own.schedule.to_z0(z, first, 900)
        expected = own.unet(torch.cat([z, known], 1), torch.tensor([800]), text).sample
        torch.testing.assert_close(guided(z, 800), expected)
        assert torch.equal(own.guided(text, text, 1.0)(z, 900), first), "another image begins anew"


def test_learned_sinusoids_learn():
    own = network("LearnedSinusoids")
    own(randn(1, 4, 16, 16), torch.tensor([500]), randn(1, 5, 192)).square().mean().backward()
    assert own.unet.time_proj.weight.grad.abs().max() > 0


def test_scenes_are_the_step_s_and_noise_is_the_seed_s_whatever_the_schedule():
    latents, texts = randn(8, 2, 4, 2, 2).half().numpy(), np.zeros((2, 2, 5, 3), np.float16)

    def batch(kind, seed, step):
        return ablation_data.batch_of(S.from_betas(S.BETAS[kind](1000)), latents, texts, TINY, seed, step)

    a, b, c, d = batch("linear", 0, 0), batch("cosine", 0, 0), batch("linear", 1, 0), batch("linear", 0, 1)
    assert torch.equal(a.z0, b.z0) and torch.equal(a.t, b.t) and torch.equal(a.target, b.target)
    assert not torch.equal(a.z_t, b.z_t) and not torch.equal(a.target, c.target) and not torch.equal(a.z0, d.z0)


@pytest.mark.slow
def test_two_rows_on_a_tiny_world_and_then_from_the_folder(tmp_path, monkeypatch):
    from personalize import models

    monkeypatch.setattr(ablation, "SAMPLING", 1)
    monkeypatch.setattr(ablation, "NODES", 3)
    model = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None)
    jobs = [(ablation.BASELINE, 0), ("learned variance", 0)]
    results = list(ablation.measure(tmp_path, model, TINY, jobs))
    lines = ablation.report(TINY, results)
    assert sum(line.startswith("| ") for line in lines) == 4 and any("own " in line for line in lines), lines
    assert all(math.isfinite(x) for _, _, result in results for x in result["rates"]["analytic"])
    monkeypatch.setattr(ablation, "train", None)
    assert list(ablation.measure(tmp_path, model, TINY, jobs)) == results
    with pytest.raises(SystemExit, match="was begun with"):
        list(ablation.measure(tmp_path, model, Size(), jobs))
