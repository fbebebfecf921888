"""What can be trained onto a finished base: the name of each part -> its folder, beside the base's U-Net.

A part's module here has its name, with _ for -; in it are Settings, a dataclass of `setting`s, and
train(model, out, work, settings, say).
"""

PARTS = {
    "student": "student",  # a LoRA that draws in two steps, for `generate --fast`
    "image-adapter": "ip_adapter",  # photos beside the prompt, for `generate --image-prompt`
    "upscaler": "upscaler",  # twice as many pixels: 64 to 128 px
    "unclip": "unclip",  # a CLIP embedding in place of words, for `generate --unclip` and `--vary`
    "layout": "layout",  # boxes that say where the subject and its accessory are
}
