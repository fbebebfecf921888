"""What the choices of a diffusion model do, at equal steps.    python -m benchmarks.ablation WORK [--steps N] [--row NAME] …

A U-Net of a quarter of Toyland's size is trained from nothing on the latents of Toyland's VAE, once for each row of ROWS:
the target, the noise schedule, and what DDPM's successors added. All rows see the same scenes, captions and timesteps in
the same order, begin with the same weights where their shapes are the same, and are judged on the same held-out scenes:
by the variational bound (`benchmarks.bits`, the variance of each step fitted), by the error of the predicted z0 at three
signal-to-noise ratios, and by what the probes read on images drawn with guidance.

WORK keeps latents, the texts' embeddings, the weights and a JSON and a PNG file for each row; a row that is there is not made
again, and a training that was stopped goes on. Prints Markdown, which --out keeps.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import ablation_networks, bits, toyland
from benchmarks.ablation_data import Size, batch_of, keep_latents, keep_texts
from benchmarks.machine import machine
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.files import read_json, write_json, write_text
from personalize.core import losses, rng
from personalize.core.samplers import ddim
from personalize.core.schedule import Schedule
from personalize.data.image_grid import grid
from personalize.evaluation import bootstrap, encoders
from personalize.evaluation.metrics import toyland_truth
from personalize.generation import sampling
from personalize.toyland.pretraining import networks
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import sample_scene

SCORED = ("class", "place", "accessory")
RATIOS = (0.01, 1.0, 100.0)  # signal to noise, at which errors of z0 are shown
NODES = 24  # timesteps at which errors are measured
SAMPLING = 16  # steps of DDIM
GUIDANCE = 2.2


@dataclass(frozen=True)
class Row:
    """One training. network: a class of `ablation_networks`."""

    prediction: str = "v_prediction"
    betas: str = "scaled_linear"
    zero_snr: bool = True
    min_snr: float = 0.0
    network: str = "Plain"

    def schedule(self) -> Schedule:
        return networks.forward_process(self.betas, self.prediction, self.zero_snr)


BASELINE = "v, scaled_linear, zero SNR"
ROWS = {
    BASELINE: Row(),
    "eps": Row("epsilon", zero_snr=False),
    "z0": Row("sample"),
    "no zero SNR": Row(zero_snr=False),
    "linear": Row(betas="linear"),
    "cosine": Row(betas="cosine"),
    "sigmoid": Row(betas="sigmoid"),
    "sigmoid-abar": Row(betas="sigmoid-abar"),
    "min-SNR 5": Row(min_snr=5.0),
    "self-conditioning": Row(network="SelfConditioned"),
    "linear attention": Row(network="LinearAttention"),
    "learned variance": Row(network="LearnedVariance"),
    "learned sinusoids": Row(network="LearnedSinusoids"),
}


def train(row: Row, batch_at, state: Path, size: Size, seed: int):
    """The network of a row with the EMA of its weights, and the median CPU seconds of a step."""
    torch.manual_seed(seed)
    network = getattr(ablation_networks, row.network)(row.schedule())
    stamps = [time.process_time()]

    def loss(step: int) -> Tensor:
        batch = batch_at(step)
        per_image = network.loss(batch, rng.generator(seed, "ablation/network", step))
        if row.min_snr:
            per_image = per_image * losses.min_snr_weight(network.schedule.snr(batch.t), row.min_snr, row.prediction)
        return per_image.mean()

    def say(step: int, value: float) -> None:
        stamps.append(time.process_time())
        if step % 50 == 0:
            print(f"{state.stem} {step}/{size.steps}  loss {value:.4f}", flush=True)

    train_stage(network, loss, state, steps=size.steps, lr=2e-3, muon=False, ema_decay=0.99, say=say, save_seconds=30)
    seconds = [b - a for a, b in itertools.pairwise(stamps)]
    return network.eval().requires_grad_(False), float(np.median(seconds)) if seconds else None


@dataclass(frozen=True)
class Judge:
    """Held-out scenes, their prompts' embeddings, and what reads images."""

    model: models.interface.LatentModel
    bench: toyland.Bench
    scenes: bits.Scenes
    text: Tensor
    rendered: Tensor
    others: Tensor

    def features(self, images: Tensor) -> Tensor:
        rows = self.bench.encoder.dino(images).token
        return rows * rows.shape[1] ** 0.5

    @torch.inference_mode()
    def bound(self, network) -> dict:
        """Of each scene bits of a latent ("own": with the variance that the network predicts); the error of z0 at RATIOS."""
        schedule, z0 = network.schedule, self.scenes.z0
        timesteps = sorted({*(round(x) - 1 for x in np.geomspace(1, schedule.T, NODES))})
        generators = sampling.image_generators(0, range(len(z0)), "ablation/bound")
        shown = partial(_at_one_timestep, network, self.text)
        predicted = bits.predictions(shown, schedule, z0, generators, timesteps)
        squares = torch.stack([(each - z0).double().square().flatten(1).mean(1) for each in predicted])
        squares = bits.filled(schedule, timesteps, squares)
        kinds = {
            kind: (bits.bound(schedule, squares, bits.square_of(self.scenes), kind).sum(0) - self.scenes.entropy).tolist()
            for kind in bits.VARIANCES
        }
        table = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        errors = {str(ratio): squares[int((table - ratio).abs().argmin())].mean().item() for ratio in RATIOS}
        if hasattr(network, "bound_terms"):
            prior = bits.bound(schedule, squares, bits.square_of(self.scenes), "analytic")[-1]
            kinds["own"] = (network.bound_terms(z0, self.text, timesteps) + prior - self.scenes.entropy).tolist()
        return {"rates": kinds, "errors": errors}

    @torch.inference_mode()
    def draw(self, network) -> Tensor:
        """(N,3,H,W) in [-1,1], of each scene's prompt."""
        empty, parts = self.model.encode_prompts([""])["text"], []
        for rows in torch.arange(len(self.text)).split(32):
            generators = sampling.image_generators(0, rows.tolist(), "ablation/draw")
            noise = rng.normal(generators, self.scenes.z0.shape[1:])
            guided = network.guided(self.text[rows], empty.expand(len(rows), -1, -1), GUIDANCE)
            parts.append(self.model.decode_latents(ddim(guided, noise, network.schedule, SAMPLING)))
        return torch.cat(parts)

    def images(self, images: Tensor) -> dict:
        reading = toyland_truth.read_images(self.bench.probe, images)
        right = toyland_truth.prompt_adherence(reading, self.scenes.prompts)
        excess = toyland.excess(self.features(images), self.rendered, self.others, parts=min(8, len(images) // 2))
        shares = {name: [None if x != x else x for x in right[name].tolist()] for name in SCORED}
        return {"right": shares, "kid": [excess.value, excess.error]}


def _at_one_timestep(network, text: Tensor, z_t: Tensor, t: int) -> Tensor:
    return network.denoise(z_t, torch.full((len(z_t),), t), text)


def open_judge(model, count: int) -> Judge:
    bench = toyland.Bench(model, encoders.load_encoders(model.folder, model.device), toyland_truth.load_probe(TOYLAND), count)
    scenes = bits.render(model, count)
    text = model.encode_prompts(scenes.prompts)["text"].clone()
    judge = Judge(model, bench, scenes, text, torch.empty(0), torch.empty(0))
    others = bench.render([sample_scene(bits.FIRST + 10_000 + k) for k in range(4 * count)])
    return Judge(model, bench, scenes, text, judge.features(scenes.images), judge.features(others))


def measure(work: Path, model, size: Size, jobs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, dict]]:
    """Name, seed and result of each job, in order; what `work` holds is read."""
    check_size(work, size)
    latents, texts = keep_latents(work / "latents.npy", model, size), keep_texts(work / "texts.npy", model, size)
    judge = None
    for name, seed in jobs:
        path = work / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
        if not path.exists():
            judge, row = judge or open_judge(model, size.pictures), ROWS[name]
            batch_at = partial(batch_of, row.schedule(), latents, texts, size, seed)
            network, seconds = train(row, batch_at, path.with_suffix(".safetensors"), size, seed)
            images = judge.draw(network)
            grid(sampling.to_pil(images[:32]), columns=8).save(path.with_suffix(".png"))
            write_json(path, {"seconds": seconds, **judge.bound(network), **judge.images(images)})
        yield name, seed, read_json(path)


def check_size(work: Path, size: Size) -> None:
    path = work / "size.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(size))
    elif read_json(path) != asdict(size):
        raise SystemExit(f"{work} was begun with {read_json(path)}, and this is {asdict(size)}. Take another folder.")


def line(name: str, seed: int, result: dict, baseline: dict) -> list[str]:
    """A row of the table; the interval is over scenes, of what it needs more than the baseline does for the same ones."""
    rate, reference = (np.array(each["rates"]["analytic"]) for each in (result, baseline))
    more = bits.said(torch.from_numpy(rate - reference), "+.3f") if result is not baseline else ""
    errors = [f"{result['errors'][str(ratio)]:.3f}" for ratio in RATIOS]
    shares = [f"{np.mean([x for x in result['right'][part] if x is not None]):.2f}" for part in SCORED]
    values = [x for part in zip(*(result["right"][part] for part in SCORED)) for x in [_mean(part)]]
    both = bootstrap.bootstrap_interval(values, [()] * len(values))
    kid = f"{result['kid'][0]:.3f} ± {result['kid'][1]:.3f}"
    seconds = "" if result["seconds"] is None else f"{result['seconds']:.2f}"
    named = name if not seed else f"{name}, seed {seed}"
    return [named, seconds, f"{rate.mean():.3f}", more, *errors, *shares, f"{both.low:.2f} to {both.high:.2f}", kid]


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([x for x in values if x is not None]))


