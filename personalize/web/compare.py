"""Compare: two runs or checkpoints by the same prompts and noise, blind; and how often the metrics say what you say."""

import random
import secrets
import time

import gradio as gr

from personalize.common.errors import UserError
from personalize.common.files import append_jsonl
from personalize.common.run_list import states
from personalize.evaluation import votes
from personalize.web.app import Page, guarded, listed, text
from personalize.web.draw import draw, source

MOST_PROMPTS, MOST_COUNT = 30, 16


def build(page: Page, tab: gr.Tab, blocks: gr.Blocks) -> None:
    """The place, below its tab."""
    with gr.Row():
        one = gr.Dropdown([], label="One", interactive=True, min_width=300, elem_id="compare-one")
        two = gr.Dropdown([], label="The other", interactive=True, min_width=300, elem_id="compare-two")
    prompts = gr.Textbox("a {token} {class} swimming\na {token} {class} in the snow", label="Prompts, one a line", lines=3,
                         max_length=5000, elem_id="compare-prompts")  # fmt: skip
    with gr.Row():
        count = gr.Number(2, label="Images of each", minimum=1, maximum=MOST_COUNT, precision=0, elem_id="compare-count")
        seed = gr.Number(0, label="Seed", minimum=0, precision=0)
        go = gr.Button("Draw both, and show them blind", variant="primary", elem_id="compare-go")
    asks = gr.HTML()
    with gr.Row(elem_classes="blind"):
        left = gr.Image(label="Left", type="filepath", interactive=False, visible=False, buttons=[], elem_id="compare-left")
        right = gr.Image(label="Right", type="filepath", interactive=False, visible=False, buttons=[])
    with gr.Row(visible=False) as ballot:
        for_left = gr.Button("Left is better", elem_id="vote-left")
        for_none = gr.Button("Neither", elem_id="vote-neither")
        for_right = gr.Button("Right is better", elem_id="vote-right")
    result = gr.HTML()
    pairs = gr.State([])

    def looked(first, second):
        names = [f"{run.name} · {at}" for run in page.space.runs() for at in states(run)]
        return listed(names, first), listed(names, second, 1)

    def drawn(first, second, texts, number, start):
        if not first or not second or first == second:
            raise UserError("choose two different runs or checkpoints.")
        lines, number = [line.strip() for line in texts.splitlines() if line.strip()], int(number or 1)
        if not 1 <= len(lines) <= MOST_PROMPTS or not 1 <= number <= MOST_COUNT:
            raise UserError(f"give 1 to {MOST_PROMPTS} prompts, and 1 to {MOST_COUNT} images of each.")
        place = page.space.own / "compare" / time.strftime("%Y%m%d-%H%M%S")
        drawn_by = [draw(page, "generate", source(page, *side.split(" · "), ""), [number, int(start or 0)], *lines,
                          out=place / secrets.token_hex(4)) for side in (first, second)]  # fmt: skip
        rows = [
            {"a": first, "b": second, "prompt": lines[k // number], "index": k % number, "files": files, "turned": turned}
            for k, files in enumerate(zip(*drawn_by)) for turned in [random.random() < 0.5]
        ]  # fmt: skip
        random.shuffle(rows)
        return show(rows)

    def show(rows):
        """The next pair; where none is left, what the votes say."""
        if not rows:
            return rows, "", *[gr.update(value=None, visible=False)] * 2, gr.update(visible=False), said()
        files = rows[0]["files"][:: -1 if rows[0]["turned"] else 1]
        images = [gr.update(value=file, visible=True) for file in files]
        return rows, text("asks", prompt=rows[0]["prompt"], left=len(rows)), *images, gr.update(visible=True), ""

    def said():
        return text("votes", rows=votes.standing(page.space.own / "votes.jsonl", page.space.runs_folder))

    def voted(rows, side):
        if not rows:
            raise UserError("there is nothing to vote about. Draw both first.")
        first, turned = rows[0], rows[0]["turned"]
        vote = "neither" if side == "neither" else "ab"[(side == "right") != turned]
        append_jsonl(page.space.own / "votes.jsonl", {k: first[k] for k in ("a", "b", "prompt", "index")} | {"vote": vote})
        return show(rows[1:])

    shown = [pairs, asks, left, right, ballot, result]
    tab.select(guarded(looked), [one, two], [one, two], show_progress="hidden")
    tab.select(lambda rows: "" if rows else said(), pairs, result, show_progress="hidden")
    go.click(guarded(drawn), [one, two, prompts, count, seed], shown)
    for button, side in ((for_left, "left"), (for_none, "neither"), (for_right, "right")):
        button.click(guarded(lambda rows, side=side: voted(rows, side)), pairs, shown)
