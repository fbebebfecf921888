"""Rows of images -> what they say of a run: means with intervals beside floor and ceiling.

Means go photos -> image -> prompt -> run; intervals are of a cluster bootstrap over prompts, then images.
"""

from collections.abc import Iterable, Mapping, Sequence

from personalize.common.errors import UserError
from personalize.evaluation import bootstrap
from personalize.evaluation.bootstrap import Interval
from personalize.evaluation.metrics import METRICS

Row = Mapping
PAIRS = 6  # nearest images that are shown beside their photos


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def interval(rows: Sequence[Row], name: str) -> Interval | None:
    return bootstrap.bootstrap_interval([row.get(name) for row in rows], [(row["template"],) for row in rows])


def keyed(rows: Iterable[Row], name: str) -> dict:
    """(template, number) -> value, of the images that have one."""
    return {(row["template"], row["index"]): row[name] for row in rows if row.get(name) is not None}


def scores(rows: Sequence[Row], ceilings: Mapping[str, float | None]) -> dict[str, dict]:
    """Metric -> score with its interval beside floor (the base) and ceiling (photos).

    relative = (score - floor) / (ceiling - floor); change: the Interval of the paired difference to the base.
    """
    run, base = of_kind(rows, "subject"), of_kind(rows, "base")
    summary = {}
    for name, metric in METRICS.items():
        if metric.truth:
            continue
        got, floor = interval(run, name), interval(base, name)
        if got is None:
            continue
        low, top = floor.mean if floor else None, ceilings.get(name)
        relative = (got.mean - low) / (top - low) if top is not None and low is not None and top > low else None
        change = bootstrap.paired_difference(keyed(run, name), keyed(base, name))
        summary[name] = {
            "title": metric.title, "score": got.mean, "low": got.low, "high": got.high, "floor": low, "ceiling": top,
            "relative": relative, "change": change.row() if change else None, "better": metric.better,
        }  # fmt: skip
    return summary


def drift(rows: Sequence[Row], prompt: str, top: float | None) -> dict | None:
    """PRES of class images by the run and by the base, and what share of the way to the photos they moved (Ruiz 4.3)."""
    run, base = of_kind(rows, "class"), of_kind(rows, "base class")
    if not run:
        return None
    pres, before = interval(run, "dino"), interval(base, "dino")
    moved = bootstrap.paired_difference(keyed(run, "dino"), keyed(base, "dino"))
    room = (1.0 if top is None else top) - before.mean
    share = {k: getattr(moved, k) / room if room > 0 else None for k in ("mean", "low", "high")}
    return {
        "prompt": prompt, "pres": pres.mean, "low": pres.low, "high": pres.high, "base": before.mean, "ceiling": top,
        "excess": moved.mean, "share": share["mean"], "share_low": share["low"], "share_high": share["high"],
        "clip_t": interval(run, "clip_t").mean, "base_clip_t": interval(base, "clip_t").mean,
        "diversity": _plain_mean(run, "diversity"), "base_diversity": _plain_mean(base, "diversity"),
    }  # fmt: skip


def memorization(rows: Sequence[Row], leave_one_out: Sequence[float] | None) -> dict | None:
    """How near images are to a photo, against how near photos are to each other; None for a single photo."""
    run = of_kind(rows, "subject")
    if leave_one_out is None:
        return None
    nearest = sorted(run, key=lambda row: -row["nearest"])[:PAIRS]
    return {
        "nearest": [row["nearest"] for row in run], "leave_one_out": list(leave_one_out),
        "copied": sum(bool(row["copied"]) for row in run), "pictures": len(run),
        "auth_pct": 100 * sum(bool(row["authentic"]) for row in run) / len(run),
        "pairs": [{"prompt": r["prompt"], "index": r["index"], "photo": r["photo"], "cosine": r["nearest"]} for r in nearest],
    }  # fmt: skip


def truth_summary(rows: Sequence[Row]) -> dict | None:
    """Toyland: what a probe sees in the images, beside the base's; None where there is no probe."""
    run, base = of_kind(rows, "subject"), of_kind(rows, "base")
    summary = {}
    for name, metric in METRICS.items():
        if not metric.truth:
            continue
        got, floor = interval(run, name), interval(base, name)
        if got is not None:
            count = sum(row.get(name) is not None for row in run)
            summary[metric.title] = {
                "score": got.mean,
                "low": got.low,
                "high": got.high,
                "base": floor and floor.mean,
                "count": count,
            }
    return summary or None


def by_prompt(rows: Sequence[Row]) -> list[dict]:
    """Each prompt's means, in their order."""
    base = of_kind(rows, "base")
    groups: dict[str, list[Row]] = {}
    for row in of_kind(rows, "subject"):
        groups.setdefault(row["template"], []).append(row)
    means_of_prompts = []
    for template, run in groups.items():
        plain = [row for row in base if row["template"] == template]
        means = {
            name: bootstrap.mean([row.get(name) for row in run], [()] * len(run)) for name in ("dino", "clip_t", "diversity")
        }
        before = bootstrap.mean([row["clip_t"] for row in plain], [()] * len(plain))
        means_of_prompts.append({"prompt": run[0]["prompt"], "count": len(run), **means, "base_clip_t": before})
    return means_of_prompts


def compare_rows(a: Sequence[Row], b: Sequence[Row]) -> dict[str, dict]:
    """Two runs on the same prompts and noise: metric -> Interval of a - b as a dict; `above`: probability that a is higher.

    UserError where no image is of the same template and number.
    """
    changes = {}
    for kind, names in (("subject", METRICS), ("class", ["dino"])):
        one, other = of_kind(a, kind), of_kind(b, kind)
        for name in names:
            change = bootstrap.paired_difference(keyed(one, name), keyed(other, name))
            if change:
                changes["pres" if kind == "class" else name] = change.row()
    if not changes:
        raise UserError("these runs have no image of the same prompt and number: evaluate both by the same protocol.")
    return changes


def _plain_mean(rows: Sequence[Row], name: str) -> float | None:
    return bootstrap.mean([row.get(name) for row in rows], [()] * len(rows))