def report(size: Size, results: Sequence[tuple[str, int, dict]]) -> list[str]:
    baseline = results[0][2]
    ratios = [f"error of z0 at SNR {ratio:g}" for ratio in RATIOS]
    head = ["", "s a step", "bits of a latent", "more than the first row", *ratios, *SCORED, "of the three, 95 %", "KID"]
    lines = bits.table(head, [line(*each, baseline) for each in results])
    learned = [(name, result["rates"]) for name, _, result in results if "own" in result["rates"]]
    for name, rates in learned:
        kinds = (f"{kind} {bits.said(torch.tensor(values))}" for kind, values in rates.items())
        lines += [f"Bits of a latent with {name}, by the variance of the reverse process: {'; '.join(kinds)}.", ""]
    return [f"{size.steps} steps of {size.batch}; {size.pictures} held-out scenes.", "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--row", action="append", choices=tuple(ROWS), help="those asked for, after the first; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="of the first row, whose spread says what chance does")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    names = [name for name in ROWS if name != BASELINE and name in (options.row or ROWS)]
    jobs = [*((BASELINE, seed) for seed in range(options.seeds)), *((name, 0) for name in names)]
    model = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None)
    lines = report(size, list(measure(options.work, model, size, jobs)))
    command = f"`python -m benchmarks.ablation WORK --steps {size.steps}`, {time.strftime('%Y-%m-%d')}, {machine()}"
    lines[:0] = [command, ""]
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
