"""Several evaluations side by side: runs against the first one, image by image; or subjects, and the mean over them."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.commands.evaluate import evaluate
from personalize.common.errors import UserError
from personalize.common.files import read_json, write_json, write_text
from personalize.common.recipe import flat_settings, recipe_from_dict
from personalize.common.settings import to_toml_value
from personalize.common.terminal import SILENT, Terminal
from personalize.common.untrusted import read_bytes
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
    if options.get("require"):
        raise UserError("--require is about one run: evaluate each by itself.")
    manifests = [load_run.require_run(Path(run)) for run in runs]
    first = flat_settings(recipe_from_dict(manifests[0]["recipe"], str(runs[0])))
    # What images and scores depend on: the others are drawn and judged in the same way, but for students, which have their own.
    alike = ("evaluate.",) if any("student" in manifest for manifest in manifests) else ("draw.", "evaluate.")
    names = [name for name in first if name == "seed" or name.startswith(alike)]
    same, evaluations = [f"{name}={to_toml_value(first[name])}" for name in names], []
    for run in runs:
        screen.say(f"evaluating {run}")
        evaluations.append(evaluate(run, settings=[*same, *settings], screen=screen, **options).report.parent)
    return _compared([Path(run) for run in runs], evaluations)


def _compared(folders: Sequence[Path], evaluations: Sequence[Path]) -> CompareResult:
    """Runs and the folders of their evaluations -> by how much each further one differs from the first, image by image."""
    first, rows, lines = read_rows(evaluations[0]), [], []
    for folder, evaluation in zip(folders[1:], evaluations[1:], strict=True):
        changes = summary.compare_rows(read_rows(evaluation), first)
        rows.append({"run": str(folder), "against": str(folders[0]), "changes": changes})
        lines += [f"**{folder}** against **{folders[0]}**", "", "| | difference | 95 % | P(higher) |", "|---|---|---|---|"]
        towards = {name for each in (evaluation, evaluations[0]) for name in summary.marked(read_json(each / "metrics.json"))}
        for name, change in changes.items():
            spread = "{mean:+.3f} | {low:+.3f} to {high:+.3f} | {above:.2f}".format(**change)
            lines.append(f"| {_title(name)}{summary.NO_SCORE if name in towards else ''} | {spread} |")
        lines.append("")
    return _written(evaluations[0] / "comparison.md", rows, lines)


def subject_table(evaluations: Mapping[str, Path], *, out: Path) -> CompareResult:
    """A row for each subject and their mean, whose interval is of a bootstrap over subjects, prompts, images."""
    keys = [key for key, metric in METRICS.items() if not metric.needs]
    rows = [{"subject": name, **_scores(read_json(folder / "metrics.json"), keys)} for name, folder in evaluations.items()]
    lines = ["| subject | " + " | ".join(keys) + " | PRES |", "|---|" + "---|" * (len(keys) + 1)]
    for row in rows:
        values = [row.get(key) for key in (*keys, "pres")]
        lines.append(f"| {row['subject']} | " + " | ".join("-" if v is None else f"{v:.3f}" for v in values) + " |")
    images = [(name, row) for name, folder in evaluations.items() for row in read_rows(folder)]
    means = [_mean(images, "subject", key) for key in keys] + [_mean(images, "class", "dino")]
    lines += ["| **mean** (95 %) | " + " | ".join(means) + " |"]
    return _written(out / "dreambench.md", rows, lines)


def _mean(images: list[tuple[str, dict]], kind: str, column: str) -> str:
    """images: the subject's name, and the row of an image."""
    of_kind = [(name, row) for name, row in images if row["kind"] == kind]
    labels = [(name, row["template"]) for name, row in of_kind]
    interval = bootstrap.bootstrap_interval([row.get(column) for _, row in of_kind], labels)
    return "-" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _title(key: str) -> str:
    if key == "pres":
        return PRES
    return f"truth: {METRICS[key].title}" if METRICS[key].truth else METRICS[key].title


def read_rows(evaluation: Path) -> list[dict]:
    """The rows of a per_image.csv, their numbers as numbers."""
    lines = read_bytes(evaluation / "per_image.csv", "table").decode(errors="replace").splitlines(keepends=True)
    return [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(lines)]


def _value(name: str, text: str):
    if name in ("kind", "template", "prompt", "unusable"):
        return text
    if name == "index":
        return int(text)
    return {"": None, "True": 1.0, "False": 0.0}[text] if text in ("", "True", "False") else float(text)


def _scores(metrics: dict, keys: list[str]) -> dict:
    scores = {key: metrics["scores"][key]["score"] for key in keys if key in metrics["scores"]}
    return scores | ({"pres": metrics["class"]["pres"]} if metrics["class"] else {})


def _written(path: Path, rows: list[dict], lines: list[str]) -> CompareResult:
    text = "\n".join(lines).rstrip() + "\n"
    write_text(path, text)
    write_json(path.with_suffix(".json"), rows)
    return CompareResult(rows, text, path)
