"""Photos: a subject's photos, what is said of them, their captions and masks, and whether the base knows the class."""

from pathlib import Path

import gradio as gr

from personalize.common.job_queue import call
from personalize.web.app import BUTTONS, Page, brush, editable, frame, guarded, text


def build(page: Page, tab: gr.Tab, blocks: gr.Blocks) -> None:
    """The place, below its tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            subject = gr.Dropdown([], label="Subject", interactive=True, elem_id="photos-subject")
            with gr.Row():
                name = gr.Textbox(label="New subject", placeholder="my dog", max_length=60, elem_id="photos-name")
                class_word = gr.Textbox(label="Class: what it is", placeholder="dog", max_length=60, elem_id="photos-class")
            make = gr.Button("Make, or change the class", elem_id="photos-make")
        with gr.Column(scale=3, min_width=300):
            files = gr.File(label="Drop 3 to 5 photos here", file_count="multiple", elem_id="photos-files", height=150)
            base = gr.Dropdown(list(page.bases), value="toyland", label="Base", allow_custom_value=True)
    with gr.Row():
        check = gr.Button("Look at them again", elem_id="photos-check")
        suggest = gr.Button("Suggest captions")
        find = gr.Button("Find the subject: masks")
        known = gr.Button("Does the base know the class?", elem_id="photos-known")
    note = gr.HTML()
    drawn = gr.Gallery(label="The base's images of the class", visible=False, columns=4, interactive=False,
                       buttons=BUTTONS)  # fmt: skip
    sheet = gr.HTML()
    with gr.Accordion("Captions", open=False):
        captions = gr.Dataframe(headers=["photo", "caption"], type="array", datatype="str", static_columns=[0],
                                column_count=(2, "fixed"), show_label=False, wrap=True)  # fmt: skip
        keep_captions = gr.Button("Keep these captions")
    with gr.Accordion("Crop a photo, or paint its mask", open=False):
        photo = gr.Dropdown([], label="Photo", interactive=True)
        editor = gr.ImageEditor(type="pil", sources=(), transforms=("crop",), layers=False, label="White where the subject is",
                                brush=brush(64))  # fmt: skip
        with gr.Row():
            keep_crop = gr.Button("Keep this crop")
            keep_mask = gr.Button("Keep what is painted as its mask")

    def looked(who, of):
        """The doctor's page and what can be edited of a subject that has photos."""
        folder = page.space.subject(who) if who else None
        rows = _edits().captions_of(folder) if who else []
        photos = gr.update(choices=[row[0] for row in rows], value=None)
        if not rows:
            return text("note", lines=["No photos yet."] if who else []), "", [], photos
        out = page.space.own / "photos" / f"{who}.html"
        plain = page.space.require_plain(of, page.bases)
        call(page.space.root, "photos", "--base", plain, "--out", str(out), "--", str(folder))
        return "", frame(out, f"photos of {who}"), rows, photos

    def made(who, word):
        return page.subjects(page.space.new_subject(who, word))

    def dropped(who, paths, of):
        refused = _edits().add_photos(page.space.subject(who), [Path(path) for path in paths or []])
        said, *rest = looked(who, of)
        return None, text("note", lines=refused) + said, *rest

    def added(option):
        def work(who, of):
            words = option(page.space.class_word(who))
            folder, plain = page.space.subject(who), page.space.require_plain(of, page.bases)
            out = page.space.own / "photos" / f"{who}.html"
            values = call(page.space.root, "photos", "--base", plain, "--out", str(out), *words, "--", str(folder))
            lines = [f["text"] for f in values["findings"] if f["severity"] != "ok"][-6:]
            return text("note", lines=lines or ["Done: see below."]), *looked(who, of)[1:]

        return work

    def class_images(who, of):
        prompt, plain = f"a {page.space.class_word(who)}", page.space.require_plain(of, page.bases)
        out = page.space.own / "drawn"
        values = call(page.space.root, "generate", "--base", plain, "--out", str(out), "--count", "4", "--", prompt)
        return gr.update(value=[str(path) for path in values["files"]], visible=True, label=f"{prompt}, by {of}")

    def captioned(who, rows):
        _edits().write_captions(page.space.subject(who), rows)
        return text("note", lines=["the captions are kept beside the photos"])

    def chosen(who, photo_name):
        return editable(_edits().photo_of(page.space.subject(who), photo_name).image) if photo_name else None

    def cropped(who, photo_name, edited, of):
        _edits().keep_photo_crop(page.space.subject(who), photo_name, edited)
        return looked(who, of)

    def masked(who, photo_name, edited, of):
        _edits().keep_photo_mask(page.space.subject(who), photo_name, edited)
        return looked(who, of)

    seen = [note, sheet, captions, photo]
    gr.on([blocks.load, tab.select], page.subjects, subject, subject, show_progress="hidden")
    make.click(guarded(made), [name, class_word], subject)
    subject.change(guarded(looked), [subject, base], seen)
    files.upload(guarded(dropped), [subject, files, base], [files, *seen])
    check.click(guarded(looked), [subject, base], seen)
    suggest.click(guarded(added(lambda word: ["--caption", "--class", word])), [subject, base], seen)
    find.click(guarded(added(lambda word: ["--mask", f"word:{word}"])), [subject, base], seen)
    known.click(guarded(class_images), [subject, base], drawn)
    keep_captions.click(guarded(captioned), [subject, captions], note)
    photo.input(guarded(chosen), [subject, photo], editor)
    keep_crop.click(guarded(cropped), [subject, photo, editor, base], seen)
    keep_mask.click(guarded(masked), [subject, photo, editor, base], seen)


def _edits():
    """What changes photos. It imports torch: not before it is needed."""
    from personalize.data import photo_edits

    return photo_edits
