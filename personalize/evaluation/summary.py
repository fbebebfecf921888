"""Rows of images -> what they say of a run: means with intervals beside floor and ceiling.

Means go photos -> image -> prompt -> run; intervals are of a cluster bootstrap over prompts, then images.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from personalize.common.errors import UserError
from personalize.evaluation import bootstrap
from personalize.evaluation.bootstrap import Interval
from personalize.evaluation.metrics import METRICS, toyland_truth

Row = Mapping
NO_SCORE = " (no score: drawn towards it)"
NEAR = {"clip_t": ("clip_bg",)}  # the same encoder reads the same prompt
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
    summary = {}
    for name, score, floor in _scores_and_floors(rows, truth=False):
        metric, low, top = METRICS[name], floor and floor.mean, ceilings.get(name)
        relative = (score.mean - low) / (top - low) if top is not None and low is not None and top > low else None
        change = bootstrap.paired_difference(keyed(of_kind(rows, "subject"), name), keyed(of_kind(rows, "base"), name))
        summary[name] = {"title": metric.title, **_bounds(score), "floor": low, "ceiling": top, "relative": relative}
        summary[name] |= {"change": change and change.row(), "better": metric.better}
    return summary


def mark_towards(scores: dict[str, dict], name: str) -> None:
    """Says of a metric, and of those near to it, that the images were drawn towards it: an optimised metric is no metric."""
    for each in {name, *NEAR.get(name, ())} & scores.keys():
        scores[each] |= {"optimised": True, "title": scores[each]["title"] + NO_SCORE}


def marked(metrics: Mapping) -> list[str]:
    """The metrics of a metrics.json that its images were drawn towards."""
    return [name for name, score in metrics["scores"].items() if score.get("optimised")]


def drift(rows: Sequence[Row], prompt: str, top: float | None) -> dict | None:
    """PRES of class images by the run and by the base, and what share of the way to the photos they moved (Ruiz 4.3)."""
    run, base = of_kind(rows, "class"), of_kind(rows, "base class")
    if not run:
        return None
    pres, before = interval(run, "dino"), interval(base, "dino").mean
    moved = bootstrap.paired_difference(keyed(run, "dino"), keyed(base, "dino"))
    room = (1.0 if top is None else top) - before
    distances = {"share": moved.mean, "share_low": moved.low, "share_high": moved.high}
    return {
        "prompt": prompt, "pres": pres.mean, "low": pres.low, "high": pres.high, "base": before, "ceiling": top,
        "excess": moved.mean, **{name: distance / room if room > 0 else None for name, distance in distances.items()},
        "clip_t": interval(run, "clip_t").mean, "base_clip_t": interval(base, "clip_t").mean,
        "diversity": _mean(run, "diversity"), "base_diversity": _mean(base, "diversity"),
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
    summary = {}
    for name, score, floor in _scores_and_floors(rows, truth=True):
        count = len(keyed(of_kind(rows, "subject"), name))
        summary[METRICS[name].title] = {**_bounds(score), "base": floor and floor.mean, "count": count}
    return summary or None


def parts_off(rows: Sequence[Row], class_word: str) -> list[dict]:
    """Toyland: in how many images each part of the subject is another's, and in words; usual: as a probe misreads it anyway."""
    parts = []
    for part, (least, usual) in toyland_truth.OFF.items():
        if values := keyed(of_kind(rows, "subject"), f"off_{part}").values():
            off, words = sum(value > least for value in values), toyland_truth.off_in_words(part, class_word)
            parts.append({"part": part, "words": words, "off": off, "of": len(values), "usual": usual})
    return parts


def by_prompt(rows: Sequence[Row]) -> list[dict]:
    """Each prompt's means, in their order."""
    run, base = of_kind(rows, "subject"), of_kind(rows, "base")
    prompts = []
    for template in dict.fromkeys(row["template"] for row in run):
        images, plain = ([row for row in part if row["template"] == template] for part in (run, base))
        means = {name: _mean(images, name) for name in ("dino", "clip_t", "diversity")}
        base_clip_t = _mean(plain, "clip_t")
        prompts.append({"prompt": images[0]["prompt"], "count": len(images), **means, "base_clip_t": base_clip_t})
    return prompts


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


def _scores_and_floors(rows: Sequence[Row], *, truth: bool) -> Iterator[tuple[str, Interval, Interval | None]]:
    """The metrics that the run's images have -> name, Interval of the run, Interval of the base."""
    for name, metric in METRICS.items():
        if metric.truth == truth and (score := interval(of_kind(rows, "subject"), name)):
            yield name, score, interval(of_kind(rows, "base"), name)


def _bounds(score: Interval) -> dict[str, float]:
    return {"score": score.mean, "low": score.low, "high": score.high}


def _mean(rows: Sequence[Row], name: str) -> float | None:
    """Of the images alone, without clusters."""
    return bootstrap.mean([row.get(name) for row in rows], [()] * len(rows))
