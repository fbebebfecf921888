"""What `benchmarks.ablation` trains on: latents of scenes and the embeddings of their captions, drawn once for all its rows.

B images, L tokens, D text width; latents (N,2,C,h,w): posterior mean and deviation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from personalize.common.files import writing
from personalize.core import rng
from personalize.core.schedule import Schedule
from personalize.toyland.pretraining import pipeline, stages
from personalize.toyland.world.scenes import Scene, caption, sample_scene, sample_subject

FIRST = 10_000_000  # seed of the first scene: none that the VAE or the text encoder was trained on
VIEWS = 4  # scenes of each subject


@dataclass(frozen=True)
class Size:
    """How large an ablation is; a work folder keeps to one."""

    steps: int = 400
    batch: int = 16
    scenes: int = 12_000
    pictures: int = 64


class Batch(NamedTuple):
    z0: Tensor
    z_t: Tensor
    t: Tensor
    target: Tensor
    text: Tensor


def scene_of(k: int) -> Scene:
    return sample_scene(FIRST + k, subject=sample_subject(k // VIEWS))


def keep_latents(path: Path, model, size: Size) -> np.ndarray:
    """(N,2,C,h,w) float16: posterior means and deviations of the scenes, drawn and encoded where `path` is not there."""
    if not path.exists():
        images = pipeline.render_all(path.with_name("images.npy"), scene_of, size.scenes, model.size, print)
        parts = [
            torch.stack(model.encode_images(stages.pixels(images, rows, model.device)), 1).half().cpu().numpy()
            for rows in torch.arange(size.scenes).split(256)
        ]
        with writing(path) as temporary:
            np.save(temporary, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def rows_of(step: int, size: Size) -> Tensor:
    return stages.sample_rows(step, size.batch, size.scenes, seed=0, purpose="ablation")


def captions_of(step: int, size: Size) -> list[str]:
    """Those of a step, a tenth of them empty."""
    keep = torch.rand(size.batch, generator=rng.generator(0, "ablation/captions", step)) >= stages.CAPTION_DROPOUT
    rows = enumerate(zip(rows_of(step, size).tolist(), keep, strict=True))
    return [caption(scene_of(k), step * size.batch + i) if kept else "" for i, (k, kept) in rows]


def keep_texts(path: Path, model, size: Size) -> np.ndarray:
    """(steps,B,L,D) float16: the prompts of every step, encoded once for all rows."""
    if not path.exists():
        steps = (model.encode_prompts(captions_of(step, size))["text"].half().cpu().numpy() for step in range(size.steps))
        with writing(path) as temporary:
            np.save(temporary, np.stack(list(steps)))
    return np.load(path, mmap_mode="r")


def batch_of(schedule: Schedule, latents: np.ndarray, texts: np.ndarray, size: Size, seed: int, step: int) -> Batch:
    """The scenes are those of the step, whatever the seed; noise and timesteps are the seed's, whatever the row."""
    g = rng.generator(seed, "ablation/noise", step)
    mean, std = torch.from_numpy(latents[rows_of(step, size).numpy()].astype(np.float32)).unbind(1)
    z0 = mean + std * torch.randn(mean.shape, generator=g)
    eps, t = torch.randn(mean.shape, generator=g), stages.stratified_timesteps(len(z0), schedule.T, g)
    text = torch.from_numpy(texts[step].astype(np.float32))
    return Batch(z0, schedule.add_noise(z0, eps, t), t, schedule.target(z0, eps, t), text)
