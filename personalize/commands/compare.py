"""Several evaluations side by side: runs against the first one, image by image; or subjects, and the mean over them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.commands.evaluate import evaluate
from personalize.common.errors import UserError
from personalize.common.files import read_json, write_json, write_text
from personalize.common.recipe import flat_settings, recipe_from_dict
from personalize.common.settings import to_toml_value
from personalize.common.terminal import SILENT, Terminal
from personalize.evaluation import bootstrap, summary
from personalize.evaluation.metrics import METRICS
from personalize.training import load_run

PRES = "PRES: class images like the photos"


@dataclass(frozen=True)
class CompareResult:
    """rows: what the file of the same name with .json holds; text: for the terminal, as Markdown; file: the Markdown."""

    rows: list[dict]
    text: str
    file: Path


def compare(runs: Sequence[Path | str], *, settings: Sequence[str] = (), screen: Terminal = SILENT, **options) -> CompareResult:
    """Evaluates several runs as the first one asks, and each further one against it, image by image.

    Images are paired: same prompt, same noise. options: those of `evaluate`.
    """
    if len(runs) < 2:
        raise UserError("one run cannot be compared: name two or more.")
    same, evaluations = _same_settings(Path(runs[0])), []
    for run in runs:
        screen.say(f"evaluating {run}")
        evaluations.append(evaluate(run, settings=[*same, *settings], screen=screen, **options).report.parent)
    return _compared([Path(run) for run in runs], evaluations)


def _same_settings(folder: Path) -> list[str]:
    """The settings that a run's images and scores depend on, so that others are drawn and judged the same way."""
    recipe = flat_settings(recipe_from_dict(load_run.require_run(folder)["recipe"], str(folder)))
    names = [name for name in recipe if name == "seed" or name.startswith(("draw.", "evaluate."))]
    return [f"{name}={to_toml_value(recipe[name])}" for name in names]


def _compared(folders: Sequence[Path], evaluations: Sequence[Path]) -> CompareResult:
    """Runs and the folders of their evaluations -> by how much each further one differs from the first, image by image."""
    first, rows, lines = read_rows(evaluations[0]), [], []
    for folder, evaluation in zip(folders[1:], evaluations[1:], strict=True):
        changes = summary.compare_rows(read_rows(evaluation), first)
        rows.append({"run": str(folder), "against": str(folders[0]), "changes": changes})
        lines += [f"**{folder}** against **{folders[0]}**", "", "| | difference | 95 % | P(higher) |", "|---|---|---|---|"]
        for name, change in changes.items():
            mean, low, high, above = (change[key] for key in ("mean", "low", "high", "above"))
            lines.append(f"| {_title(name)} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {above:.2f} |")
        lines.append("")
    return _written(evaluations[0] / "comparison.md", rows, lines)


def subject_table(names: Sequence[str], evaluations: Sequence[Path], *, out: Path) -> CompareResult:
    """A row for each subject and their mean, whose interval is of a bootstrap over subjects, prompts, images."""
    rows = [
        {"subject": name, **_scores(read_json(folder / "metrics.json"))}
        for name, folder in zip(names, evaluations, strict=True)
    ]
    keys = _always_measured()
    lines = ["| subject | " + " | ".join(keys) + " | PRES |", "|---|" + "---|" * (len(keys) + 1)]
    lines += [f"| {row['subject']} | " + " | ".join(_shown(row.get(m)) for m in (*keys, "pres")) + " |" for row in rows]
    means = []
    for measure in (*keys, "pres"):
        kind, column = ("class", "dino") if measure == "pres" else ("subject", measure)
        values, labels = [], []
        for name, folder in zip(names, evaluations, strict=True):
            for row in summary.of_kind(read_rows(folder), kind):
                values.append(row.get(column))
                labels.append((name, row["template"]))
        interval = bootstrap.bootstrap_interval(values, labels)
        means.append("-" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    lines += ["| **mean** (95 %) | " + " | ".join(means) + " |"]
    return _written(out / "dreambench.md", rows, lines)


def _title(key: str) -> str:
    if key == "pres":
        return PRES
    return f"truth: {METRICS[key].title}" if METRICS[key].truth else METRICS[key].title


def _always_measured() -> list[str]:
    return [key for key, metric in METRICS.items() if not metric.needs]


def read_rows(evaluation: Path) -> list[dict]:
    """The rows of a per_image.csv, their numbers as numbers."""
    with open(evaluation / "per_image.csv", newline="", encoding="utf-8") as file:
        return [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _value(name: str, text: str):
    if name in ("kind", "template", "prompt", "unusable"):
        return text
    if name == "index":
        return int(text)
    return {"": None, "True": 1.0, "False": 0.0}[text] if text in ("", "True", "False") else float(text)


def _scores(metrics: dict) -> dict:
    scores = {name: metrics["scores"][name]["score"] for name in _always_measured() if name in metrics["scores"]}
    return scores | ({"pres": metrics["class"]["pres"]} if metrics["class"] else {})


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _written(path: Path, rows: list[dict], lines: list[str]) -> CompareResult:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines).rstrip() + "\n"
    write_text(path, text)
    write_json(path.with_suffix(".json"), rows)
    return CompareResult(rows, text, path)
