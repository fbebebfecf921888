"""Train: what is asked of `train`, its plan, the queue, and a run as it goes."""

import gradio as gr
from PIL import Image

from personalize.common.errors import UserError
from personalize.common.files import read_jsonl, write_text
from personalize.common.job_queue import FAILED, QUEUED, RUNNING, STOPPED, Job, said
from personalize.common.recipe import SETTINGS, recipe_from_dict
from personalize.common.recipe_sections import METHODS
from personalize.common.run_folder import SAVE_NOW
from personalize.data.image_grid import LINE
from personalize.web import settings_form
from personalize.web.app import Page, guarded, text

SAMPLES, LAST = 24, 20  # steps whose sample images are shown; rows that say how fast it goes


def build(page: Page, tab: gr.Tab, blocks: gr.Blocks) -> None:
    """The place, below its tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            subject = gr.Dropdown([], label="Photos of", interactive=True, elem_id="train-subject")
            base = gr.Dropdown(list(page.bases), value="toyland", label="Base", info=SETTINGS["base"].doc,
                               allow_custom_value=True, elem_id="train-base")  # fmt: skip
            with gr.Row():
                method = gr.Dropdown([("the recipe's", ""), *((m, m) for m in METHODS)], value="", label="Method")
                recipe = gr.Dropdown([("none", ""), *((r, r) for r in settings_form.recipes())], value="", label="Recipe")
            with gr.Accordion("Every other setting", open=False, elem_id="train-settings"):
                fields = settings_form.fields()
            differences = gr.HTML(elem_classes="differences")
            with gr.Row():
                plan = gr.Button("Plan: memory and time", elem_id="train-plan")
                start = gr.Button("Train", variant="primary", elem_id="train-start")
            planned = gr.HTML()
        with gr.Column(scale=3, min_width=320):
            job = gr.Dropdown([], label="Training", interactive=True, elem_id="train-job")
            with gr.Row():
                stop = gr.Button("Stop", variant="stop", elem_id="train-stop")
                resume = gr.Button("Resume", elem_id="train-resume")
                save = gr.Button("Save and sample now", elem_id="train-save")
            watched = gr.HTML(elem_classes="watched")
    seen, timer = gr.State(""), gr.Timer(2)
    head, values = [base, method, recipe], list(fields.values())

    def words(name, *given):
        photos, class_word = page.space.subject(name), page.space.class_word(name)
        changed = dict(zip(fields, given[3:], strict=True))
        texts = settings_form.settings_of(page.space, changed, given[:3], page.bases)
        path = settings_form.recipe_path(given[2])
        return [*(["--recipe", str(path)] if path else []), *(w for t in texts for w in ("--set", t)),
                "--class", class_word, "--", str(photos)]  # fmt: skip

    def plan_of(*given):
        return text("note", lines=said(page.space.root, "plan", *words(*given)).splitlines())

    def started(name, *given):
        title = f"{name}, {given[1] or given[2] or given[0]}"
        return watch(page.jobs.add(["train", *words(name, *given)], title).path.stem, "")

    def marked(*given):
        page.space.require_plain(given[0], page.bases)
        changed = settings_form.changes(dict(zip(fields, given[3:], strict=True)), settings_form.defaults(*given[:3]))
        rows = [(key, settings_form.element(key), settings_form.shown(value)) for key, value in changed.items()]
        return text("differences", rows=rows)

    def reset(*given):
        page.space.require_plain(given[0], page.bases)
        start = settings_form.defaults(*given)
        return [settings_form.shown(start[key]) for key in fields]

    def watch(name, before):
        page.jobs.tick()
        choices = _choices(page)
        value = name if name in [c[1] for c in choices] else next((c[1] for c in choices), None)
        now = watched_html(page, page.jobs.read(page.jobs.path(value))) if value else text("watch", job=None)
        key = f"{hash(now)} {value} {choices}"
        return [gr.skip()] * 3 if key == before else (gr.update(choices=choices, value=value), now, key)

    def told(act):
        return guarded(lambda name: (act(name), watch(name, ""))[1])

    def saved(name):
        one = page.jobs.read(page.jobs.path(name))
        if one.state != RUNNING or not one.run:
            raise UserError("this training has no step yet that could be saved, or has ended.")
        write_text(page.space.run(one.run).folder / SAVE_NOW, "")

    seen_by = [job, watched, seen]
    tab.select(page.subjects, subject, subject, show_progress="hidden")
    blocks.load(guarded(watch), [job, seen], seen_by, show_progress="hidden")
    timer.tick(guarded(watch), [job, seen], seen_by, show_progress="hidden")
    job.input(guarded(watch), [job, gr.State("")], seen_by, show_progress="hidden")
    gr.on([c.change for c in head], guarded(reset), head, values, show_progress="hidden")
    gr.on([c.change for c in values], guarded(marked), [*head, *values], differences, show_progress="hidden",
          trigger_mode="always_last")  # fmt: skip
    plan.click(guarded(plan_of), [subject, *head, *values], planned)
    start.click(guarded(started), [subject, *head, *values], seen_by)
    stop.click(told(page.jobs.stop), job, seen_by)
    save.click(guarded(saved), job, None)
    resume.click(told(page.jobs.resume), job, seen_by)


def _choices(page: Page) -> list[tuple[str, str]]:
    return [(f"{int(job.path.stem)}. {job.title}: {job.state}", job.path.stem) for job in reversed(page.jobs.all())]


def watched_html(page: Page, job: Job) -> str:
    """A training as its run folder shows it now."""
    try:
        run = page.space.run(job.run) if job.run else None
    except UserError:  # it was deleted
        run = None
    values = {"job": job, "error": job.error, "log": job.log, "live": job.state in (RUNNING, QUEUED), "run": run}
    values |= {"can_resume": job.state in (STOPPED, FAILED), "losses": "", "path": "", "samples": [], "step": 0, "steps": 0}
    if run and not run.problem:
        recipe = recipe_from_dict(run.manifest["recipe"], "the run's recipe")
        rows = read_jsonl(run.folder / "log.jsonl")
        values |= {"step": rows[-1]["step"] if rows else 0, "steps": recipe.train.steps} | _figures(run, recipe, rows)
        pace = [row["seconds"] for row in rows[-LAST:]]
        seconds = sum(pace) / len(pace) if pace and job.state == RUNNING else None
        values["left"] = seconds and seconds * (recipe.train.steps - values["step"])
        files = sorted((run.folder / "samples").glob("step-*.png"))[-SAMPLES:]
        values |= {"samples": [(int(path.stem[5:]), path) for path in files], "line": LINE}
        values["size"] = Image.open(files[-1]).size if files else None
        values["prompts"] = [run.manifest["subjects"][0][key] for key in ("prompt", "class")]
    return text("watch", **values)


def _figures(run, recipe, rows: list[dict]) -> dict:
    """The loss of the photos and of the class images, smoothed; identity and adherence of scored checkpoints."""
    from personalize.evaluation import checkpoint_selection
    from personalize.evaluation.report import figures

    scored = checkpoint_selection.read_scored(run.folder / checkpoint_selection.FILE)
    chosen = run.manifest.get("chosen"), run.manifest.get("strength", 1.0)
    path = checkpoint_selection.checkpoint_rows(scored, recipe.choose, chosen)
    return {
        "losses": figures.training_losses(rows) if len(rows) > 1 else "",
        "path": figures.checkpoint_path(path) if path else "",
    }
