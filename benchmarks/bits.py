"""What Toyland's base knows, in bits.    python -m benchmarks.bits [--base FOLDER] [--count N] [--out FILE]

The variational bound (Ho et al. 2006.11239, sections 3 and 4.3) on the latents of rendered scenes that no part of a base was
trained on, with an empty prompt and with the scene's own: L_T, L_t by bands of timesteps and L_0; three variances of the
reverse process; the rate of the progressive code against the error of the image that the base predicts from it; what an
image costs in all; and which latents the VAE uses.

Guidance is 1: with another there is no density. The error of the predicted z0 is measured at some timesteps, the same ones
for each image, and interpolated between them, so that intervals are over images. Prints Markdown, which --out keeps.
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import toyland
from benchmarks.machine import machine
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.files import write_text
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import elbo, rng
from personalize.core.guidance import Guided
from personalize.core.schedule import Schedule
from personalize.evaluation import bootstrap
from personalize.generation import sampling
from personalize.toyland.pretraining import collapse, stages
from personalize.toyland.world.scenes import HELD_OUT, sample_scene

FIRST = HELD_OUT + 11_000_000  # seeds of the scenes, which no other part of the project uses
NODES = 40  # timesteps at which errors are measured, closer where there is less noise, as the bound falls there
CURVE = (999, 900, 800, 700, 600, 400, 200, 100, 40, 10, 0)  # timesteps from which images are predicted and decoded
BANDS = (1, 10, 40, 200, 600, 1000)
VARIANCES = ("posterior", "beta", "analytic")
LEVELS = 127.5  # of 8-bit pixels in one unit of images in [-1, 1]
CONFIG = SamplingConfig(guidance=1.0)


@dataclass(frozen=True)
class Scenes:
    """N rendered scenes: images (N,3,H,W), prompts, posterior mean and deviation and a draw of it, z0 (N,C,h,w)."""

    images: Tensor
    prompts: list[str]
    mean: Tensor
    std: Tensor
    z0: Tensor

    @property
    def entropy(self) -> Tensor:
        """(N,) bits of a latent, of the posterior: what the code gets back (Vahdat et al. 2106.05931, eq. 1)."""
        return 0.5 * math.log2(2 * math.pi * math.e) + self.std.cpu().double().log2().flatten(1).mean(1)


@dataclass(frozen=True)
class Code:
    """squares (T,N): the mean square error of the predicted z0; distortion: timestep -> (N,) RMSE of its image, in levels."""

    squares: Tensor
    distortion: dict[int, Tensor]


def render(model, count: int) -> Scenes:
    scenes = [sample_scene(FIRST + k) for k in range(count)]
    images = toyland.Bench(model, None, None, count).render(scenes)
    mean, std = (torch.cat(part) for part in zip(*(model.encode_images(part) for part in images.split(64))))
    noise = rng.normal(sampling.image_generators(0, range(count), "bits/posterior"), mean.shape[1:])
    return Scenes(images, [toyland.prompt(scene) for scene in scenes], mean, std, mean + std * noise.to(mean))


def nodes(T: int) -> list[int]:
    return sorted({*(round(x) - 1 for x in np.geomspace(1, T, NODES)), *CURVE})


def predictions(
    guided: Guided, schedule: Schedule, z0: Tensor, generators: list[torch.Generator], timesteps: Sequence[int]
) -> Iterator[Tensor]:
    """For each timestep the z0 (N,...) that is predicted from z0 with fresh noise."""
    for t in timesteps:
        z_t = schedule.add_noise(z0, rng.normal(generators, z0.shape[1:]).to(z0), t)
        yield schedule.to_z0(z_t, guided(z_t, t), t)


@torch.inference_mode()
def measure(model, scenes: Scenes, prompts: Sequence[str]) -> Code:
    timesteps, errors, distortion = nodes(model.schedule.T), [], {t: [] for t in CURVE}
    for rows in sampling.sampling_batches(model, len(prompts), CONFIG):
        z0, part = scenes.z0[rows.start : rows.stop], list(prompts[rows.start : rows.stop])
        guided = sampling.text_guidance(model, sampling.encode_texts(model, part, draws=True), None, CONFIG)
        generators, squares = sampling.image_generators(0, rows, "bits"), []
        for t, predicted in zip(timesteps, predictions(guided, model.schedule, z0, generators, timesteps)):
            squares.append((predicted - z0).double().square().flatten(1).mean(1).cpu())
            if t in distortion:
                distortion[t].append(rmse(model.decode_latents(predicted), scenes.images[rows.start : rows.stop]))
        errors.append(torch.stack(squares))
    squares = filled(model.schedule, timesteps, torch.cat(errors, 1))
    return Code(squares, {t: torch.cat(parts) for t, parts in distortion.items()})


def rmse(images: Tensor, others: Tensor) -> Tensor:
    """(N,3,H,W), (N,3,H,W) in [-1,1] -> (N,) in levels of 255."""
    return LEVELS * (images.cpu() - others).double().square().flatten(1).mean(1).sqrt()


def filled(schedule: Schedule, timesteps: Sequence[int], squares: Tensor) -> Tensor:
    """Errors (K,N) at K timesteps -> (T,N) at all: the share of the noise that is left is a straight line over log(t + 1)."""
    noise = 1 - schedule.alphas_cumprod[:, None]
    known, wanted, shares = np.log1p(timesteps), np.log1p(np.arange(schedule.T)), squares / noise[list(timesteps)]
    return noise * torch.stack([torch.from_numpy(np.interp(wanted, known, row)) for row in shares.T.numpy()], 1)


def bound(schedule: Schedule, squares: Tensor, spread: Tensor, kind: str) -> Tensor:
    """Errors (T,N), mean square of z0 (N,) -> (T+1,N) bits of a dimension: L_0, L_1 and so on, and last L_T.

    kind: of the reverse process' variance: "posterior" (the smallest; at L_0, which has none, beta), "beta" (the largest),
    or "analytic", the best single one of each step, from the mean of the same errors.
    """
    one, abar = squares.sqrt()[..., None], schedule.alphas_cumprod.tolist()  # one dimension stands for all

    def variance(t: int) -> float | None:
        if kind == "analytic":
            mean = squares[t].mean().item()
            return elbo.analytic_variance(schedule, mean, t, t - 1) if t else mean
        return None if kind == "posterior" and t else 1 - abar[t] / (abar[t - 1] if t else 1.0)

    steps = [elbo.step_term(schedule, one[t], t, t - 1, variance=variance(t)) for t in range(1, schedule.T)]
    ends = elbo.data_term(one[0], variance(0)), elbo.prior_term(schedule, spread.sqrt()[:, None])
    return torch.stack([ends[0], *steps, ends[1]]) / math.log(2)


def said(values: Tensor, form: str = ".3f") -> str:
    """(N,) of N images -> their mean and its interval."""
    interval = bootstrap.bootstrap_interval(values.tolist(), [()] * len(values))
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def band_rows(bits: dict[str, Tensor], entropy: Tensor) -> list[list[str]]:
    """The terms of the bound with the analytic variance, from noise to data; bits: prompt -> (T+1,N)."""

    def row(name: str, of: Callable[[Tensor], Tensor], form: str = ".3f") -> list[str]:
        return [name, *(said(of(terms), form) for terms in bits.values())]

    bands = [(low, high) for low, high in zip(BANDS, BANDS[1:])][::-1]
    return [
        row("L_T", lambda terms: terms[-1]),
        *(row(f"L_t, t {a} to {b - 1}", lambda terms, a=a, b=b: terms[a:b].sum(0)) for a, b in bands),
        row("L_0, a density", lambda terms: terms[0]),
        row("**-log p(z0)**, a density", lambda terms: terms.sum(0)),
        row("less the posterior's own: **rate**", lambda terms: terms.sum(0) - entropy),
    ]


def variance_rows(model, codes: dict[str, Code], scenes: Scenes) -> list[list[str]]:
    spread = square_of(scenes)
    rows = []
    for kind in VARIANCES:
        parts = (bound(model.schedule, code.squares, spread, kind).sum(0) for code in codes.values())
        rows.append([kind, *(said(part - scenes.entropy) for part in parts)])
    gaussian = 0.5 * (math.log2(2 * math.pi) + spread / math.log(2)) - scenes.entropy
    return [*rows, ["N(0, 1) instead of the diffusion", *[said(gaussian)] * len(codes)]]


def square_of(scenes: Scenes) -> Tensor:
    return scenes.z0.cpu().double().square().flatten(1).mean(1)


def curve_rows(bits: dict[str, Tensor], codes: dict[str, Code], scenes: Scenes, sent: Tensor) -> list[list[str]]:
    """What z_t costs, and the error of the image predicted from it; sent (N,): the error of the whole z0's image."""
    rows, size = [], scenes.z0[0].numel() / 8
    for t in CURVE:
        cells = [str(t)]
        for name, code in codes.items():
            rate = bits[name][t + 1 :].sum(0)
            cells += [f"{rate.mean():.3f}", f"{size * rate.mean():.0f}", said(code.distortion[t], ".1f")]
        rows.append(cells)
    cells = ["z0"]
    for name in codes:
        rate = bits[name].sum(0) - scenes.entropy
        cells += [f"{rate.mean():.3f}", f"{size * rate.mean():.0f}", said(sent, ".1f")]
    return [*rows, cells]


