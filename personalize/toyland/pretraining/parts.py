"""What can be trained onto a finished base and lies in a folder of its own beside its U-Net: a row for each."""

from typing import NamedTuple


class Part(NamedTuple):
    module: str  # of this folder; has Settings (a dataclass of `setting`s) and train(model, out, work, settings, say)
    folder: str  # in the base
    doc: str


PARTS: dict[str, Part] = {
    "student": Part("student", "student", "a LoRA that draws in two steps, for `generate --fast`"),
    "image-adapter": Part("image_adapter", "ip_adapter", "photos beside the prompt, for generate --image-prompt"),
    "upscaler": Part("upscaler", "upscaler", "twice as many pixels: 64 to 128 px"),
    "layout": Part("layout", "layout", "boxes that say where the subject and its accessory are"),
}
