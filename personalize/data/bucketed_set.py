"""What training sees where photos keep their shape: a TrainingSet for each bucket, of which every step takes one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from personalize.common.image_size import Size
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT
from personalize.data import buckets
from personalize.data.batch import Batch
from personalize.data.crops import Photo
from personalize.data.inpainting_masks import encode_versions
from personalize.data.subjects import Subject
from personalize.data.training_set import PriorSet, TrainingSet, build_training_set, class_words, read_prompts
from personalize.models.interface import LatentModel


@dataclass
class BucketedSet:
    """As a TrainingSet; photos and prompts are those of all parts, the prompts of classes last. A batch is of one size."""

    model: LatentModel
    recipe: Recipe
    parts: dict[Size, TrainingSet]
    photos: list[Photo]
    prompts: list[str]
    cut_mix: None = None  # two photos of one shape: `load_subjects` refuses it

    @property
    def counts(self) -> list[int]:
        """Photos in each bucket."""
        return [len(part.photos) for part in self.parts.values()]

    @property
    def steps_per_batch(self) -> tuple[int, int]:
        return next(iter(self.parts.values())).steps_per_batch

    @property
    def prior(self) -> PriorSet | None:
        """Of the first bucket; all have one, or none."""
        return next(iter(self.parts.values())).prior

    @property
    def prior_count(self) -> int:
        return sum(part.prior_count for part in self.parts.values())

    @property
    def largest_step(self) -> int:
        sizes = list(self.parts)
        largest = max(range(len(sizes)), key=lambda k: sizes[k][0] * sizes[k][1])
        steps = range(len(self.photos))  # in which each bucket has its turns
        return next(step for step in steps if buckets.turn(self.counts, step, seed=self.recipe.seed)[0] == largest)

    def at(self, step: int) -> Batch:
        """The global batch of a step, of the bucket whose turn it is."""
        bucket, visit = buckets.turn(self.counts, step, seed=self.recipe.seed)
        return list(self.parts.values())[bucket].at(step, visit)

    def release(self) -> None:
        """Frees the networks whose answers are all here."""
        next(iter(self.parts.values())).release()


def build_data(
    model: LatentModel, recipe: Recipe, subjects: list[Subject], *, priors: Mapping[str, Tensor], text_trains: bool,
    class_pixels: Callable[[str, int], Tensor] | None = None, encode: Callable = encode_versions, progress=SILENT.progress,
) -> TrainingSet | BucketedSet:  # fmt: skip
    """As `build_training_set`, but with class images by the name of their `ClassSet`, in one size or in those of buckets."""
    options = {"text_trains": text_trains, "encode": encode, "progress": progress}
    if recipe.photos.shape == "square":
        return build_training_set(model, recipe, subjects, priors=priors, class_pixels=class_pixels, **options)
    px = {"edge": recipe.photos.size or model.size, "step": 8 * model.downscale}
    groups, sets = buckets.by_size(subjects, recipe, **px), buckets.class_sets(subjects, recipe, **px)
    names = {(one.word, one.size): one.name for one in sets}
    # of all buckets first: the text encoders are dropped before the first photo is encoded
    said = {size: read_prompts(model, recipe, group, text_trains=text_trains) for size, group in groups.items()}
    parts, counts = {}, [sum(len(s.photos) for s in group) for group in groups.values()]
    for (size, group), count in zip(groups.items(), buckets.shares(recipe.prior.count, counts), strict=True):
        parts[size] = build_training_set(
            model, replace(recipe, prior=replace(recipe.prior, count=count if recipe.prior.count else 0)), group,
            priors={word: priors[names[word, size]] for word in class_words(group)} if priors else {},
            class_pixels=class_pixels and (lambda word, i, size=size: class_pixels(names[word, size], i)),
            size=size, said=said[size], **options,
        )  # fmt: skip
    photos = [photo for part in parts.values() for photo in part.photos]
    prompts = [text for part in parts.values() for text in part.prompts[: len(part.photos)]]
    prompts += [fill(recipe.prior.prompt, "", word) for word in class_words(subjects)]
    return BucketedSet(model, recipe, parts, photos, prompts)


def size_lines(data: TrainingSet | BucketedSet) -> Sequence[str]:
    """What a run says of its buckets: how many photos are of which size."""
    if not isinstance(data, BucketedSet):
        return []
    each = ", ".join(f"{width}×{height} ({len(part.photos)})" for (width, height), part in data.parts.items())
    return [f"photos keep their shape, in {len(data.parts)} sizes: {each}; each batch is of one size"]
