"""Aspect buckets: the sizes photos are trained in where they keep their shape, and which of them a step takes.

A bucket is a width and a height in steps of what the base needs, of at most the square's area, from half its edge to twice it
(for 512 px these are kohya's `make_bucket_resolutions`). A photo is in the bucket that cuts least off it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from personalize.common.errors import UserError
from personalize.common.image_size import Size, as_setting, in_words
from personalize.common.recipe import Recipe
from personalize.core.rng import generator
from personalize.data.crops import Photo, largest_sides, share_kept
from personalize.data.subjects import Subject

SHAPES = ("square", "buckets")  # of photos.shape


def bucket_sizes(edge: int, step: int) -> list[Size]:
    """The buckets of a base that is trained at `edge` px, a multiple of `step`: each width with the largest height that
    keeps to the area, and each of these upright too.
    """
    most = min(edge // step * 2, (edge // step) ** 2)
    least = max(1, edge // step // 2)
    sizes = {(edge, edge)}
    for across in range(least, most + 1):
        down = min(most, (edge // step) ** 2 // across)
        if down >= least:
            sizes |= {(across * step, down * step), (down * step, across * step)}
    return sorted(sizes)


def nearest_bucket(size_wh: Size, sizes: Sequence[Size]) -> Size:
    """The bucket that cuts least off a photo; of several the largest."""
    return max(sizes, key=lambda size: (share_kept(size_wh, size), size[0] * size[1], size))


def sizes_of(photos: Sequence[Photo], shape: str, *, edge: int, step: int) -> list[Size]:
    """The size each photo is trained in by `photos.shape`, at `edge` px or its area, in steps of `step` px."""
    if shape == "square":
        return [(edge, edge)] * len(photos)
    sizes = bucket_sizes(edge, step)
    return [nearest_bucket(photo.size, sizes) for photo in photos]


def require_pixels(photos: Sequence[Photo], sizes: Sequence[Size]) -> None:
    """UserError for a photo that would be enlarged to fill its bucket."""
    for photo, size in zip(photos, sizes, strict=True):
        if any(side < edge for side, edge in zip(largest_sides(photo.size, size), size, strict=True)):
            raise UserError(
                f"{photo.path} is {in_words(photo.size)} px, and its bucket of {in_words(size)} px would enlarge it. Use a "
                f"larger photo, or --set photos.min_size={min(photo.size)}."
            )


def by_size(subjects: Sequence[Subject], recipe: Recipe, *, edge: int, step: int) -> dict[Size, list[Subject]]:
    """The subjects that have photos of a size, with these alone, for each size that there is."""
    sizes = [sizes_of(subject.photos, recipe.photos.shape, edge=edge, step=step) for subject in subjects]
    groups = {}
    for size in sorted({size for each in sizes for size in each}):
        mine = [[p for p, own in zip(s.photos, each) if own == size] for s, each in zip(subjects, sizes, strict=True)]
        groups[size] = [replace(s, photos=photos) for s, photos in zip(subjects, mine, strict=True) if photos]
    return groups


def turn(counts: Sequence[int], step: int, *, seed: int) -> tuple[int, int]:
    """Photos in each bucket, a step 0, 1, 2, …  ->  the bucket it takes, and how many steps before it took that one.

    In each row of sum(counts) steps, in an order of its own, a bucket has as many steps as photos. A step has the same number
    of photos in any bucket, so that after each row every photo was seen equally often, also one that is alone in its bucket.
    A function of its arguments alone, as `epoch_order` is, which walks over the photos of a bucket.
    """
    row, place = divmod(step, sum(counts))
    owners = [k for k, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(owners), generator=generator(seed, "order/bucket", row)).tolist()
    taken = [owners[i] for i in order[: place + 1]]
    return taken[-1], row * counts[taken[-1]] + taken.count(taken[-1]) - 1


def shares(total: int, counts: Sequence[int]) -> list[int]:
    """`total` things shared out like `counts`, by largest remainders, but one each at least."""
    whole = sum(counts)
    given = [max(1, total * count // whole) for count in counts]
    while sum(given) < total:
        given[max(range(len(counts)), key=lambda k: total * counts[k] / whole - given[k])] += 1
    return given


@dataclass(frozen=True)
class ClassSet:
    """Class images of a class word in one size; `name` is the word alone where all photos are cut to a square."""

    name: str
    word: str
    size: Size
    count: int


def class_sets(subjects: Sequence[Subject], recipe: Recipe, *, edge: int, step: int) -> list[ClassSet]:
    """The class images of a run: `prior.count` of each class word, in the shapes of its photos and as often; the shape of
    most photos first.
    """
    groups, sets = by_size(subjects, recipe, edge=edge, step=step), []
    for word in dict.fromkeys(subject.class_word for subject in subjects):
        counts = {size: sum(len(s.photos) for s in group if s.class_word == word) for size, group in groups.items()}
        sizes = sorted((size for size in counts if counts[size]), key=lambda size: -counts[size])
        named = [word] if recipe.photos.shape == "square" else [f"{word} {as_setting(size)}" for size in sizes]
        parts = shares(recipe.prior.count, [counts[size] for size in sizes])
        sets += [ClassSet(*each) for each in zip(named, [word] * len(sizes), sizes, parts, strict=True)]
    return sets
