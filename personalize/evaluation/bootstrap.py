"""How sure a mean is: a cluster bootstrap, and differences paired image by image.

Images of one prompt are alike, and prompts of one subject too, so whole clusters are drawn again, then what is in
them (Davison & Hinkley 1997, 3.8). Values are one an image; `clusters` are its labels from the outside in, such as
(subject, prompt). Every cluster of a level weighs the same however many images it has. NaN is "not measured".
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

REPLICATES = 2000
LEVEL = 0.95

Labels = tuple[Hashable, ...]


@dataclass(frozen=True)
class Interval:
    """mean, its standard error, and the bounds that 95 % of the replicates lie in; above: share of them above 0."""

    mean: float
    se: float
    low: float
    high: float
    above: float

    def row(self) -> dict[str, float]:
        return asdict(self)


def mean(values: Sequence[float], clusters: Sequence[Labels]) -> float | None:
    """The mean over clusters of their means, down to images; None where nothing was measured."""
    tree = _tree(values, clusters)
    return None if tree is None else _mean(tree)


def bootstrap_interval(values: Sequence[float], clusters: Sequence[Labels], *, seed: int = 0) -> Interval | None:
    """N values and their clusters -> Interval of the mean; None where nothing was measured."""
    tree = _tree(values, clusters)
    if tree is None:
        return None
    means = _resampled(tree, np.random.default_rng(seed), REPLICATES)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    above = (means > 0).mean() + 0.5 * (means == 0).mean()
    return Interval(_mean(tree), float(means.std()), float(low), float(high), float(above))


def paired_difference(a: Mapping[Labels, float], b: Mapping[Labels, float], *, seed: int = 0) -> Interval | None:
    """Interval of the mean of a - b over the images that both have; its `above` is the probability that a beats b.

    Keys are an image's labels from the outside in and last its number, such as (prompt, seed).
    """
    both = [key for key in a if key in b]
    return bootstrap_interval([a[key] - b[key] for key in both], [key[:-1] for key in both], seed=seed)


def _tree(values: Sequence[float], clusters: Sequence[Labels]):
    """Nested dicts of clusters with arrays of values at their ends; None where there is no value."""
    assert len(values) == len(clusters), (len(values), len(clusters))
    rows = [(float(v), labels) for v, labels in zip(values, clusters, strict=True) if v is not None and v == v]
    return _grouped(rows) if rows else None


def _grouped(rows: list[tuple[float, Labels]]):
    if not rows[0][1]:
        return np.array([value for value, _ in rows])
    groups: dict[Hashable, list] = {}
    for value, labels in rows:
        groups.setdefault(labels[0], []).append((value, labels[1:]))
    return [_grouped(group) for group in groups.values()]


def _mean(tree) -> float:
    return float(tree.mean()) if isinstance(tree, np.ndarray) else float(np.mean([_mean(child) for child in tree]))


def _resampled(tree, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` means of a tree whose children were drawn with replacement, each drawn child resampled by itself."""
    size = len(tree)
    picks = rng.integers(size, size=(count, size))
    if isinstance(tree, np.ndarray):
        return tree[picks].mean(1)
    means = np.empty(picks.shape)
    for k, child in enumerate(tree):
        where = picks == k
        means[where] = _resampled(child, rng, int(where.sum()))
    return means.mean(1)
