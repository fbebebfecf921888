"""Timesteps of a step have the density that they say, diffusers' own where it has one, and strata each hold one."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from personalize.common.recipe import SETTINGS
from personalize.core import rng
from personalize.core.timesteps import TIMESTEPS

T, N = 1000, 40_000
GRID = torch.linspace(0, 1, 200_001, dtype=torch.float64)
MODE = 1 - GRID - 1.29 * ((torch.pi / 2 * GRID).cos() ** 2 - 1 + GRID)  # falls from 1 to 0
CDFS = {
    "uniform": lambda x: x,
    "stratified": lambda x: x,
    "low": lambda x: 1 - (1 - x) ** 2,
    "high": lambda x: x**2,
    "mode": lambda x: torch.from_numpy(1 - np.interp(x.numpy(), MODE.flip(0).numpy(), GRID.flip(0).numpy())),
    "logit-normal": lambda x: torch.special.ndtr(x.logit()),
}


def largest_gap(t, cdf):
    """Kolmogorov and Smirnov's distance of the timesteps to the exact CDF, times the root of their number."""
    found = torch.bincount(t, minlength=T).cumsum(0) / len(t)
    return (found - cdf(torch.arange(1, T + 1, dtype=torch.float64) / T)).abs().max().item() * len(t) ** 0.5


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_have_the_density_that_they_say_and_no_other(name):
    t = TIMESTEPS[name](N, T, rng.generator(0, "test"))
    assert (t.dtype, t.shape) == (torch.int64, (N,)) and t.min() >= 0 and t.max() < T
    for other, cdf in CDFS.items():
        same = cdf is CDFS[name] or {name, other} == {"uniform", "stratified"}
        assert (largest_gap(t, cdf) < 1.95) == same, other  # 1.95: passed by chance in 1 of 1000


def test_every_stratum_holds_one_timestep_and_every_image_gets_all_of_them():
    """Photos stand before class images: in a fixed order a class image would see the most noise only."""
    draws = torch.stack([TIMESTEPS["stratified"](4, T, rng.generator(0, "test", k)) for k in range(4000)])
    assert torch.equal((draws // (T // 4)).sort(1).values, torch.arange(4).expand(4000, 4))
    for image in range(4):
        assert largest_gap(draws[:, image], CDFS["uniform"]) < 1.95


@pytest.mark.parametrize(("name", "theirs"), [("mode", "mode"), ("logit-normal", "logit_normal")])
def test_densities_of_stable_diffusion_3_are_those_of_diffusers(name, theirs):
    options = {"batch_size": 256, "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    u = compute_density_for_timestep_sampling(theirs, **options, generator=rng.generator(0, "test"))
    assert torch.equal(TIMESTEPS[name](256, T, rng.generator(0, "test")), (u * T).long())


def test_the_setting_names_what_the_table_holds():
    assert SETTINGS["train.timesteps"].choices == tuple(TIMESTEPS) and SETTINGS["train.timesteps"].default == "uniform"
