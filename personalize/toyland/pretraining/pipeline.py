"""The stages of pretraining in order; each keeps its work in a file of the work folder, and reads that first."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from personalize.common.files import writing
from personalize.toyland import probes
from personalize.toyland.pretraining import collapse, networks, stages
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import PROBE_SEED, VIEWS, sample_scene, sample_subject

VAE_USAGE = "vae.json"  # in the work folder


def run_stages(work: Path, out: Path, settings, device: torch.device, say: Callable[[str], None]) -> Iterator[str]:
    """Each `next` does one stage and yields its name; the last one writes the base to `out`.

    settings: a `commands.pretrain.Pretrain`. Networks draw their first weights from torch's seed in this order.
    """
    images = render_all(work / "images.npy", sample_scene, settings.pictures, settings.size, say)
    pairs = render_all(work / "pairs.npy", _view_scene, settings.subjects * VIEWS, settings.size, say)
    probe_images = render_all(work / "probe_pictures.npy", _probe_scene, settings.probe_pictures, probes.SIZE, say)
    yield "world"
    vae = stages.vae(work, images, settings, device, say)
    latents, scale = stages.latents(work, images, vae, device, say)
    vae.register_to_config(scaling_factor=scale)
    collapse.keep_usage(work / VAE_USAGE, latents, say)
    yield "vae"
    tokenizer = stages.tokenizer(settings)
    clip = stages.clip(work, images, tokenizer, settings, device, say)
    text = networks.text_encoder(clip)
    yield "clip"
    identity = stages.identity(work, pairs, settings, device, say)
    yield "identity"
    unet = stages.unet(work, images, latents, tokenizer, text, settings, device, say)
    yield "unet"
    probe = probes.train_probe(work, probe_images, settings, device, say)
    yield "probes"
    stages.export(out, settings, tokenizer, vae, text, unet, clip, identity)
    probes.export(out / "probes", probe)


def _probe_scene(k: int):
    return sample_scene(PROBE_SEED + k)


def _view_scene(k: int):
    return sample_scene(k, subject=sample_subject(k // VIEWS))


def _render_bytes(scene_of: Callable, size: int, k: int) -> bytes:
    image, mask = draw_scene(scene_of(k), size, body=stages.BODY)
    image.putalpha(mask)
    return image.tobytes()


def render_all(path: Path, scene_of: Callable, count: int, size: int, say: Callable[[str], None]):
    """(count,size,size,4) uint8, colours and the subject's mask (`stages.masks`), drawn by all cores, kept in `path`."""
    if not path.exists():
        start = time.time()
        with multiprocessing.Pool() as pool:
            rows = pool.imap(partial(_render_bytes, scene_of, size), range(count), chunksize=200)
            array = np.stack([np.frombuffer(row, np.uint8).reshape(size, size, 4) for row in rows])
        with writing(path) as temporary:
            np.save(temporary, array)
        say(f"world: drew {count} images in {time.time() - start:.0f} s")
    return np.load(path, mmap_mode="r")
