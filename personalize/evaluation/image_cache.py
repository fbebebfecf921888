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
from personalize.common.prompts import fill, without_token, without_weights
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.untrusted import read_bytes
from personalize.evaluation.protocols import Protocol
from personalize.generation import sampling
from personalize.generation.attention_maps import has_maps, normalised
from personalize.generation.words import positions_of
from personalize.models.image_adapter import ImagePrompt
from personalize.models.interface import LatentModel

Job = tuple[str, int]  # prompt, number: the same number starts from the same noise for every prompt and model
LOOK_ALIKES = "base class"  # the kind of the images that show others of a subject's class
WHY = "unusable"  # name of the text chunk that says why
MAPPED = 4  # images of a set whose maps are kept
WORDS = 2  # that have one: the token and the class word
BLACK = 8  # of 255: an image with no channel above it shows nothing


def cache_folder(root: Path, name: str, model: LatentModel, *, seed: int, purpose: str, config: SamplingConfig) -> Path:
    """The folder in `root` for images of a model called `name`; drawn in any other way they have another one."""
    settings = config.decisive() | {"size": config.size or model.size, "seed": seed, "purpose": purpose}
    settings |= {"dtype": str(model.dtype)} | model.prompt_record
    return root / f"{name}-{key_of(settings)[:8]}"


def image_file(folder: Path, job: Job) -> Path:
    prompt, number = job
    return folder / f"{slug(prompt)[:60]}-{key_of({'prompt': prompt})[:6]}-{number:03d}.png"


def maps_file(folder: Path, job: Job) -> Path:
    return folder / "maps" / image_file(folder, job).name


def missing_images(folder: Path, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in dict.fromkeys(jobs) if not image_file(folder, job).exists()]


@dataclass(frozen=True)
class ImageSet:
    """N images of a subject by one model: those of its prompts, then those of its class's.

    kinds      "subject" and "class"; of the base, whose prompts do not say the token, "base" and "base class"
    templates  what `jobs` were filled in from; plain: their prompts without the token and without weights
    place      the folder that they lie in
    """

    kinds: list[str]
    templates: list[str]
    jobs: list[Job]
    plain: list[str]
    place: Path


def image_set(
    protocol: Protocol, place: Path, *, class_prompt: str, token: str, word: str, weighting: str = ""
) -> ImageSet:  # fmt: skip
    """What a protocol asks of a run whose subject is called `token`, or of the base, for which that is "".

    weighting: the model's, where prompts have weights.
    """
    kind, class_kind = ("subject", "class") if token else ("base", LOOK_ALIKES)
    wanted = [(kind, template, token, protocol.count) for template in protocol.templates]
    wanted.append((class_kind, class_prompt, "", protocol.class_count))
    rows = [(what, template, (fill(template, name, word), n)) for what, template, name, count in wanted for n in range(count)]
    kinds, templates, jobs = map(list, zip(*rows))
    plain = [without_token(without_weights(prompt, weighting), token) for prompt, _ in jobs]
    return ImageSet(kinds, templates, jobs, plain, place)


def of_kind(images: ImageSet, kind: str, called: str) -> ImageSet:
    """Those of a kind, which then have the kind `called`."""
    rows = [k for k, each in enumerate(images.kinds) if each == kind]
    columns = ([column[k] for k in rows] for column in (images.templates, images.jobs, images.plain))
    return ImageSet([called] * len(rows), *columns, images.place)


def generate_missing(
    model: LatentModel, images: ImageSet, *, seed: int, purpose: str, config: SamplingConfig, progress: Callable, what: str,
    steer: Callable[[Sequence[str]], Callable] | None = None, words: Sequence[str] = (), image: ImagePrompt | None = None,
) -> None:  # fmt: skip
    """Draws what is missing of an image set; what a stop interrupts is kept. progress: as `Terminal.progress`.

    steer: prompts -> what `sample_latents` takes by this name; image: as it takes it. words: of a few images the maps of these
    are kept too, where the base has maps.

    A batch of which an image is missing is drawn whole: images of other batches have other bits.
    """
    sweep(images.place)
    missing = set(missing_images(images.place, images.jobs))
    parts = sampling.sampling_batches(model, len(images.jobs), config)
    parts = [part for part in parts if any(images.jobs[k] in missing for k in part)]
    if not parts:
        return
    watched = missing.intersection(_mapped_jobs(images)) if words and has_maps(model, config) else ()
    done = len(images.jobs) - sum(map(len, parts))
    with progress(what, len(images.jobs), done=done, unit="images") as advance:
        for part in parts:
            texts, numbers = zip(*(images.jobs[k] for k in part))
            generators = sampling.image_generators(seed, list(numbers), purpose)
            maps, mapped = [], [k for k, place in enumerate(part) if images.jobs[place] in watched]
            options = {"steer": steer and steer(texts), "maps": maps, "mapped": mapped, "image": image}
            z0 = sampling.sample_latents(model, list(texts), generators, config, **options)
            for k, each in zip(mapped, maps, strict=True):  # before the images: one that is there is never drawn again
                _write_maps(maps_file(images.place, images.jobs[part[k]]), model, texts[k], words, each)
            for k, decoded in zip(part, model.decode_latents(z0).float().cpu(), strict=True):
                if images.jobs[k] in missing:
                    _write(image_file(images.place, images.jobs[k]), decoded)
            advance(len(part))


def load_images(images: ImageSet) -> tuple[list[Image.Image], list[str]]:
    """The images of an image set, and why each cannot be used: "not a number", "black", or "" where it can.

    UserError for a damaged file.
    """
    loaded, reasons = [], []
    for job in images.jobs:
        image = _read(image_file(images.place, job), "Delete it, and it is drawn again.")
        reasons.append(image.text.get(WHY, ""))
        loaded.append(image.convert("RGB"))
    return loaded, reasons


def load_maps(images: ImageSet) -> dict[Job, Tensor]:
    """The maps (WORDS,h,w), each from 0 to 1, that `generate_missing` has kept. UserError for a damaged file."""
    paths = {job: maps_file(images.place, job) for job in _mapped_jobs(images)}
    read = {job: _read(path, "Delete it; the report then has no map of it.") for job, path in paths.items() if path.exists()}
    return {job: torch.from_numpy(np.array(image)).unflatten(0, (WORDS, -1)) / 255 for job, image in read.items()}


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


def _read(path: Path, remedy: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(read_bytes(path, "image")), formats=("PNG",)) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise UserError(f"{path} cannot be read: {error}. {remedy}") from error


def _mapped_jobs(images: ImageSet) -> list[Job]:
    """The first image of a few of a subject's prompts, from all over the list."""
    firsts = [job for job, kind in zip(images.jobs, images.kinds) if kind == "subject" and job[1] == 0]
    count = min(MAPPED, len(firsts))
    return [firsts[k * len(firsts) // count] for k in range(count)]


def _write_maps(path: Path, model: LatentModel, prompt: str, words: Sequence[str], maps: Tensor) -> None:
    """Those of the words below each other, 8 bits each; nothing for a prompt that does not say them all."""
    tokens = [positions_of(model, prompt, word)[0] for word in words]
    if all(tokens):
        each = normalised(torch.stack([maps[places].mean(0) for places in tokens])).flatten(0, 1)
        with writing(path) as temporary:
            Image.fromarray((each * 255).round().byte().cpu().numpy()).save(temporary)
