"""`benchmarks.ddgan` is the papers' in its parts: the posterior is core's, R1 a squared gradient, G begins as the base."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import ddgan, ddgan_training
from personalize import models
from personalize.core import rng, samplers
from personalize.core import schedule as S

SETTINGS = ddgan_training.Settings(steps=2, batch=3)


@pytest.fixture(scope="module")
def tiny(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).random((9, 2, 4, 16, 16)).astype(np.float16)


def batch(tiny, latents, step=0):
    return ddgan_training.make_batch(tiny, latents, lambda k, step: f"a dog {k}", SETTINGS, step)


def test_a_step_draws_what_ddpm_draws():
    schedule = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction", spacing="trailing")
    generators = lambda: [rng.generator(0, "test", k) for k in range(3)]  # noqa: E731
    z0, noise = (torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    visited = []

    def guided(z, t):
        visited.append(z)
        return schedule.from_z0(z, z0, t)

    samplers.ddpm(guided, noise, schedule, 2, generators=generators())
    (t, s), _, last = ddgan_training.TRANSITIONS
    eps = rng.normal(generators(), z0.shape[1:])
    torch.testing.assert_close(ddgan.posterior_draw(schedule, z0, noise, t, s, eps), visited[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ddgan.posterior_draw(schedule, z0, visited[1], *last, eps), z0, rtol=1e-5, atol=1e-5)


def test_r1_and_its_gradient_are_those_of_a_quadratic():
    w, z = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).unbind()
    w.requires_grad_(True)
    penalty = ddgan.r1(lambda x: w * x.square(), z)  # the mean of 3 logits: its gradient is 2 w z / 3
    torch.testing.assert_close(penalty, (4 / 9 * w.square() * z.square()).sum(1))
    penalty.sum().backward()
    torch.testing.assert_close(w.grad, 8 / 9 * w.detach() * z.square())


def test_the_gradient_of_r1_through_attention_and_norms_is_a_finite_difference(tiny, latents):
    rows = batch(tiny, latents)
    critic = ddgan.Discriminator(tiny.unet).double()
    words, shown = rows.text.double(), rows.shown.double()

    def penalty():
        return ddgan.r1(lambda z: critic(z, shown, rows.times(1), rows.times(0), words), rows.real.double()).mean()

    weights = critic.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    penalty().backward()
    direction = weights.grad / weights.grad.norm()
    ends = []  # so near that no leaky ReLU changes sides
    for move in (1e-7, -1e-7):
        with torch.no_grad():
            weights += move * direction
        ends.append(penalty().item())
        with torch.no_grad():
            weights -= move * direction
    assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(weights.grad.norm().item(), rel=1e-3)


def test_before_training_zlat_0_is_the_base_and_another_is_not(tiny):
    g = torch.Generator().manual_seed(0)
    z_t, t, text = (
        torch.randn(2, 4, 16, 16, generator=g),
        torch.tensor([499, 999]),
        tiny.encode_prompts(["a dog", "a cat"])["text"],
    )
    network, zlat = ddgan.generator(tiny.unet), torch.randn(2, ddgan.Z, generator=g)
    with torch.no_grad():
        base = tiny.unet(z_t, t, text).sample
        torch.testing.assert_close(network(z_t, t, text, class_labels=0 * zlat).sample, base, rtol=1e-5, atol=1e-5)
        assert (network(z_t, t, text, class_labels=zlat).sample - base).abs().max() > 1e-4


def test_pure_noise_is_hidden_from_d_and_real_pairs_are_of_one_image(tiny, latents):
    steep = replace(tiny.schedule, alphas_cumprod=torch.linspace(1, 0, 1000, dtype=torch.float64).square().clamp(max=0.9999))
    tiny = type("Model", (), {"schedule": steep, "encode_prompts": tiny.encode_prompts})
    rows = batch(tiny, latents)
    assert not rows.shown[:2].any() and rows.shown[2:].equal(rows.z_t[2:])
    alpha, sigma = steep.level(499)
    left = (rows.z_t[2:] - alpha * rows.real[2:]) / sigma  # of the last transition, whose z_s is clean
    assert left.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights(tiny, latents, tmp_path):
    said, caption = [], lambda k, step: f"a dog {k}"
    whole = ddgan_training.train(tiny, latents, caption, tmp_path / "whole", SETTINGS, said.append)
    game = ddgan_training.Game(tiny, SETTINGS)
    game.step(ddgan_training.make_batch(tiny, latents, caption, SETTINGS, 0), 0)
    game.save(tmp_path / "half" / ddgan.STATE, 1)
    half = ddgan_training.train(tiny, latents, caption, tmp_path / "half", SETTINGS, said.append)
    assert all(a.equal(b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    assert "r1" in said[0]
    moved = zip(whole.parameters(), ddgan.generator(tiny.unet).parameters(), strict=True)
    assert sum(not a.equal(b) for a, b in moved) > 10
    loaded = ddgan.load(tiny, tmp_path / "half")
    assert all(a.equal(b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))
