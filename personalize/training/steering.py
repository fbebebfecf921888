"""What `generate` and `evaluate` draw towards besides the prompt: a subject, by a classifier; a text or an image, by CLIP.

B images, C latent channels, h w latent size, E dimensions of CLIP.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.files import key_of
from personalize.common.image_size import as_size
from personalize.common.prompts import without_token, without_weights
from personalize.common.recipe import Recipe, recipe_from_dict
from personalize.common.terminal import Terminal
from personalize.core.guidance import Guided
from personalize.core.steering import STEERING, Gradient, ascent
from personalize.data import class_images
from personalize.data.crops import Crop, Photo, image_tensor, largest_box
from personalize.data.photos import load_photos
from personalize.data.training_set import encode_photos
from personalize.evaluation.encoders import Clip, load_clip
from personalize.models.interface import LatentModel
from personalize.training import load_run, noisy_classifier
from personalize.training.noisy_classifier import NoisyClassifier

FILE = "like.safetensors"  # in a run
DECODED = 512**2  # px that are decoded and differentiated at once
CLASS_IMAGES = 100  # drawn where a recipe has none
Wrap = Callable[[Guided, slice], Guided]


class Subject(NamedTuple):
    """Whom images are to be like. recipe: how its photos are cut and its class images drawn.

    hashes: of the photos; photos: loads them, those that were held out last; file: of the classifier, by its key.
    """

    recipe: Recipe
    class_word: str
    prior: Path | None
    hashes: list[str]
    photos: Callable[[], tuple[list[Photo], list[Photo]]]
    file: Callable[[Path, str], Path]


@dataclass(frozen=True)
class Steering:
    """parts: texts of B images -> what wraps their guidance; record: what images say of it; towards: the metric it raises."""

    parts: Sequence[Callable[[list[str]], Wrap]]
    record: dict
    towards: str = ""

    def of(self, texts: Sequence[str]) -> Wrap:
        """As `sample_latents` takes it, for images of these prompts."""
        wraps = [part(list(texts)) for part in self.parts]

        def steer(guided: Guided, rows: slice) -> Guided:
            for wrap in wraps:
                guided = wrap(guided, rows)
            return guided

        return steer


def of_run(folder: Path, manifest: dict, token: str = "") -> Subject:
    """A run's subject, its first without a token."""
    entry, recipe = load_run.run_subject(manifest, token), recipe_from_dict(manifest["recipe"], str(folder))
    hashes = [row["sha256"] for row in entry["photos"] if not row.get("held_out")]
    first = entry["token"] == manifest["subjects"][0]["token"]
    name = FILE if first else f"like-{key_of({'token': entry['token']})[:6]}.safetensors"
    prior = Path(entry["prior_folder"]) if entry["prior_folder"] else None
    return Subject(recipe, entry["class"], prior, hashes, lambda: load_run.run_photos(entry), lambda _, key: folder / name)


def of_photos(photos: Path | str, class_word: str, recipe: Recipe, size: int) -> Subject:
    """Photos that no run was trained on. The classifier lies beside the class images."""
    if not class_word.strip():
        raise UserError("what is on the photos? Give the class word too, as in: --photos my_dog/ --class dog")
    loaded, _ = load_photos(photos, min_size=recipe.photos.min_size or size)
    hashes = [photo.sha256 for photo in loaded]
    return Subject(recipe, class_word, None, hashes, lambda: (loaded, []), lambda prior, key: prior / f"like-{key}.safetensors")


def prepare(
    model: LatentModel, recipe: Recipe, subject: Subject | None, *, tokens: Sequence[str] = (), priors: Path, screen: Terminal
) -> Steering | None:
    """What the recipe's draw.like, draw.guide_clip and draw.guide_image ask for; None where nothing is.

    Call it while `model` is the bare base, which draws the class images. tokens: words of a prompt that CLIP cannot know.
    UserError for what is missing.
    """
    draw, parts, record, towards = recipe.draw, [], {}, ""
    if draw.like:
        if subject is None:
            raise UserError("like what? Name a run by --run, or give photos: --photos my_dog/ --class dog")
        network, key = subject_classifier(model, subject, priors=priors, screen=screen)
        gradient = noisy_classifier.class_gradient(network, noisy_classifier.SUBJECT)
        parts.append(lambda texts: lambda guided, rows: STEERING["classified"](guided, model.schedule, gradient, draw.like))
        record |= {"like": draw.like, "classifier": key}
    if draw.guide_clip or draw.guide_image:
        part, said, towards = _clip_part(model, recipe, tokens, screen)
        parts.append(part)
        record |= said
    return Steering(parts, record, towards) if parts else None


