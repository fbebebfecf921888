"""Images that are drawn once and kept: a folder for what drew them, a file for each prompt and number.

What was drawn is 8 bits a channel, as people see it; scores are of that, so a kept image scores as a fresh one.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import key_of, slug, sweep, writing
from personalize.common.prompts import fill, without_token
from personalize.common.recipe import SamplingConfig
from personalize.common.untrusted import read_bytes
from personalize.evaluation.protocols import Protocol
from personalize.generation import sampling
from personalize.models.interface import LatentModel

Job = tuple[str, int]  # prompt, number: the same number starts from the same noise for every prompt and model
LOOK_ALIKES = "base class"  # the kind of the images that show others of a subject's class
WHY = "unusable"  # name of the text chunk that says why
BLACK = 8  # of 255: an image with no channel above it shows nothing


def cache_folder(root: Path, name: str, model: LatentModel, *, seed: int, purpose: str, config: SamplingConfig) -> Path:
    """The folder in `root` for images of a model called `name`; drawn in any other way they have another one."""
    settings = config.decisive() | {"size": config.size or model.size, "seed": seed, "purpose": purpose}
    settings["dtype"] = str(model.dtype)
    return root / f"{name}-{key_of(settings)[:8]}"


def image_file(folder: Path, job: Job) -> Path:
    prompt, number = job
    return folder / f"{slug(prompt)[:60]}-{key_of({'prompt': prompt})[:6]}-{number:03d}.png"


def missing_images(folder: Path, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in dict.fromkeys(jobs) if not image_file(folder, job).exists()]


@dataclass(frozen=True)
class ImageSet:
    """N images of a subject by one model: those of its prompts, then those of its class's.

    kinds      "subject" and "class"; of the base, whose prompts do not say the token, "base" and "base class"
    templates  what `jobs` were filled in from; plain: their prompts without the token
    place      the folder that they lie in
    """

    kinds: list[str]
    templates: list[str]
    jobs: list[Job]
    plain: list[str]
    place: Path


def image_set(protocol: Protocol, place: Path, *, class_prompt: str, token: str, word: str) -> ImageSet:
    """What a protocol asks of a run whose subject is called `token`, or of the base, for which that is ""."""
    kind, class_kind = ("subject", "class") if token else ("base", LOOK_ALIKES)
    wanted = [(kind, template, token, protocol.count) for template in protocol.templates]
    wanted.append((class_kind, class_prompt, "", protocol.class_count))
    rows = [(what, template, (fill(template, name, word), n)) for what, template, name, count in wanted for n in range(count)]
    kinds, templates, jobs = map(list, zip(*rows))
    return ImageSet(kinds, templates, jobs, [without_token(prompt, token) for prompt, _ in jobs], place)


def generate_missing(
    model: LatentModel, images: ImageSet, *, seed: int, purpose: str, config: SamplingConfig, progress: Callable, what: str,
    steer: Callable[[Sequence[str]], Callable] | None = None,
) -> None:  # fmt: skip
    """Draws what is missing of an image set; what a stop interrupts is kept. progress: as `Terminal.progress`.

    steer: prompts -> what `sample_latents` takes by this name.

    A batch of which an image is missing is drawn whole: images of other batches have other bits.
    """
    sweep(images.place)
    missing = set(missing_images(images.place, images.jobs))
    parts = sampling.sampling_batches(model, len(images.jobs), config)
    parts = [part for part in parts if any(images.jobs[k] in missing for k in part)]
    if not parts:
        return
    done = len(images.jobs) - sum(map(len, parts))
    with progress(what, len(images.jobs), done=done, unit="images") as advance:
        for part in parts:
            texts, numbers = zip(*(images.jobs[k] for k in part))
            generators = sampling.image_generators(seed, list(numbers), purpose)
            z0 = sampling.sample_latents(model, list(texts), generators, config, steer=steer and steer(texts))
            for k, image in zip(part, model.decode_latents(z0).float().cpu(), strict=True):
                if images.jobs[k] in missing:
                    _write(image_file(images.place, images.jobs[k]), image)
            advance(len(part))


def load_images(images: ImageSet) -> tuple[list[Image.Image], list[str]]:
    """The images of an image set, and why each cannot be used: "not a number", "black", or "" where it can.

    UserError for a damaged file.
    """
    loaded, reasons = [], []
    for job in images.jobs:
        path = image_file(images.place, job)
        try:
            with Image.open(io.BytesIO(read_bytes(path, "image")), formats=("PNG",)) as image:
                reasons.append(image.text.get(WHY, ""))
                loaded.append(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise UserError(f"{path} cannot be read: {error}. Delete it, and it is drawn again.") from error
    return loaded, reasons


def load_tensors(images: Sequence[Image.Image]) -> Tensor:
    """B images of one size -> (B,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def _write(path: Path, image: Tensor) -> None:
    info, why = PngInfo(), "" if image.isfinite().all() else "not a number"
    (picture,) = sampling.to_pil(torch.full_like(image[None], -1.0) if why else image[None])
    if not why and np.asarray(picture).max() < BLACK:
        why = "black"
    if why:
        info.add_text(WHY, why)
    with writing(path) as temporary:
        picture.save(temporary, pnginfo=info)
