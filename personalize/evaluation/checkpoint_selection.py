"""Which checkpoint to keep, by a small dev split: the one most like the subject, within limits.

Identity rises early and stalls while prompt adherence and the class decay (DVAR 2302.04841, OFT 2306.07280); the training loss
says nothing of it. Values are paired: every checkpoint draws the same prompts from the same noise as the base did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personalize.common.files import read_jsonl
from personalize.common.recipe_sections import Choose
from personalize.common.untrusted import Either, Many, Number, Only, Table, Text
from personalize.evaluation import bootstrap

FILE = "choosing.jsonl"  # of a run: a row for each scored checkpoint

Key = tuple  # token, template, number
TABLES = ("identity", "obeys", "base_obeys", "pres", "base_pres")  # what a checkpoint holds a value of each image of
BLEED = "bleed"  # as these, of a run of several subjects
_SHARE = Number(-100, 100, real=True)
_ENTRY = Many(Either((Text(), Number(0, 10**9), _SHARE)), 2, 8)  # key, value
ROW = Table(
    {
        "step": Number(0, 10**9),
        "copied": _SHARE,
        "strength": Number(0, 10, real=True),
        "ceiling": Either((_SHARE, Only((None,)))),
        **dict.fromkeys((*TABLES, BLEED), Many(_ENTRY)),
    },
    needs=("step", "copied", "ceiling", *TABLES),
)


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A checkpoint on the dev split, at a strength (`methods.set_strength`).

    identity, obeys, base_obeys  DINO with the photos, CLIP-T, and the base's, of each subject image
    pres, base_pres              DINO with the photos of each class image
    ceiling                      photos against photos; None for a single one
    copied                       share of images nearer to a photo than photos are to each other
    bleed                        (token, another's token, template, number) -> share of the way to that one's photos
    """

    step: int
    identity: dict[Key, float]
    obeys: dict[Key, float]
    base_obeys: dict[Key, float]
    pres: dict[Key, float] = field(default_factory=dict)
    base_pres: dict[Key, float] = field(default_factory=dict)
    ceiling: float | None = None
    copied: float = 0.0
    strength: float = 1.0
    bleed: dict[Key, float] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """Share of the base's CLIP-T that is gone."""
        return self._lost()[0]

    @property
    def drift(self) -> float:
        """Share of the way to the photos that class images moved."""
        return self._drift()[0]

    def _lost(self) -> tuple[float, float]:
        return _share(self.base_obeys, self.obeys, room=abs(_mean(self.base_obeys)))

    def _drift(self) -> tuple[float, float]:
        if not self.pres:
            return 0.0, 0.0
        return _share(self.pres, self.base_pres, room=(1.0 if self.ceiling is None else self.ceiling) - _mean(self.base_pres))

    def _bled(self) -> tuple[float, float]:
        """The largest share of any two subjects, and its standard error."""
        pairs = {}
        for (one, other, *key), value in self.bleed.items():
            pairs.setdefault((one, other), []).append((value, tuple(key[:-1])))
        ways = [bootstrap.bootstrap_interval(*zip(*pair)) for pair in pairs.values()]
        return max(((way.mean, way.se) for way in ways), default=(0.0, 0.0))

    def over(self, limits: Choose) -> list[tuple[float, str]]:
        """The limits that it breaks, by how much and in words: by more than one standard error, or at all above strength 1.

        So noise neither weakens what was trained nor strengthens it.
        """
        allowed = 1 if self.strength <= 1 else 0  # standard errors
        checks = (
            (*self._lost(), limits.obedience, "{:.0%} of CLIP-T lost (limit {:.0%})"),
            (*self._drift(), limits.drift, "class drift {:.0%} (limit {:.0%})"),
            (*self._bled(), limits.bleed, "{:.0%} of the way to another subject's photos (limit {:.0%})"),
            (self.copied, 0.0, limits.copying, "{:.0%} copies (limit {:.0%})"),
        )
        return [(value - limit, text.format(value, limit)) for value, se, limit, text in checks if value - allowed * se > limit]

    def words(self) -> str:
        """The checkpoint in one line."""
        moved = f", class drift {self.drift:.0%}" if self.pres else ""
        moved += f", bleed {self._bled()[0]:.0%}" if self.bleed else ""
        return f"{state_name(self.step, self.strength)}: identity {identity(self):.3f}, CLIP-T lost {self.lost:.1%}{moved}"

    def values(self) -> dict[str, float]:
        """For a tracker."""
        bled = {"choose/bleed": self._bled()[0]} if self.bleed else {}
        return {"choose/identity": identity(self), "choose/clip_t_lost": self.lost, "choose/class_drift": self.drift} | bled

    def row(self) -> dict:
        """For a file: every dict of values as a list of [*key, value]."""
        row = {"step": self.step, "strength": self.strength, "ceiling": self.ceiling, "copied": self.copied}
        names = (*TABLES, BLEED) if self.bleed else TABLES
        return row | {name: [[*key, value] for key, value in getattr(self, name).items()] for name in names}


