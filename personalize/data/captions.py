"""Captions of photos: found, decoded, and held against the word they should say, before anything is trained on them."""

import codecs
from collections.abc import Sequence
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.common.prompts import fill
from personalize.common.untrusted import Table, Text, read_bytes
from personalize.data.crops import Photo
from personalize.models.interface import LatentModel

ENDINGS = (".txt", ".caption")  # in any case, in place of the photo's ending or behind it
TABLE = "metadata.jsonl"  # of an imagefolder: {"file_name": "a.jpg", "text": "a dog"}
ROW = Table({"file_name": Text(most=255), "text": Text()}, needs=("file_name",))
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_caption(photo: Path) -> str | None:
    """The caption beside a photo, on one line; None where there is none or it is empty.

    It is a.txt, a.caption or a.jpg.txt beside a.jpg, or a row of metadata.jsonl. UserError where there are several, or where
    one is not text.
    """
    names = {f"{name}{ending}" for name in (photo.stem, photo.name) for ending in ENDINGS}
    beside = sorted(path for path in photo.parent.iterdir() if path.stem + path.suffix.lower() in names)
    captions = {path.name: _decode(path) for path in beside}
    if (photo.parent / TABLE).exists():
        rows = [row for row in read_jsonl(photo.parent / TABLE, ROW) if row["file_name"] == photo.name and "text" in row]
        captions |= {TABLE: rows[-1]["text"]} if rows else {}
    if len(captions) > 1:
        raise UserError(f"{photo} has {len(captions)} captions: {', '.join(captions)}. Keep one of them.")
    return " ".join("".join(captions.values()).split()) or None


def _decode(path: Path) -> str:
    """UTF-8, or what the file's mark says, as Windows writes UTF-16."""
    data = read_bytes(path, "caption")
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"the caption {path} is not UTF-8 text. Save it as UTF-8.")
    return text


def check_captions(
    model: LatentModel, photos: Sequence[Photo], template: str, *, token: str, word: str, learns_word: bool
) -> list[str]:
    """Remarks on what is trained on: `template`, or a photo's own caption, filled in.

    UserError for a placeholder that is unknown, for a token that is cut off, and, where a new word is learned
    (`learns_word`), for a prompt that does not say it.
    """
    remarks, silent = [], []
    texts = {f"the caption of {photo.path}": photo.caption for photo in photos if photo.caption}
    if len(texts) < len(photos):
        texts["train.prompt"] = template
    for where, text in texts.items():
        try:
            prompt = fill(text, token, word)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if rest := model.truncated_words(prompt):
            remarks.append(f"{where} is too long for this base, which does not see {rest!r}")
            if model.says(prompt, token) and not model.says(prompt, token, whole=False):
                raise UserError(f"{remarks[-1]}, and with it not {token!r}. Shorten it, or put {{token}} first.")
        if not model.says(prompt, token):
            silent.append(where)
    if silent and learns_word:
        raise UserError(f"{silent[0]} does not say {token!r}, the word that is learned. Write {{token}} where it belongs.")
    if silent:
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        remarks.append(
            f"{silent[0]}{more} does not say {token!r}: what these photos show is taught to every {word}. "
            "Write {token} where the subject is named."
        )
    return remarks
