"""Offset noise and input perturbation are the rules of diffusers' training scripts."""

import torch

from personalize.core import noise, rng

SHAPE = (64, 4, 16, 16)


def test_offset_noise_shifts_each_channel_of_an_image_as_a_whole():
    """train_text_to_image.py --noise_offset: noise += s * torch.randn((B, C, 1, 1))."""
    eps = torch.randn(SHAPE, generator=rng.generator(0, "eps"))
    out = noise.with_offset(eps, 0.1, rng.generator(0, "test"))
    assert torch.equal(out, eps + 0.1 * torch.randn(64, 4, 1, 1, generator=rng.generator(0, "test")))
    assert torch.equal(eps, torch.randn(SHAPE, generator=rng.generator(0, "eps"))), "not in place"
    assert abs(float((out - eps).mean((2, 3)).std()) - 0.1) < 0.015
    half = noise.with_offset(eps.half(), 0.1, rng.generator(0, "test"))
    assert half.dtype == torch.float16


def test_a_perturbed_input_has_a_noise_of_the_given_share_more():
    """train_text_to_image.py --input_perturbation: new_noise = noise + gamma * torch.randn_like(noise)."""
    eps = torch.randn(SHAPE, generator=rng.generator(0, "eps"))
    out = noise.perturbed(eps, 0.1, rng.generator(0, "test"))
    assert torch.equal(out, eps + 0.1 * torch.randn(SHAPE, generator=rng.generator(0, "test")))
    assert abs(float(out.var()) - 1.01) < 0.02
