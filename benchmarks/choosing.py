"""Is the chosen checkpoint better than the last one, on truth?    python -m benchmarks.choosing WORK [VARIANT [KEY=VALUE …]]

Eight held-out Toyland subjects, four conditions: the shipped recipe, three times as long, three times the learning rate,
and without prior preservation. `train`'s own rule chooses on the dev split; what it chose and the last checkpoint are
then drawn on Toyland's test prompts with fresh noise and judged by probes that know the world, not by the encoders
that chose. The truth score of a checkpoint is the mean of three shares, stated before any was measured:

identity    1 - error of the identity parameters, where 1 is the error of another subject of the class at random
adherence   images with the right place, and the right action, of those whose prompt asks for one
class kept  1 - |share of the way that the identity parameters of class images moved from the base's to the subject's|:
            images that turned to mush are far from the subject too, and no longer the class
"""

import dataclasses
from pathlib import Path

import torch
import typer

import personalize
from benchmarks.study import DEFAULT, Study, recipe_of
from personalize import methods, models
from personalize.common import run_folder
from personalize.common.files import slug, write_text
from personalize.common.recipe import Choose
from personalize.common.terminal import SILENT
from personalize.data import subjects
from personalize.evaluation import bootstrap, checkpoint_selection, summary
from personalize.training import load_run, validation

CONDITIONS = {  # name -> variant, steps of it
    "default": ("long", DEFAULT), "3 × as long": ("long", 3 * DEFAULT), "3 × the rate": ("fast", DEFAULT),
    "without prior": ("without", DEFAULT),
}  # fmt: skip
SHARES = ("identity", "adherence", "class kept")


def score_checkpoints(run: Path, config: Choose) -> list[checkpoint_selection.ScoredCheckpoint]:
    """Every checkpoint of a finished run on the dev split, as `train` would have scored it."""
    recipe, manifest = dataclasses.replace(recipe_of(run), choose=config), load_run.require_run(run)
    model = models.load_model("toyland", device="cpu", dtype="float32", say=lambda line: None)
    done_steps = {s.step for s in checkpoint_selection.read_scored(run / checkpoint_selection.FILE)}
    todo = [
        path
        for path in run_folder.checkpoints(run)
        if int(path.name[5:]) % config.every == 0 and int(path.name[5:]) not in done_steps
    ]
    if todo:
        entry = manifest["subjects"][0]
        run_subjects, _ = subjects.load_subjects(
            [[row["path"] for row in entry["photos"]]], recipe, tokens=[entry["token"]], size=model.size
        )
        dev = validation.DevSplit.of(model, recipe, run_subjects, run, progress=SILENT.progress)
        with torch.random.fork_rng(devices=[]):
            params = [p for group in methods.attach(model, recipe) for p in group["params"]]
        for path in todo:
            load_run.load_checkpoint(model, recipe, params, path)
            with validation.eval_mode(model):
                dev.score(int(path.name[5:]))
    return checkpoint_selection.read_scored(run / checkpoint_selection.FILE)


def choose(scored: list[checkpoint_selection.ScoredCheckpoint], config: Choose) -> tuple[checkpoint_selection.Choice, int]:
    """The choice, and the step that the run would have ended at."""
    for k in range(1, len(scored) + 1):
        if checkpoint_selection.stalled(scored[:k], config.patience):
            break
    return checkpoint_selection.choose_checkpoint(scored[:k], config), scored[k - 1].step


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


def main(work: Path, only: str = typer.Argument(""), settings: list[str] = typer.Argument([])) -> None:  # noqa: B008
    config = personalize.resolve(settings=settings).choose
    study, lines = Study(work), ["| condition | subject | ends at | chosen | last | " + " | ".join((*SHARES, "truth")) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * 4)
    totals = [
        "| condition | chosen - last, truth (95 %) | P(better) | identity | adherence | class kept |",
        "|---|---|---|---|---|---|",
    ]
    for name, (variant, steps) in CONDITIONS.items():
        if only not in ("", "all", variant):
            continue
        gains: dict[str, list[float]] = {}
        for subject, run in zip(study.names(), study.train(variant), strict=True):
            scored = [s for s in score_checkpoints(run, config) if s.step <= steps]
            choice, end = choose(scored, config)
            last = scored[-1].step
            truths = {step: truth(study.rows(run, str(step))) for step in {choice.step, last}}
            for key in (*SHARES, "truth"):
                gains.setdefault(key, []).append(truths[choice.step][key] - truths[last][key])
            cells = " | ".join(f"{truths[choice.step][key]:.2f} / {truths[last][key]:.2f}" for key in (*SHARES, "truth"))
            lines.append(f"| {name} | {subject} | {end} | {choice.step} | {last} | {cells} |")
            print(lines[-1], flush=True)
        intervals = {key: bootstrap.bootstrap_interval(values, [()] * len(values)) for key, values in gains.items()}
        total = intervals["truth"]
        totals.append(
            f"| {name} | {total.mean:+.3f} ({total.low:+.3f} to {total.high:+.3f}) | {total.above:.2f} | "
            + " | ".join(f"{intervals[key].mean:+.3f}" for key in SHARES) + " |"
        )  # fmt: skip
        print(totals[-1], flush=True)
    text = "\n".join([*totals, "", *lines]) + "\n"
    write_text(work / f"{slug('-'.join(['choosing', only, *settings]))}.md", text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