def pixel_rows(bits: dict[str, Tensor], scenes: Scenes, sent: Tensor) -> list[list[str]]:
    """Bits of a pixel's channel of 256 levels, with the decoder's variance fitted (Rybkin et al. 2006.13202)."""
    noise = sent.square().mean().item()
    told = elbo.data_term(sent[:, None], noise) / math.log(2)
    share = scenes.z0[0].numel() / scenes.images[0].numel()
    rates = [share * (terms.sum(0) - scenes.entropy) for terms in bits.values()]
    return [
        [f"image, given z0, with a deviation of {noise**0.5:.1f} levels", *[said(told)] * len(rates)],
        ["rate of z0", *map(said, rates)],
        ["**both**", *(said(told + rate) for rate in rates)],
        ["PNG, without loss", *[said(png_bits(scenes.images))] * len(rates)],
    ]


def png_bits(images: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,) bits of a pixel's channel."""
    sizes = []
    for image in sampling.to_pil(images):
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        sizes.append(8 * file.tell() / images[0].numel())
    return torch.tensor(sizes)


def vae_lines(model, scenes: Scenes, sent: Tensor) -> list[str]:
    scale = model.vae.config.scaling_factor
    mean, std = scenes.mean.cpu() / scale, scenes.std.cpu() / scale
    usage = collapse.vae_usage(mean, std)
    presumed = stages.KL_WEIGHT * scenes.images[0].numel() / (2 * mean[0].numel())
    times = (sent / LEVELS).square().mean().item() / presumed
    kept = elbo.used_directions(std, times).sum().item()
    columns = [[f"{value:.3f}" for value in usage[name]] for name in ("kl_bits", "linear_bits", "std")]
    head = ["channel", "KL, bits of a latent", "½ log2(1 / posterior variance)", "posterior deviation"]
    return [
        f"{usage['active']} of {usage['latents']} latents are active, {usage['used']} are used by the rule of the linear VAE. "
        f"The loss presumes a deviation of the pixels of {LEVELS * presumed**0.5:.1f} levels. A linear VAE with the variance "
        f"that is fitted, {times:.1f} times as large, would use {kept}.", "",
        *table(head, [[str(k), *cells] for k, cells in enumerate(zip(*columns))]),
    ]  # fmt: skip


