"""What `evaluate` draws: a subject's images by the base, by the run, and by the run that is told photos beside each prompt."""

from dataclasses import dataclass, replace
from pathlib import Path

from personalize.commands.told_photos import METHOD
from personalize.common.files import key_of, slug
from personalize.common.recipe import Recipe
from personalize.common.terminal import Terminal
from personalize.evaluation import image_cache
from personalize.evaluation.protocols import Protocol, protocol
from personalize.generation import students
from personalize.models.image_adapter import ImagePrompt
from personalize.models.interface import LatentModel
from personalize.training import steering, validation


@dataclass(frozen=True)
class Job:
    """A subject of a run at one of its checkpoints ("": its result), by a protocol.

    told: the record of photos that the run is told beside each prompt, {} without.
    """

    folder: Path
    manifest: dict
    subject: dict
    checkpoint: str
    protocol: Protocol
    recipe: Recipe
    told: dict

    @property
    def out(self) -> Path:
        several = len(self.manifest["subjects"]) > 1
        return self.folder / "evaluation" / (slug(self.subject["token"]) if several else "") / self.beside

    @property
    def beside(self) -> str:
        """What names the images of a run that is told photos."""
        return f"{METHOD}-{key_of(self.told)[:8]}" if self.told else ""


def drawn_set(
    model: LatentModel, job: Job, name: str, screen: Terminal, steer: steering.Steering | None = None
) -> image_cache.ImageSet:
    """The images that the protocol wants of the run put into the model, or where `name` is "" of the base, all drawn."""
    image_set, options = _wanted(model, job, name, steer)
    image_cache.generate_missing(model, image_set, **options, progress=screen.progress, what=_what(name))
    return image_set


def drawn_beside(
    model: LatentModel, job: Job, name: str, image: ImagePrompt | None, screen: Terminal, steer: steering.Steering | None
) -> list[image_cache.ImageSet]:
    """The same of the run that is told `image` (None at scale 0) with the subject's prompts: its class images, drawn without
    it, and the subject's."""
    whole, options = _wanted(model, job, name, steer)
    classes, subject = (image_cache.of_kind(whole, kind, kind) for kind in ("class", "subject"))
    subject = replace(subject, place=whole.place.with_name(f"{whole.place.name}-{job.beside}"))
    for image_set, photos in ((classes, None), (subject, image)):
        if image_set.jobs:
            options |= {"image": photos, "progress": screen.progress, "what": _what(name)}
            image_cache.generate_missing(model, image_set, **options)
    return [image_set for image_set in (classes, subject) if image_set.jobs]


def every_subject(job: Job, model: LatentModel) -> list[Job]:
    """All subjects of the run, by the same protocol."""
    settings = job.recipe.evaluate
    return [
        replace(job, subject=subject, protocol=protocol(settings, model.has_world, subject["class"]))
        for subject in job.manifest["subjects"]
    ]


def _what(name: str) -> str:
    return f"drawing by the {'run' if name else 'base'}"


def _wanted(model: LatentModel, job: Job, name: str, steer: steering.Steering | None) -> tuple[image_cache.ImageSet, dict]:
    """The image set, and how `generate_missing` is to draw it."""
    root = job.folder / "evaluation" / "pictures" if name else job.folder.parent / validation.BASE_IMAGES
    config, student = validation.sampling_config(job.recipe), job.manifest.get("student")
    config = students.teacher_sampling(config, student) if student and not name else config
    options = {"seed": job.recipe.seed, "purpose": "evaluate", "config": config}
    drawn_by = f"{name or validation.base_cache_name(model)}{'-' + key_of(steer.record)[:6] if steer else ''}"
    folder = image_cache.cache_folder(root, drawn_by, model, **options)
    token, word = job.subject["token"] if name else "", job.subject["class"]
    texts = {"class_prompt": job.recipe.prior.prompt, "token": token, "word": word, "weighting": model.weighting}
    options |= {"words": (token, word)} if token else {}
    options |= {"steer": steer.of} if steer else {}
    return image_cache.image_set(job.protocol, folder, **texts), options
