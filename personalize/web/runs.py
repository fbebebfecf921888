"""Runs: all run folders with verdict, scores and disk; report, evaluation, export and deletion."""

import html
from pathlib import Path

import gradio as gr

from personalize.common.errors import UserError
from personalize.common.job_queue import call
from personalize.common.run_list import Run, delete_run, disk, evaluation
from personalize.web.app import Page, frame, guarded, listed, text

FORMATS = ("diffusers", "single-file", "kohya", "a1111-embedding")  # of `export`, which says what a run has
SHOWN_SCORES = ("dino", "clip_t")


def build(page: Page, tab: gr.Tab, blocks: gr.Blocks) -> None:
    """The place, below its tab."""
    overview = gr.HTML(elem_classes="runs")
    with gr.Row():
        run = gr.Dropdown([], label="Run", interactive=True, min_width=300, elem_id="runs-run")
        evaluate = gr.Button("Evaluate", elem_id="runs-evaluate")
        report = gr.Button("Show the report", elem_id="runs-report")
    with gr.Row():
        form = gr.Dropdown(list(FORMATS), value="diffusers", label="Export for", min_width=300, elem_id="runs-format")
        export = gr.Button("Export and check", elem_id="runs-export")
        ask = gr.Button("Delete …", variant="stop", elem_id="runs-delete")
        sure = gr.Button("Yes, delete it for good", variant="stop", visible=False, elem_id="runs-delete-sure")
    note = gr.HTML()
    file = gr.File(label="What was written", visible=False, interactive=False)
    shown = gr.HTML()

    def looked(chosen):
        runs = page.space.runs()
        return text("runs", rows=[row(one) for one in runs]), listed([one.name for one in runs], chosen)

    def evaluated(name):
        folder = page.space.run(name).folder
        return text("note", lines=call(page.space.root, "evaluate", str(folder))["metrics"]["verdict"]), show(name)

    def show(name):
        path = page.space.run(name).folder / "evaluation" / "report.html"
        if not path.exists():
            raise UserError(f"{name} was not evaluated yet. Press Evaluate first.")
        return frame(path, f"report of {name}")

    def exported(name, to):
        if to not in FORMATS:
            raise UserError(f"there is no format {to!r}. Choose one of {', '.join(FORMATS)}.")
        values = call(page.space.root, "export", "--to", to, "--", str(page.space.run(name).folder))
        path = page.space.inside(values["file"])
        lines = [f"written and checked: {path.relative_to(page.space.root)}"]
        return text("note", lines=lines), gr.update(value=str(path) if path.is_file() else None, visible=path.is_file())

    def asked(name):
        one = page.space.run(name)
        count, size = disk(one.folder)
        line = f"{one.name} goes for good: {count} files, {size / 1e6:.1f} MB, with its checkpoints, images and scores."
        return text("note", lines=[line]), gr.update(visible=True, value=f"Yes, delete {one.name}")

    def deleted(name):
        delete_run(page.space.run(name))
        gr.Info(html.escape(f"{name} is deleted."), title="Done")
        return looked(None)

    def turned():
        """What was said and shown of the run before is not this one's."""
        return "", "", *[gr.update(visible=False)] * 2

    table = [overview, run]
    tab.select(guarded(looked), run, table, show_progress="hidden")
    run.change(turned, None, [note, shown, sure, file], show_progress="hidden")
    evaluate.click(guarded(evaluated), run, [note, shown]).then(guarded(looked), run, table)
    report.click(guarded(show), run, shown)
    export.click(guarded(exported), [run, form], [note, file])
    ask.click(guarded(asked), run, [note, sure])
    sure.click(guarded(deleted), run, table)


def row(run: Run) -> dict:
    """What the list says of a run; a score that is not there is None."""
    manifest, metrics = run.manifest, evaluation(run) or {}
    scores = {name: metrics.get("scores", {}).get(name, {}).get("score") for name in SHOWN_SCORES}
    train = manifest.get("recipe", {}).get("train", {})
    return {
        "name": run.name, "status": run.status, "problem": run.problem, "bytes": disk(run.folder)[1],
        "prompt": next((s.get("prompt", "") for s in manifest.get("subjects", [])), ""),
        "base": Path(str(manifest.get("base", ""))).name, "methods": manifest.get("methods", []), "steps": train.get("steps"),
        "verdict": metrics.get("verdict", []), "levels": metrics.get("verdict_levels", []), "scores": scores,
        "photos": run.folder / "photos.png" if (run.folder / "photos.png").exists() else None,
    }  # fmt: skip
