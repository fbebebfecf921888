"""DreamBooth's tables (Ruiz et al. 2208.12242) in small, sign by sign.    python -m benchmarks.paper_tables WORK

Eight held-out Toyland subjects, the shipped recipe's 400 steps (and its first 100), Toyland's test prompts. Differences
are paired by subject, prompt and noise; intervals are of a bootstrap over subjects, then prompts, then pictures.
"""

from pathlib import Path

import typer

from benchmarks.study import DEFAULT, Study, values
from personalize.common import prompts
from personalize.common.files import read_json, write_text
from personalize.evaluation import bootstrap

EARLY = 100  # steps, at which the class word still tells
ROWS = {  # name -> variant, step
    "DreamBooth": ("long", DEFAULT), "without prior": ("without", DEFAULT), "wrong class word": ("wrong", DEFAULT),
    "wrong class word, its pictures": ("wrong-prior", DEFAULT), "no class word": ("none", DEFAULT),
    "textual inversion": ("inversion", DEFAULT),
    "early: without prior": ("without", EARLY), "early: wrong class word": ("wrong", EARLY),
    "early: no class word": ("none", EARLY),
}  # fmt: skip
COLUMNS = {
    "DINO": ("subject", "dino"), "CLIP-I": ("subject", "clip_i"), "CLIP-T": ("subject", "clip_t"),
    "DIV": ("subject", "diversity"), "PRES": ("class", "dino"), "identity error": ("subject", "identity_error"),
}  # fmt: skip
# claim, higher, lower, measure, the paper's two numbers
CLAIMS = (
    ("(a) PRES falls with the prior term", "without prior", "DreamBooth", "PRES", (0.664, 0.493)),
    ("(a) DIV rises with it", "DreamBooth", "without prior", "DIV", (0.391, 0.371)),
    ("(a) DINO only slightly lower with it", "without prior", "DreamBooth", "DINO", (0.712, 0.684)),
    ("(a) CLIP-T not lower with it", "DreamBooth", "without prior", "CLIP-T", (0.308, 0.306)),
    ("(b) right class word above wrong, DINO", "without prior", "wrong class word", "DINO", (0.744, 0.454)),
    ("(b) right class word above wrong, CLIP-I", "without prior", "wrong class word", "CLIP-I", (0.853, 0.728)),
    ("(b) wrong class word above none, DINO", "wrong class word", "no class word", "DINO", (0.454, 0.303)),
    ("(b) wrong class word above none, CLIP-I", "wrong class word", "no class word", "CLIP-I", (0.728, 0.607)),
    (
        "(b) with the prior term: right above wrong, DINO",
        "DreamBooth",
        "wrong class word, its pictures",
        "DINO",
        (0.744, 0.454),
    ),
    (
        "(b) with the prior term: right above wrong, CLIP-I",
        "DreamBooth",
        "wrong class word, its pictures",
        "CLIP-I",
        (0.853, 0.728),
    ),
    ("(b) early: right above wrong, DINO", "early: without prior", "early: wrong class word", "DINO", (0.744, 0.454)),
    ("(b) early: right above wrong, CLIP-I", "early: without prior", "early: wrong class word", "CLIP-I", (0.853, 0.728)),
    ("(b) early: wrong above none, DINO", "early: wrong class word", "early: no class word", "DINO", (0.454, 0.303)),
    ("(b) early: wrong above none, CLIP-I", "early: wrong class word", "early: no class word", "CLIP-I", (0.728, 0.607)),
    ("(c) DreamBooth above textual inversion, DINO", "DreamBooth", "textual inversion", "DINO", (0.668, 0.569)),
    ("(c) DreamBooth above textual inversion, CLIP-T", "DreamBooth", "textual inversion", "CLIP-T", (0.305, 0.255)),
)


def measure(study: Study) -> dict[str, dict[str, dict]]:
    """Row -> column -> (subject, template, number) -> value."""
    measurements = {}
    for name, (variant, step) in ROWS.items():
        bare = tuple(t.replace(" {class}", "") for t in prompts.TOYLAND) if variant == "none" else ()
        rows = {
            subject: study.rows(run, str(step), templates=bare)
            for subject, run in zip(study.names(), study.train(variant), strict=True)
        }
        measurements[name] = {
            column: {k: v for subject, r in rows.items() for k, v in values(r, kind, metric, subject).items()}
            for column, (kind, metric) in COLUMNS.items()
            if not (
                variant.startswith("wrong") and metric == "identity_error"
            )  # the probe would read the parts of the wrong class
        }
        print(f"{name}: measured", flush=True)
    return measurements


def ceilings(study: Study) -> dict[str, dict[str, float]]:
    """Column -> subject -> photos against photos."""
    runs = dict(zip(study.names(), study.train("long"), strict=True))
    scores = {subject: read_json(run / "evaluation" / "metrics.json")["scores"] for subject, run in runs.items()}
    return {
        column: {subject: metrics[name]["ceiling"] for subject, metrics in scores.items()}
        for column, name in (("DINO", "dino"), ("CLIP-I", "clip_i"))
    }


def main(work: Path) -> None:
    study = Study(work)
    measurements, ceiling_scores = measure(study), ceilings(study)
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    photos = {
        column: bootstrap.bootstrap_interval(list(top.values()), [()] * len(top)) for column, top in ceiling_scores.items()
    }
    lines.append("| photos | " + " | ".join(_cell(photos.get(column)) for column in COLUMNS) + " |")
    for name, columns in measurements.items():
        values_by_column = [columns.get(column, {}) for column in COLUMNS]
        cells = [bootstrap.bootstrap_interval(list(c.values()), [key[:-1] for key in c]) for c in values_by_column]
        lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    signs = ["| claim | paper | here (95 %) | P | sign |", "|---|---|---|---|---|"]
    for claim, high, low, column, paper in CLAIMS:
        signs.append(_sign(claim, bootstrap.paired_difference(measurements[high][column], measurements[low][column]), paper))
    for column, paper in (("DINO", (0.774, 0.668)), ("CLIP-I", (0.885, 0.803))):
        dreambooth = measurements["DreamBooth"][column]
        above = {key: ceiling_scores[column][key[0]] for key in dreambooth}
        signs.append(_sign(f"(d) photos above DreamBooth, {column}", bootstrap.paired_difference(above, dreambooth), paper))
    text = "\n".join([*signs, "", *lines]) + "\n"
    write_text(work / "paper_tables.md", text)
    print(text)


def _cell(interval: bootstrap.Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _sign(claim: str, change: bootstrap.Interval, paper: tuple[float, float]) -> str:
    sign = "yes" if change.low > 0 else "no" if change.high < 0 else "not sure"
    theirs = f"{paper[0]:.3f} - {paper[1]:.3f} = {paper[0] - paper[1]:+.3f}"
    return (
        f"| {claim} | {theirs} | {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}) | {change.above:.2f} | {sign} |"
    )


if __name__ == "__main__":
    typer.run(main)