def report(model, count: int) -> list[str]:
    scenes = render(model, count)
    codes = {"empty prompt": measure(model, scenes, [""] * count), "its prompt": measure(model, scenes, scenes.prompts)}
    bits = {name: bound(model.schedule, code.squares, square_of(scenes), "analytic") for name, code in codes.items()}
    sent = torch.cat([
        rmse(model.decode_latents(z0), images) for z0, images in zip(scenes.z0.split(25), scenes.images.split(25))
    ])  # fmt: skip
    known = said(bits["empty prompt"].sum(0) - bits["its prompt"].sum(0))
    curve = ["t", *(f"{name}: {what}" for name in codes for what in ("bits of a latent", "bytes", "RMSE, levels"))]
    return [
        "Bits of a latent:", "", *table(["", *bits], band_rows(bits, scenes.entropy)),
        f"Its prompt saves {known}.", "",
        "Rate by the variance of the reverse process:", "", *table(["", *codes], variance_rows(model, codes, scenes)),
        "Rate and distortion:", "", *table(curve, curve_rows(bits, codes, scenes, sent)),
        "Bits of a pixel's channel:", "", *table(["", *bits], pixel_rows(bits, scenes, sent)),
        *vae_lines(model, scenes, sent),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=TOYLAND, help="a folder that `personalize pretrain` made")
    parser.add_argument("--count", type=int, default=64, help="scenes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.process_time()
    lines = report(models.load_model(str(options.base), say=lambda line: None), options.count)
    base = "" if options.base == TOYLAND else f" --base {options.base.name}"
    command = f"`python -m benchmarks.bits{base} --count {options.count}`, {time.strftime('%Y-%m-%d')}"
    lines[:0] = [f"{command}, {machine()}, {time.process_time() - start:.0f} CPU seconds", ""]
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
