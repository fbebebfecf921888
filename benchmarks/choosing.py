"""Is what `train` chooses better than the last checkpoint, on truth?    python -m benchmarks.choosing WORK [--count N]

Held-out Toyland subjects, four conditions: the shipped recipe, three times as long, three times the learning rate, and without
prior preservation. `train` chooses checkpoint and strength on its dev split; what it chose and the last checkpoint, as it was
trained, are then drawn on Toyland's test prompts with fresh noise and judged by probes that know the world, not by the encoders
that chose. No run ends early. The truth score is the mean of three shares, stated before any was measured:

identity    1 - error of the identity parameters, where 1 is the error of another subject of the class at random
adherence   images with the right place, and the right action, of those whose prompt asks for one
class kept  1 - |share of the way that the identity parameters of class images moved from the base's to the subject's|:
            images that turned to mush are far from the subject too, and no longer the class
"""

from pathlib import Path

import typer

from benchmarks.study import CLASSES, DEFAULT, Study
from personalize.common import run_folder
from personalize.common.files import slug, write_text
from personalize.evaluation import bootstrap, summary

CONDITIONS = {
    "default": [], "3 × as long": [f"train.steps={3 * DEFAULT}"], "3 × the rate": ["train.lr=6e-4"],
    "without prior": ["prior.count=0"],
}  # fmt: skip
SHARES = ("identity", "adherence", "class kept")


def truth(rows: list[dict]) -> dict[str, float]:
    """The three shares of an evaluation's rows, and their mean."""
    run = summary.of_kind(rows, "subject")
    adherence = [row[name] for row in run for name in ("true_place", "true_action") if row[name] is not None]
    error = {kind: summary.interval(summary.of_kind(rows, kind), "identity_error").mean for kind in ("class", "base class")}
    shares = (
        1 - summary.interval(run, "identity_error").mean,
        sum(adherence) / len(adherence),
        1 - abs(error["base class"] - error["class"]) / error["base class"],
    )
    return dict(zip(SHARES, shares, strict=True)) | {"truth": sum(shares) / 3}


def total(name: str, gains: list[dict[str, float]]) -> str:
    intervals = {key: bootstrap.bootstrap_interval([g[key] for g in gains], [()] * len(gains)) for key in (*SHARES, "truth")}
    whole = intervals["truth"]
    cells = [f"{whole.mean:+.3f} ({whole.low:+.3f} to {whole.high:+.3f})", f"{whole.above:.2f}"]
    return f"| {' | '.join([name, *cells, *(f'{intervals[key].mean:+.3f}' for key in SHARES)])} |"


def main(work: Path, count: int = len(CLASSES)) -> None:
    study, gains = Study(work, count), {name: [] for name in CONDITIONS}
    head = ["condition", "subject", "chosen", "last", *SHARES, "truth"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for k, subject in enumerate(study.names()):  # subject by subject: what is there when it is stopped is balanced
        for name, settings in CONDITIONS.items():
            run = study.run(k, slug(name), [*settings, "choose.patience=0"])
            manifest = run_folder.read_manifest(run)
            last = manifest["recipe"]["train"]["steps"]
            chosen, end = truth(study.rows(run)), truth(study.rows(run, str(last)))
            gains[name].append({key: chosen[key] - end[key] for key in chosen})
            cells = [f"{manifest['chosen']} at {manifest.get('strength', 1.0):g}", str(last)]
            cells += [f"{chosen[key]:.2f} / {end[key]:.2f}" for key in (*SHARES, "truth")]
            lines.append(f"| {' | '.join([name, subject, *cells])} |")
            print(lines[-1], flush=True)
    head = ["condition", "chosen - last, truth (95 %)", "P(better)", *SHARES]
    totals = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(total(*each) for each in gains.items())]
    write_text(work / "choosing.md", "\n".join([*totals, "", *lines]) + "\n")
    print("\n".join(totals))


if __name__ == "__main__":
    typer.run(main)
