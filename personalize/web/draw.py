"""Draw: images by a run or a bare base, the base beside it from the same noise; and images drawn again with other words."""

from pathlib import Path

import gradio as gr
from PIL import Image

from personalize.common.errors import UserError
from personalize.common.files import read_jsonl, writing
from personalize.common.job_queue import call
from personalize.common.recipe import SETTINGS
from personalize.common.run_list import states
from personalize.common.settings import parse_value, to_toml_value, validated
from personalize.web.app import Page, editable, gallery, guarded, listed, painter, text
from personalize.web.settings_form import element

KEYS = "draw.count", "seed", "draw.steps", "draw.guidance", "draw.like", "draw.sampler", "draw.negative"
IN_ROW = ("seed", "draw.steps", "draw.guidance", "draw.sampler", "draw.negative")  # by their last words
NO_RUN, NEWEST = "the bare base", "newest"  # newest: the result, or the last checkpoint while there is none


def build(page: Page, tab: gr.Tab, blocks: gr.Blocks) -> None:
    """The place, below its tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                run = gr.Dropdown([], label="Run", interactive=True, min_width=300, elem_id="draw-run")
                state = gr.Dropdown([NEWEST], value=NEWEST, label="Checkpoint", interactive=True, elem_id="draw-state")
                base = gr.Dropdown(list(page.bases), value="toyland", label="Base, where no run", allow_custom_value=True)
            prompt = gr.Textbox("a {token} {class} swimming", label="Prompt", info="{token} and {class} are the run's", lines=2,
                                max_length=1000, elem_id="draw-prompt")  # fmt: skip
            with gr.Row(elem_classes="settings"):
                fields = [_field(key) for key in KEYS]
            beside = gr.Checkbox(False, label="The base beside it, from the same noise")
            go = gr.Button("Draw", variant="primary", elem_id="draw-go")
            with gr.Accordion("Draw it again with other words", open=False):
                target = gr.Textbox(label="What it is to show instead", max_length=1000)
                edit = gr.Button("Edit")
            with gr.Accordion("Paint a part of the chosen image anew", open=False):
                editor = painter("White is painted anew")
                inpaint = gr.Button("Paint anew what the prompt says")
        with gr.Column(scale=3, min_width=300):
            images = gallery("Images", elem_id="draw-images")
            of_base = gallery("The base, from the same noise", visible=False)
            about, again = gr.HTML(), gr.Button("Use these settings again", visible=False)
    files, chosen, hidden = gr.State([]), gr.State(""), gr.update(visible=False)
    asked = [run, state, base, prompt, *fields]

    def looked(name, at):
        runs = [one for one in page.space.runs() if any(states(one))]
        names = {one.name: [NEWEST, *states(one)] for one in runs} | {NO_RUN: [NEWEST]}
        name = name if name in names else next(iter(names))
        return listed(names, name), listed(names[name], at), gr.update(visible=name == NO_RUN)

    def drawn(name, at, of, words, *values):
        *options, with_base = values
        paths = draw(page, "generate", source(page, name, at, of), options, words)
        other = []
        if with_base and name != NO_RUN:
            manifest = page.space.run(name).manifest
            bare = words.replace("{token} ", "").replace("{class}", manifest["subjects"][0]["class"])
            other = draw(page, "generate", ["--base", str(manifest["base"])], options, bare)
        return shown(paths, other)

    def shown(paths, other=()):
        """New images, of which none is chosen yet."""
        return gr.update(value=paths, selected_index=None), gr.update(value=other, visible=bool(other)), paths, "", hidden

    def edited(name, at, of, words, *values):
        return shown(draw(page, "edit", source(page, name, at, of), values[:-1], words, values[-1]))

    def painted(name, at, of, words, *values):
        *options, painting, path = values
        layers = [layer.getchannel("A") for layer in (painting or {}).get("layers", []) if layer is not None]
        if not path or not layers or not layers[0].getbbox():
            raise UserError("choose an image of the list, and paint over the part that is to change.")
        mask = page.space.own / "drawn" / "mask.png"
        with writing(mask) as temporary:
            layers[0].save(temporary)
        begin = ["--image", str(page.space.inside(path)), "--mask", str(mask)]
        return shown(draw(page, "generate", [*source(page, name, at, of), *begin], options[:5] + [""] + options[6:], words))

    def opened(paths, event: gr.SelectData):
        path = page.space.inside(paths[event.index])
        row = row_of(path)
        row = {key: page.space.within(value) for key, value in row.items()}
        return text("row", row=row, name=path.name), gr.update(visible=bool(row)), str(path), editable(Image.open(path))

    def reused(path, *values):
        row = row_of(page.space.inside(path))
        names = [key.rpartition(".")[2] if key in IN_ROW else "" for key in KEYS]
        return row["prompt"], *(str(row.get(name, value)) for name, value in zip(names, values, strict=True))

    lists = [run, state, base]
    gr.on([tab.select, run.input], guarded(looked), lists[:2], lists, show_progress="hidden")
    results = [images, of_base, files, about, again]
    go.click(guarded(drawn), [*asked, beside], results, scroll_to_output=True)
    edit.click(guarded(edited), [*asked, target], results, scroll_to_output=True)
    inpaint.click(guarded(painted), [*asked, editor, chosen], results, scroll_to_output=True)
    images.select(opened, files, [about, again, chosen, editor])
    again.click(guarded(reused), [chosen, *fields], [prompt, *fields])


def _field(key: str) -> gr.components.Component:
    s, name = SETTINGS[key], key.rpartition(".")[2]
    options = {"label": name, "info": s.doc, "elem_id": "draw-" + element(key), "min_width": 130, "interactive": True}
    if s.choices:
        return gr.Dropdown([("the recipe's", ""), *((c, c) for c in s.choices)], value="", **options)
    return gr.Textbox("", placeholder="the recipe's", max_lines=1, max_length=500, **options)


def source(page: Page, name: str, at: str, base: str) -> list[str]:
    """The options that say what draws: a run at a checkpoint, or a bare base."""
    if name == NO_RUN:
        return ["--base", page.space.require_plain(base, page.bases)]
    run = page.space.run(name)
    found = list(states(run))
    if at not in (NEWEST, *found):
        raise UserError(f"{name} has no checkpoint {at!r} any more. Open this place again, and choose one from the list.")
    at = next(iter(found), "result") if at == NEWEST else at
    return ["--run", str(run.folder), *([] if at == "result" else ["--checkpoint", at])]


def draw(page: Page, command: str, of: list[str], values: list, *words: str, out: Path | None = None) -> list[str]:
    """Draws by a command -> the images. UserError for a setting that cannot be, or an empty prompt."""
    if not all(word and word.strip() for word in words):
        raise UserError("what to draw? Write a prompt.")
    given = []
    for key, value in zip(KEYS, values):
        if str(value if value is not None else "").strip():
            value = validated(SETTINGS[key], parse_value(str(value), SETTINGS[key].kind), "the form")
            given += ["--set", f"{key}={to_toml_value(value)}"]
    out = out or page.space.own / "drawn"
    values = call(page.space.root, command, *of, *given, "--out", str(out), "--", *words)
    return [str(page.space.inside(path)) for path in values["files"]]


def row_of(path: Path) -> dict:
    """All that decides an image, of the images.jsonl beside it; {} where it is not there."""
    rows = read_jsonl(path.parent / "images.jsonl")
    return next((row for row in reversed(rows) if row.get("file") == path.name), {})