def subject_classifier(model: LatentModel, subject: Subject, *, priors: Path, screen: Terminal) -> tuple[NoisyClassifier, str]:
    """The classifier of a subject against class images, trained where no file has its key -> (it, key)."""
    recipe, word = subject.recipe, subject.class_word
    if not recipe.prior.count:
        recipe = replace(recipe, prior=replace(recipe.prior, count=CLASS_IMAGES))
    is_square = recipe.photos.shape == "square"  # the classifier sees squares, whatever the run was trained on
    there = is_square and subject.prior and (subject.prior / "manifest.json").exists()
    settings = class_images.class_image_settings(model, recipe, word)
    prior = subject.prior if there else class_images.folder_for(priors, settings)
    settings = class_images.settings_in(prior, model, recipe, word) if there else settings
    settings = {name: value for name, value in settings.items() if name != "base"}
    crop = [recipe.photos.crop, recipe.photos.size or model.size]
    trained_on = {"photos": subject.hashes, "crop": crop, "class": settings, "base": model.fingerprint, "seed": recipe.seed}
    key = key_of(trained_on)[:12]
    file = subject.file(prior, key)
    if network := noisy_classifier.load_classifier(file, key, model.device):
        return network, key
    photos, held_out = subject.photos()
    if not there:
        prior, _ = class_images.complete_set(model, recipe, word, root=priors, folder=None, screen=screen)
    latents = class_images.class_latents(prior, len(class_images.present_images(prior))).to(model.device)
    network = _train(model, recipe, photos, held_out, latents, screen)
    noisy_classifier.save_classifier(file, network, key)
    return network, key


def _train(
    model: LatentModel, recipe: Recipe, photos: list[Photo], held_out: list[Photo], latents: Tensor, screen: Terminal
) -> NoisyClassifier:
    mean, std = (torch.cat(part) for part in zip(*(encode_photos(model, recipe, [photo], 0)[:2] for photo in photos)))
    begun, steps = time.monotonic(), noisy_classifier.STEPS
    with screen.progress("classifier", steps, unit="steps") as advance:
        groups, rows = [(latents, None), (mean, std)], noisy_classifier.ROWS
        options = {"rows": rows, "seed": recipe.seed, "steps": steps, "advance": advance}
        network = noisy_classifier.train_classifier(groups, model.schedule, **options)

    def share(z0: Tensor) -> str:
        return f"{noisy_classifier.log_probability(network, z0, 0, noisy_classifier.SUBJECT).exp().mean().item():.2f}"

    seconds = time.monotonic() - begun
    line = f"--like: {len(photos)} photos against {len(latents)} class images, {steps} steps in {seconds:.0f} s"
    line += f"; it takes photos for the subject with p = {share(mean)}, class images with {share(latents)}"
    if held_out:
        line += f", held-out photos with {share(torch.cat([encode_photos(model, recipe, [p], 0)[0] for p in held_out]))}"
    screen.say(line)
    return network


def _clip_part(
    model: LatentModel, recipe: Recipe, tokens: Sequence[str], screen: Terminal
) -> tuple[Callable[[list[str]], Wrap], dict, str]:
    """CLIP guidance -> (texts -> wrap, its record, the metric it optimises)."""
    draw, target = recipe.draw, None
    clip = load_clip(model.folder, model.device, clip=recipe.evaluate.clip)
    record = {"guide_clip": draw.guide_clip or 1.0, "guide_encoder": clip.name, "guide_every": draw.guide_every}
    if draw.guide_image:
        (image,), _ = load_photos([draw.guide_image], min_size=1)
        pixels = image_tensor([Crop(image, largest_box(image))], min(as_size(draw.size or model.size)))  # CLIP sees a square
        with torch.no_grad():
            target = F.normalize(clip.image(pixels), dim=-1)
        record["guide_image"] = {"file": image.name, "sha256": image.sha256}
    towards = "clip_i" if draw.guide_image else "clip_t"
    evaluations = -(-draw.steps // draw.guide_every)
    screen.say(
        f"CLIP guidance decodes each image at {evaluations} of {draw.steps} steps, and goes back through the decoder; "
        "--guide-every 2 does so half as often"
    )

    def part(texts: list[str]) -> Wrap:
        texts = [without_weights(text, model.weighting) for text in texts]
        for token in tokens:
            texts = [without_token(text, token) for text in texts]
        with torch.no_grad():  # not in inference mode, where sampling is: a gradient needs them
            targets = F.normalize(clip.text(texts), dim=-1) if target is None else target.expand(len(texts), -1)

        def wrap(guided: Guided, rows: slice) -> Guided:
            gradient = clip_gradient(model, clip, targets[rows])
            return STEERING["toward"](guided, model.schedule, gradient, record["guide_clip"], every=draw.guide_every)

        return wrap

    return part, record, towards


def clip_gradient(model: LatentModel, clip: Clip, targets: Tensor) -> Gradient:
    """Unit rows (B,E) -> the gradient of logit scale · cosine(CLIP of the decoded z0, target), a few images at a time."""

    def gradient(z0: Tensor, t: float) -> Tensor:
        count = max(1, DECODED // (z0.shape[-2] * z0.shape[-1] * model.downscale**2))

        def climb(rows: slice) -> Tensor:
            def log_p(z: Tensor, t: float) -> Tensor:
                return clip.scale * (F.normalize(clip.image(model.decode_unclamped(z)), dim=-1) * targets[rows]).sum(-1)

            return ascent(log_p)(z0[rows], t)

        return torch.cat([climb(slice(k, k + count)) for k in range(0, len(z0), count)])

    return gradient
