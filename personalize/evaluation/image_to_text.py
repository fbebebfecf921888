"""Captions by a model that writes, BLIP or Florence-2, from a local folder: safetensors only, no code of strangers.

What it writes describes the subject too; `without_subject` keeps what it does and where it is.
"""

import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.common.untrusted import Table, Text, require_regular
from personalize.models.lazy_imports import lazy_imports

TASKS = {"blip": "", "florence2": "<CAPTION>"}  # model type -> the text that asks it for a caption
CONFIG = Table({"model_type": Text()}, needs=("model_type",))
LONGEST = 40  # tokens written
WORDS = 16  # kept

# After the subject: words that begin what is kept, and words that begin what is not, up to the next of the first.
PLACES = (
    "in on at by under over near beside behind inside outside through along across against between among around above below "
    "beneath underneath next into from during towards atop"
)
LOOKS = "with wearing having has have had that which who whose is are and but made dressed covered named called while"
BEGINS, ENDS = frozenset(PLACES.split()), frozenset(LOOKS.split())
NOUNS = "thing something nothing anything everything string ring wing king ceiling building clothing"
NO_VERBS = frozenset(NOUNS.split())
PIECE = re.compile(r"with (?:[\w'-]+ ){1,5}in the (?:back|fore)ground|[\w'-]+", re.IGNORECASE)


def model_type(folder: Path) -> str:
    """What its config.json says. UserError for a folder without one, or without safetensors."""
    if not folder.is_dir():
        raise UserError(f"the captioner {folder} is no folder here. Give one with its config.json and model.safetensors.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"the captioner {folder} holds no model.safetensors, and pickled weights (.bin, .pth) are never read. "
            "Convert them, or give another folder."
        )
    for file in weights:
        require_regular(file, "weight file")
    return read_json(folder / "config.json", CONFIG)["model_type"]


def load_image_to_text(folder: Path, device) -> Callable[[Image.Image], str]:
    """RGB image -> the model's caption of it. UserError for a folder of another kind, damaged, or with weights missing."""
    kind = model_type(folder)
    if kind not in TASKS:
        raise UserError(f"the captioner {folder} is of the kind {kind!r}. Give a folder of CLIP, BLIP or Florence-2.")
    with lazy_imports():
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **own)
        if getattr(config, "quantization_config", None):
            raise ValueError("its config asks for another library by quantization_config")
        network, info = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, dtype="float32", **own
        )
        processor = AutoProcessor.from_pretrained(folder, **own)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise UserError(f"cannot load the captioner {folder}: {reason}. Give a whole folder of transformers.") from error
    if info["missing_keys"]:
        raise UserError(f"the weights of the captioner {folder} lack {sorted(info['missing_keys'])[0]}. Give a whole folder.")
    network.to(device).eval().requires_grad_(False)

    def describe(image: Image.Image) -> str:
        inputs = processor(images=image, **({"text": TASKS[kind]} if TASKS[kind] else {}), return_tensors="pt").to(device)
        ids = network.generate(**inputs, max_new_tokens=LONGEST, num_beams=3, do_sample=False)
        return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    return describe


def without_subject(text: str, class_word: str) -> str:
    """A caption -> a template: "a brown dog with a collar sleeping in the snow" -> "a {token} {class} sleeping in the snow".

    Of what follows the class word, or of all where it is not said, words are kept from one that is a verb's -ing or says
    where, up to one that says what something is like. Read what it gives: it knows words, not sentences.
    """
    match = re.search(rf"(?<!\w){re.escape(class_word)}(?!\w)", text, re.IGNORECASE)
    kept, keeps = [], False
    for piece in PIECE.findall(text[match.end() :] if match else text):
        word = piece.lower()
        if word.endswith("ground") and " " in word:
            keeps = True
        elif word in ENDS:
            keeps = False
        elif word in BEGINS or (word.endswith("ing") and len(word) > 4 and word not in NO_VERBS):
            keeps = True
        kept += [word] if keeps else []
    return " ".join(["a {token} {class}", *" ".join(kept).split()[:WORDS]])
