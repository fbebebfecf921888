"""`personalize pretrain`: makes Toyland's weights from nothing, in stages that each go on where they were stopped.

The base is a latent diffusion model (Rombach et al. 2112.10752) in small: a VAE on the ELBO, then a text encoder and a
U-Net on the DreamBooth core's own schedule and loss. Two encoders that only `evaluate` uses are trained beside it, and
the probes that read what is to be seen.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from personalize.errors import UserError, nearest
from personalize.files import write_json, writing
from personalize.settings import parsed, setting, valid, walk
from personalize.toyland import world


@dataclass(frozen=True)
class Pretrain:
    """How long each stage is; the defaults are for 2 CPU cores."""

    pictures: int = setting(40_000, "scenes drawn")
    subjects: int = setting(6_000, "subjects drawn for the identity encoder")
    vae_steps: int = setting(1_500, "steps of 32 pictures")
    clip_steps: int = setting(500, "steps of 128 pictures with captions")
    identity_steps: int = setting(300, "steps of 64 pairs")
    unet_steps: int = setting(2_100, "steps of 64 latents")
    probe_pictures: int = setting(30_000, "scenes drawn for the probes")
    probe_steps: int = setting(3_000, "steps of 64 pictures")
    seed: int = setting(0, "seed of all randomness")


def settings_from(texts: list[str]) -> Pretrain:
    """Settings from "key=value" texts. UserError for an unknown key or a wrong value."""
    known = {s.key: s for s in walk(Pretrain)}
    values = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in known:
            raise UserError(f"unknown setting {key!r}{nearest(key, known) or '.'} Known: {', '.join(known)}.")
        values[key] = valid(known[key], parsed(value, known[key].kind), "--set")
    return Pretrain(**values)


def run(work: Path, out: Path, settings: Pretrain, *, say: Callable[[str], None] = print) -> Path:
    """Every stage in order; what `work` already holds is kept. Returns `out`, a diffusers folder plus encoders/."""
    import torch

    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    images = _drawn(work / "images.npy", _scene, settings.pictures, say)
    pairs = _drawn(work / "pairs.npy", _view, settings.subjects * world.VIEWS, say)
    from personalize.toyland import stages

    words = stages.tokenizer(settings)
    vae = stages.vae(work, images, settings, device, say)
    clip = stages.clip(work, images, words, settings, device, say)
    identity = stages.identity(work, pairs, settings, device, say)
    latents, scale = stages.latents(work, images, vae, device, say)
    text, unet = stages.unet(work, latents, words, settings, device, say)
    vae.register_to_config(scaling_factor=scale)
    stages.export(out, words, vae, text, unet, clip, identity)
    probes(work, out, settings, say=say)
    write_json(out / "pretraining.json", asdict(settings) | {"device": device.type})
    return out


def probes(work: Path, out: Path, settings: Pretrain, *, say: Callable[[str], None] = print) -> None:
    """The truth probes alone, to `out`/probes: they need nothing of the base."""
    import torch

    from personalize.toyland import probes as stage

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = _drawn(work / "probe_pictures.npy", _probed, settings.probe_pictures, say)
    stage.export(out / "probes", stage.train(work, images, settings, device, say))


def _scene(k: int):
    return world.scene(k)


def _probed(k: int):
    return world.scene(world.PROBES + k)


def _view(k: int):
    return world.scene(k, who=world.subject(k // world.VIEWS))


def _pixels(scene) -> bytes:
    from personalize.toyland.drawing import draw

    return draw(scene)[0].tobytes()


def _job(task: tuple) -> bytes:
    maker, k = task
    return _pixels(maker(k))


def _drawn(path: Path, maker: Callable, count: int, say: Callable[[str], None]):
    """(count, 64, 64, 3) uint8, drawn by all cores, kept in `path`."""
    import numpy as np

    if not path.exists():
        began = time.time()
        with multiprocessing.Pool() as pool:
            rows = pool.imap(_job, ((maker, k) for k in range(count)), chunksize=200)
            array = np.stack([np.frombuffer(row, np.uint8).reshape(64, 64, 3) for row in rows])
        with writing(path) as temporary:
            np.save(temporary, array)
        say(f"drew {count} pictures in {time.time() - began:.0f} s")
    return np.load(path)
