"""What a run must reach: `dino.relative.low>=0.5`, a value of metrics.json, an operator and a bound."""

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from personalize.common.errors import UserError, nearest
from personalize.evaluation import summary
from personalize.evaluation.metrics import METRICS

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}  # the longer ones are read first
WRITTEN = re.compile(rf"\s*(.+?)\s*({'|'.join(OPERATORS)})\s*(.+?)\s*")
SECTIONS = ("scores", "class", "copying", "truth", "bleed")  # of metrics.json; "scores" need not be said
ALIASES = {  # bleed: of the two subjects that it is largest for
    "drift": "class.share", "drift.low": "class.share_low", "drift.high": "class.share_high",
    "bleed": "bleed.share", "bleed.low": "bleed.share_low", "bleed.high": "bleed.share_high",
}  # fmt: skip
BOUNDS = ("score", "low", "high")
OF_SCORE = (
    *BOUNDS, "floor", "ceiling", "relative", "relative.low", "relative.high",
    "change.mean", "change.se", "change.low", "change.high", "change.above",
)  # fmt: skip
OF_CLASS = (
    "pres", "low", "high", "base", "ceiling", "excess", "share", "share_low", "share_high",
    "clip_t", "base_clip_t", "diversity", "base_diversity",
)  # fmt: skip
NAMES = (
    *(f"{name}.{part}" for name, metric in METRICS.items() if not metric.truth for part in OF_SCORE),
    *ALIASES,
    *(f"class.{part}" for part in OF_CLASS),
    *(f"bleed.{part}" for part in ("share", "share_low", "share_high")),
    *(f"copying.{part}" for part in ("copied", "pictures", "auth_pct")),
    *(f"truth.{metric.title}.{part}" for metric in METRICS.values() if metric.truth for part in (*BOUNDS, "base", "count")),
)


@dataclass(frozen=True)
class Requirement:
    """name: one of NAMES; sign: one of OPERATORS."""

    name: str
    sign: str
    bound: float


def read_requirements(texts: Sequence[str]) -> list[Requirement]:
    """UserError names the text that cannot be read, or the value that no evaluation has."""
    return [_requirement(text) for text in texts]


def failures(requirements: Sequence[Requirement], metrics: Mapping) -> list[str]:
    """A line for each requirement that these metrics do not meet: which, the value and the bound."""
    measured, lines = dict(values(metrics)), []
    for requirement in requirements:
        name, sign, bound = requirement.name, requirement.sign, requirement.bound
        value = measured.get(ALIASES.get(name, name))
        if name.split(".")[0] in summary.marked(metrics):
            lines.append(f"required {name} {sign} {bound}: the images were drawn towards it, so it is no score")
        elif value is None:
            lines.append(f"required {name} {sign} {bound}: it was not measured")
        elif not OPERATORS[sign](value, bound):
            lines.append(f"required {name} {sign} {bound}: it is {value:.6g}")
    return lines


def values(metrics: Mapping) -> Iterator[tuple[str, float]]:
    """Name and value of every number that can be required, "drift" by its own name.

    relative.low and relative.high: the interval of the score on the scale of `relative`, floor and ceiling taken as exact.
    """
    for section in SECTIONS:
        prefix = "" if section == "scores" else f"{section}."
        yield from _numbers(metrics.get(section) or {}, prefix)
    for name, score in metrics["scores"].items():
        if score["relative"] is not None:
            for end in ("low", "high"):
                yield f"{name}.relative.{end}", (score[end] - score["floor"]) / (score["ceiling"] - score["floor"])


def _numbers(table: Mapping, prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float):
            yield f"{prefix}{key}", value


def _requirement(text: str) -> Requirement:
    match = WRITTEN.fullmatch(text)
    if not match:
        raise UserError(f"--require {text!r} is not a value, one of {' '.join(OPERATORS)}, and a bound, as in 'drift<=0.2'.")
    name, sign, bound = match.groups()
    name = name.removeprefix("scores.")
    if name not in NAMES:
        raise UserError(f"--require {text!r}: no evaluation measures {name!r}{_hint(name)}")
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--require {text!r}: the bound {bound!r} is not a number. Write it as 0.2.")
    return Requirement(name, sign, number)


def _hint(name: str) -> str:
    """The nearest name; of a whole section the parts that it has."""
    parts = [known.removeprefix(f"{name}.") for known in NAMES if known.startswith(f"{name}.")]
    return f". It has {', '.join(parts)}; write {name}.{parts[0]}" if parts else nearest(name, NAMES)
