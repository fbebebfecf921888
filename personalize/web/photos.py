"""Photos: a subject's photos, what is said of them, their captions and masks, and whether the base knows the class."""

from pathlib import Path

import gradio as gr

from personalize.common.job_queue import call
from personalize.web.app import Page, editable, frame, gallery, guarded, painter, text
from personalize.web.draw import NO_RUN, draw, source


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
    drawn = gallery("The base's images of the class", visible=False)
    sheet = gr.HTML()
    with gr.Accordion("Captions", open=False):
        captions = gr.Dataframe(headers=["photo", "caption"], type="array", datatype="str", static_columns=[0],
                                column_count=(2, "fixed"), show_label=False, wrap=True)  # fmt: skip
        keep_captions = gr.Button("Keep these captions")
    with gr.Accordion("Crop a photo, or paint its mask", open=False):
        photo = gr.Dropdown([], label="Photo", interactive=True)
        editor = painter("White where the subject is", "crop")
        with gr.Row():
            keep_crop = gr.Button("Keep this crop")
            keep_mask = gr.Button("Keep what is painted as its mask")

    def looked(who, of, *words):
        """The doctor's page and what can be edited of a subject that has photos. words: options that add to them first."""
        folder, lines = page.space.subject(who) if who else None, []
        if not who or not _edits().captions_of(folder):
            return text("note", lines=["No photos yet."] if who else []), "", [], gr.update(choices=[], value=None)
        out, plain = page.space.own / "photos" / f"{who}.html", page.space.require_plain(of, page.bases)
        values = call(page.space.root, "photos", "--base", plain, "--out", str(out), *words, "--", str(folder))
        if words:
            lines = [f["text"] for f in values["findings"] if f["severity"] != "ok"][-6:] or ["Done: see below."]
        rows = _edits().captions_of(folder)
        photos = gr.update(choices=[row[0] for row in rows], value=None)
        return text("note", lines=lines), frame(out, f"photos of {who}"), rows, photos

    def made(who, word):
        return page.subjects(page.space.new_subject(who, word))

    def dropped(who, paths, of):
        refused = _edits().add_photos(page.space.subject(who), [Path(path) for path in paths or []])
        said, *rest = looked(who, of)
        return None, text("note", lines=refused) + said, *rest

    def suggested(who, of):
        return looked(who, of, "--caption", "--class", page.space.class_word(who))

    def found(who, of):
        return looked(who, of, "--mask", f"word:{page.space.class_word(who)}")

    def class_images(who, of):
        prompt = f"a {page.space.class_word(who)}"
        images = draw(page, "generate", source(page, NO_RUN, "", of), [4], prompt)
        return gr.update(value=images, visible=True, label=f"{prompt}, by {of}")

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
    suggest.click(guarded(suggested), [subject, base], seen)
    find.click(guarded(found), [subject, base], seen)
    known.click(guarded(class_images), [subject, base], drawn)
    keep_captions.click(guarded(captioned), [subject, captions], note)
    photo.input(guarded(chosen), [subject, photo], editor)
    keep_crop.click(guarded(cropped), [subject, photo, editor, base], seen)
    keep_mask.click(guarded(masked), [subject, photo, editor, base], seen)


def _edits():
    """What changes photos. It imports torch: not before it is needed."""
    from personalize.data import photo_edits

    return photo_edits
