"""What `benchmarks.bits` counts is the bound: on Gaussian data, of which all is known, and on a tiny base."""

import math

import pytest
import torch

from benchmarks import bits
from personalize.core import rng
from personalize.core import schedule as S

SPREAD = 0.6
GAPS = {"posterior": 0.289, "beta": 0.0005, "analytic": 0.0}  # nats above the entropy: tests/core/test_elbo.py


@pytest.fixture(scope="module")
def gaussian():
    """schedule, z0 (8,40000) of deviation 0.6, and its errors (T,8) by the exact network."""
    schedule = S.from_betas(S.scaled_linear(1000), "v_prediction")
    generators = [rng.generator(0, "test/bits", k) for k in range(8)]
    z0 = SPREAD * rng.normal(generators, (40_000,)).double()

    def exact(z_t, t):
        alpha, sigma = schedule.level(t)
        return schedule.from_z0(z_t, alpha * SPREAD**2 * z_t / (alpha**2 * SPREAD**2 + sigma**2), t)

    timesteps = bits.nodes(schedule.T)
    errors = [(z - z0).square().mean(1) for z in bits.predictions(exact, schedule, z0, generators, timesteps)]
    return schedule, z0, bits.filled(schedule, timesteps, torch.stack(errors))


@pytest.mark.parametrize("kind", bits.VARIANCES)
def test_errors_at_some_timesteps_give_the_bound_of_all(gaussian, kind):
    schedule, z0, squares = gaussian
    spread = z0.square().mean(1)
    own = 0.5 * (math.log(2 * math.pi * SPREAD**2) + spread / SPREAD**2)  # -log p of these very values
    terms = bits.bound(schedule, squares, spread, kind)
    assert terms.shape == (1001, 8)
    gap = (terms.sum(0) * math.log(2) - own).mean().item()
    assert gap == pytest.approx(GAPS[kind], abs=4e-3)


def test_the_code_is_a_part_of_what_z0_costs_and_grows_towards_data(gaussian):
    schedule, z0, squares = gaussian
    terms = bits.bound(schedule, squares, z0.square().mean(1), "analytic")
    rates = torch.stack([terms[t + 1 :].sum(0) for t in bits.CURVE])
    assert (rates.diff(dim=0) > 0).all()
    # z_t of Gaussian data costs ½ log(1 + snr · variance), the mutual information, where every step is the best one
    for rate, t in zip(rates, bits.CURVE):
        snr = schedule.snr(t).item()
        assert rate.mean().item() == pytest.approx(0.5 * math.log2(1 + snr * SPREAD**2), abs=0.01)


def test_between_two_timesteps_the_share_of_noise_is_a_straight_line_over_the_log():
    schedule = S.from_betas(S.linear(10))
    noise = 1 - schedule.alphas_cumprod
    values = bits.filled(schedule, [0, 3, 9], noise[[0, 3, 9], None] * torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
    torch.testing.assert_close((values[:, 0] / noise)[[0, 1, 3, 9]], torch.tensor([0.0, 1.0, 2.0, 4.0]).double())
    torch.testing.assert_close(values[:, 1], noise)


def test_every_table_is_written_for_a_tiny_base(tiny_sd, monkeypatch):
    from personalize import models

    monkeypatch.setattr(bits, "NODES", 4)
    monkeypatch.setattr(bits, "CURVE", (999, 0))
    model = models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)
    lines = bits.report(model, 2)
    assert sum(line.startswith("| --- |") for line in lines) == 5
    assert not any("nan" in line or "inf" in line for line in lines), lines
