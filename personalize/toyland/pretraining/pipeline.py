"""The stages of pretraining in order, by name; each keeps what the later ones need, in memory and in the work folder."""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from personalize.common.files import writing
from personalize.toyland import probes
from personalize.toyland.pretraining import networks, stages
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import PROBES, VIEWS, scene, subject


class Making:
    """settings: a `commands.pretrain.Pretrain`. The stages are its public methods but `export`."""

    def __init__(self, work: Path, settings, device: torch.device, say: Callable[[str], None]):
        self.work, self.settings, self.say = work, settings, say
        self.how = settings, device, say

    def world(self):
        s = self.settings
        self.images = _drawn(self.work / "images.npy", _scene, s.pictures, s.size, self.say)
        self.pairs = _drawn(self.work / "pairs.npy", _view, s.subjects * VIEWS, s.size, self.say)
        self.seen = _drawn(self.work / "probe_pictures.npy", _probed, s.probe_pictures, probes.SIZE, self.say)

    def vae(self):
        self.autoencoder = stages.vae(self.work, self.images, *self.how)
        self.latents, scale = stages.latents(self.work, self.images, self.autoencoder, *self.how[1:])
        self.autoencoder.register_to_config(scaling_factor=scale)

    def clip(self):
        self.words = stages.tokenizer(self.settings)
        self.pair = stages.clip(self.work, self.images, self.words, *self.how)
        self.text = networks.text_encoder(self.pair)

    def identity(self):
        self.eyes = stages.identity(self.work, self.pairs, *self.how)

    def unet(self):
        self.denoiser = stages.unet(self.work, self.images, self.latents, self.words, self.text, *self.how)

    def probes(self):
        self.probe = probes.train_probe(self.work, self.seen, *self.how)

    def export(self, out: Path):
        stages.export(out, self.settings, self.words, self.autoencoder, self.text, self.denoiser, self.pair, self.eyes)
        probes.export(out / "probes", self.probe)


def _scene(k: int):
    return scene(k)


def _probed(k: int):
    return scene(PROBES + k)


def _view(k: int):
    return scene(k, who=subject(k // VIEWS))


def _pixels(maker: Callable, size: int, k: int) -> bytes:
    picture, mask = draw_scene(maker(k), size, body=stages.BODY)
    picture.putalpha(mask)
    return picture.tobytes()


def _drawn(path: Path, maker: Callable, count: int, size: int, say: Callable[[str], None]):
    """(count,size,size,4) uint8, colours and the subject's mask (`stages.masks`), drawn by all cores, kept in `path`."""
    if not path.exists():
        began = time.time()
        with multiprocessing.Pool() as pool:
            rows = pool.imap(partial(_pixels, maker, size), range(count), chunksize=200)
            array = np.stack([np.frombuffer(row, np.uint8).reshape(size, size, 4) for row in rows])
        with writing(path) as temporary:
            np.save(temporary, array)
        say(f"world: drew {count} pictures in {time.time() - began:.0f} s")
    return np.load(path, mmap_mode="r")