def read_scored(path: Path) -> list[ScoredCheckpoint]:
    """What `row` gave, a line each; a state that was scored again counts once, as it was last."""
    by_state = {}
    for row in read_jsonl(path, ROW):
        tables = {k: {tuple(e[:-1]): e[-1] for e in v} for k, v in row.items() if isinstance(v, list)}
        numbers = {"ceiling": row["ceiling"], "copied": row["copied"], "strength": row.get("strength", 1.0)}
        by_state[row["step"], numbers["strength"]] = ScoredCheckpoint(row["step"], **numbers, **tables)
    return [by_state[state] for state in sorted(by_state)]


def state_name(step: int, strength: float) -> str:
    return f"step {step}" + (f" at {strength:g} of its strength" if strength != 1 else "")


@dataclass(frozen=True)
class Choice:
    """The step to keep and its strength, and why in words."""

    step: int
    why: str
    strength: float = 1.0


def choose_checkpoint(scored: Sequence[ScoredCheckpoint], limits: Choose) -> Choice:
    """Checkpoints by step -> the one of the best identity among those in the limits, the earliest of equals.

    Where none keeps to them, the one that is least over, and which limits failed.
    """
    fit = [s for s in scored if not s.over(limits)]
    if not fit:
        least = min(scored, key=lambda s: (sum(by for by, _ in s.over(limits)), s.step))
        failed = "; ".join(words for _, words in least.over(limits))
        return _choice(least, f"none of {len(scored)} keeps to the limits, this one is least over ({failed})")
    among = f"among {len(fit)} of {len(scored)} that keep to the limits" if len(fit) < len(scored) else f"of {len(scored)}"
    return _choice(max(fit, key=identity), f"the best identity {among}")


def _choice(kept: ScoredCheckpoint, why: str) -> Choice:
    return Choice(kept.step, f"{state_name(kept.step, kept.strength)}: {why}", kept.strength)


def next_strength(scored: Sequence[ScoredCheckpoint], strengths: Sequence[float], limits: Choose) -> tuple[int, float] | None:
    """The step and strength to score next, or None: downwards where the best checkpoint breaks a limit, else upwards.

    The best is that of the best identity at strength 1. Down until the limits hold, up while they hold and identity gains.
    """
    best = max((s for s in scored if s.strength == 1), key=identity)
    own = {s.strength: s for s in scored if s.step == best.step}
    down = bool(best.over(limits))
    before = best
    for strength in sorted((s for s in strengths if (s < 1 if down else s > 1)), reverse=down):
        if strength not in own:
            return best.step, strength
        ends = (
            not own[strength].over(limits)
            if down
            else own[strength].over(limits) or identity(own[strength]) <= identity(before)
        )
        if ends:
            return None
        before = own[strength]
    return None


def stalled(scored: Sequence[ScoredCheckpoint], patience: int) -> bool:
    """Whether more steps only harm: `patience` checkpoints without a clear gain in identity, and further drift."""
    scored = [s for s in scored if s.strength == 1]
    if not patience or len(scored) <= patience:
        return False
    then, since = scored[-1 - patience], scored[-patience:]
    if any(_gap(s, then) > 0 for s in since):
        return False
    return scored[-1].drift > then.drift or scored[-1].lost > then.lost


def _gap(a: ScoredCheckpoint, b: ScoredCheckpoint) -> float:
    """By how much a's identity is above b's, less one paired standard error."""
    change = bootstrap.paired_difference(a.identity, b.identity)
    return change.mean - change.se


def _share(a: dict[Key, float], b: dict[Key, float], *, room: float) -> tuple[float, float]:
    """Mean of a - b as a share of `room`, and its standard error."""
    change = bootstrap.paired_difference(a, b)
    return (change.mean / room, change.se / room) if room > 0 else (0.0, 0.0)


def identity(s: ScoredCheckpoint) -> float:
    """Mean DINO of the subject's images with the photos."""
    return _mean(s.identity)


def _mean(values: dict[Key, float]) -> float:
    return bootstrap.mean(list(values.values()), [key[:-1] for key in values])


def checkpoint_rows(scored: Sequence[ScoredCheckpoint], limits: Choose, chosen: tuple[int | None, float]) -> list[dict]:
    """A row for each checkpoint at each strength that was scored, for people and files; chosen: step and strength."""
    rows = []
    for s in scored:
        nearness = bootstrap.bootstrap_interval(list(s.identity.values()), [key[:-1] for key in s.identity])
        failed = [words for _, words in s.over(limits)]
        rows.append({
            "step": s.step, "strength": s.strength,
            "identity": nearness.mean, "low": nearness.low, "high": nearness.high,
            "obeys": _mean(s.obeys), "base_obeys": _mean(s.base_obeys), "drift": s.drift,
            "failed": failed, "qualifies": not failed, "chosen": (s.step, s.strength) == chosen,
        })  # fmt: skip
    return rows
