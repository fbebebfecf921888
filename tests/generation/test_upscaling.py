"""The upscaler: what it learns, and images twice as large by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.core import rng
from personalize.core.schedule import from_betas, scaled_linear
from personalize.generation.upscaling import Upscaling
from personalize.models.lazy_imports import lazy_imports
from personalize.models.upscaler import NOISE_BETAS, Upscaler, bicubic, detail, load_upscaler, with_detail
from personalize.toyland.pretraining import networks
from personalize.toyland.pretraining import upscaler as part

with lazy_imports():
    from diffusers import DDPMScheduler

SETTINGS = part.Settings()


def made(unet) -> Upscaler:
    return Upscaler(unet, networks.forward_process(), from_betas(scaled_linear(*NOISE_BETAS)))


@pytest.fixture(scope="module")
def trained() -> Upscaler:
    """A tiny network whose last layer is not zero."""
    torch.manual_seed(0)
    unet = part.network(size=16, channels=(8, 16)).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return made(unet.requires_grad_(False))


def small(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=rng.generator(0, "small")) * 2 - 1


def generators(count: int):
    return [rng.generator(0, "test", k) for k in range(count)]


def test_detail_is_what_pillows_bicubic_interpolation_misses():
    x, large = small(2), torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(with_detail(x, detail(large, x)), large, atol=1e-5)
    pixels = (x[0] * 40 + 128).round().byte().permute(1, 2, 0)
    theirs = np.asarray(Image.fromarray(pixels.numpy()).resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    ours = (bicubic(pixels.permute(2, 0, 1)[None].float())[0].permute(1, 2, 0)).clamp(0, 255)
    assert np.abs(ours.numpy() - theirs).max() <= 1.5, "no pass of Pillow's cuts such colours off"


def test_a_fresh_network_gives_bicubic_interpolation_exactly():
    torch.manual_seed(0)
    x = small(2)
    for level in (0, 50):
        upscaling = Upscaling(made(part.network(size=16, channels=(8, 16)).eval()), {}, level=level)
        assert torch.equal(upscaling.enlarge(x, generators(2)), bicubic(x).clamp(-1, 1))


def test_an_image_depends_on_its_own_generator_alone_and_on_steps_and_level(trained):
    x, upscaling = small(3), Upscaling(trained, {})
    both = upscaling.enlarge(x, generators(3))
    assert both.shape == (3, 3, 32, 32)
    assert torch.allclose(upscaling.enlarge(x[2:], generators(3)[2:]), both[2:], atol=1e-5)
    for other in (replace(upscaling, level=40), replace(upscaling, steps=3)):
        assert (other.enlarge(x, generators(3)) - both).abs().max() > 0.01
        assert other.identity != upscaling.identity


def test_noise_of_a_level_is_diffusers_and_level_0_adds_none(trained):
    x, eps, level = small(3), torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 100])
    T, start, end = NOISE_BETAS
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="scaled_linear", beta_start=start, beta_end=end)
    noisy = trained.noisy(x, level, eps)
    assert torch.equal(noisy[0], x[0])
    assert torch.allclose(noisy[1:], scheduler.add_noise(x[1:], eps[1:], level[1:]), atol=1e-5)


def loss_inputs(monkeypatch, settings, step=0):
    """The loss (8,) of a fresh network, and the timesteps and levels that it is asked at."""
    asked = {}

    def predict(self, z_t, t, shown, level):
        asked.update(t=t, level=level, shown=shown)
        return torch.zeros_like(z_t)

    monkeypatch.setattr(Upscaler, "predict", predict)
    x = small(8)
    weight = torch.ones(8, 1, 16, 16)
    large = bicubic(x) + 0.1
    return part.batch_loss(made(part.network(size=16, channels=(8,))), (large, x, weight), settings, step), asked


def test_the_shares_of_a_batch_are_the_settings(monkeypatch):
    loss, asked = loss_inputs(monkeypatch, replace(SETTINGS, mean_share=1.0, noisy_share=0.0))
    assert (asked["t"] == 999).all() and (asked["level"] == 0).all() and torch.equal(asked["shown"], small(8))
    assert torch.allclose(loss, torch.full((8,), (8 * 0.1) ** 2), rtol=1e-3), "of pure noise the target is -z0"
    _, asked = loss_inputs(monkeypatch, replace(SETTINGS, mean_share=0.0, noisy_share=1.0))
    assert (asked["t"] < 999).sum() >= 7 and (asked["level"] > 0).all()
    _, other = loss_inputs(monkeypatch, replace(SETTINGS, mean_share=0.0, noisy_share=1.0, seed=1))
    assert not torch.equal(other["t"], asked["t"])


def test_the_subject_weighs_more_and_half_of_the_small_images_are_the_vaes():
    images = np.zeros((4, 16, 16, 4), np.uint8)
    images[..., :4, :, 3] = 85
    large, shown = np.zeros((4, 32, 32, 4), np.uint8), np.full((4, 16, 16, 3), 255, np.uint8)
    rows = torch.arange(4).repeat(8)
    _, low, weight = part._pair(large, images, shown, rows, 0, replace(SETTINGS, subject_weight=2.0))
    assert weight[0, 0, 0, 0] == 3 and weight[0, 0, 8, 0] == 1
    assert 8 < (low.flatten(1).mean(1) > 0).sum() < 24


@pytest.mark.slow
def test_training_learns_and_what_it_writes_is_read_again(tmp_path, monkeypatch):
    """On four scenes: better than bicubic after 60 steps; and the same call again trains nothing more."""

    class Base:
        size, device = 16, torch.device("cpu")

        def encode_images(self, images):
            return images, None

        def decode_latents(self, z0):
            return z0

    network = part.network
    monkeypatch.setattr(part, "network", lambda size: network(size, channels=(16,)))
    monkeypatch.setattr(part.pipeline.multiprocessing, "Pool", InProcess)
    settings = replace(SETTINGS, pictures=4, steps=60, batch=2, lr=0.03, mean_share=1.0, noisy_share=0.0, ema=0.5)
    torch.manual_seed(0)
    losses = []
    part.train(Base(), tmp_path / "upscaler", tmp_path, settings, losses.append)
    upscaler, record = load_upscaler(tmp_path, "here", torch.device("cpu"))
    assert (upscaler.size, upscaler.levels, upscaler.noise.T, len(record["sha256"])) == (16, part.LEVELS, 1000, 64)
    large, low = (np.load(tmp_path / f"{name}.npy")[..., :3] for name in ("large", "small"))
    truth, x = (torch.from_numpy(a).permute(0, 3, 1, 2).float() / 127.5 - 1 for a in (large, low))
    ours = Upscaling(upscaler, record).enlarge(x, generators(4))
    error, bicubics = ((y - truth).square().mean() for y in (ours, bicubic(x)))
    assert error < 0.9 * bicubics
    before = (tmp_path / "upscaler" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    part.train(Base(), tmp_path / "upscaler", tmp_path, settings, losses.append)
    assert (tmp_path / "upscaler" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


class InProcess:
    """multiprocessing.Pool in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def imap(self, function, values, chunksize):
        return map(function, values)

    def starmap(self, function, values, chunksize):
        return [function(*each) for each in values]
