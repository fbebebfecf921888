"""Captions of photos: found, decoded, and held against the word they should say, before anything is trained on them."""

import codecs
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_jsonl, write_text
from personalize.common.prompts import fill
from personalize.common.settings import read_toml
from personalize.common.untrusted import DEEPEST, Table, Text, read_bytes
from personalize.data.crops import Photo
from personalize.models.interface import LatentModel

ENDINGS = (".txt", ".caption")  # in any case, in place of the photo's ending or behind it
TABLE = "metadata.jsonl"  # of an imagefolder: {"file_name": "a.jpg", "text": "a dog"}
ROW = Table({"file_name": Text(most=255), "text": Text()}, needs=("file_name",))
LIST = "captions.toml"  # "a.jpg" = "a dog", a line for each photo beside it
TEMPLATE = "train.prompt"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_caption(photo: Path) -> str | None:
    """The caption of a photo, on one line; None where there is none or it is empty.

    It is a.txt, a.caption or a.jpg.txt beside a.jpg, a row of metadata.jsonl, or a line of captions.toml. UserError where
    there are several, or where one is not text.
    """
    captions = _sources(photo)
    if len(captions) > 1:
        raise UserError(f"{photo} has {len(captions)} captions: {', '.join(name for name, _ in captions)}. Keep one of them.")
    return " ".join("".join(text for _, text in captions).split()) or None


def write_caption(photo: Path, text: str, *, others: Collection[str]) -> Path | None:
    """Writes a.txt beside a.jpg, or a.jpg.txt where another of `others` is called a; None where there is one, be it empty."""
    if _sources(photo):
        return None
    shared = any(Path(name).stem == photo.stem and name != photo.name for name in others)
    path = photo.with_name(f"{photo.name if shared else photo.stem}.txt")
    write_text(path, f"{text}\n")
    return path


def _sources(photo: Path) -> list[tuple[str, str]]:
    """The file and the text of each caption, be it empty."""
    names = {f"{name}{ending}" for name in (photo.stem, photo.name) for ending in ENDINGS}
    beside = sorted(path for path in photo.parent.iterdir() if path.stem + path.suffix.lower() in names)
    captions = [(path.name, _decode(path)) for path in beside]
    rows = read_jsonl(photo.parent / TABLE, ROW)
    captions += [(TABLE, row["text"]) for row in rows if row["file_name"] == photo.name and "text" in row]
    captions += [(LIST, text) for name, text in _read_list(photo.parent / LIST) if name == photo.name]
    return captions


def _read_list(path: Path) -> list[tuple[str, str]]:
    """The lines `"a.jpg" = "a dog"` of captions.toml. UserError for one that is no text, or of a file that is not there."""
    if not os.path.lexists(path):
        return []
    lines, files = list(_entries(read_toml(path, "list of captions"))), {file.name for file in path.parent.iterdir()}
    for name, text in lines:
        if not isinstance(text, str):
            raise UserError(
                f'{path}: the caption of {name[:60]!r} is no text. Write it as: "a.jpg" = "a {{token}} {{class}} asleep"'
            )
        if name not in files:
            raise UserError(f"{path} has a caption for {name[:60]!r}, and no such file lies beside it. Correct the name.")
    return lines


def _entries(table: dict, prefix: str = "", levels: int = DEEPEST) -> Iterator[tuple[str, object]]:
    """Names and values: the dots of a.jpg, written without quotes, are tables to TOML."""
    for name, value in table.items():
        if isinstance(value, dict) and levels:
            yield from _entries(value, f"{prefix}{name}.", levels - 1)
        else:
            yield prefix + name, value


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


def add_token(model: LatentModel, photos: Sequence[Photo], *, token: str, word: str) -> tuple[list[Photo], list[str]]:
    """The photos, each caption of which says the token, and a remark where one did not.

    It is put before the class word, "a dog in the snow" -> "a {token} dog in the snow"; where that is not said, or too late
    for the base to see, "a {token} {class}, " is put before all. UserError for an unknown placeholder.
    """
    said = [_with_token(model, photo, token, word) if photo.caption else photo for photo in photos]
    changed = [new for new, old in zip(said, photos, strict=True) if new.caption != old.caption]
    if not changed:
        return said, []
    more = f" and of {len(changed) - 1} more" if len(changed) > 1 else ""
    return said, [
        f"the caption of {changed[0].name}{more} did not say {token!r}, which was put in: "
        f"{fill(changed[0].caption, token, word)!r} (captions.add_token=false refuses such captions)"
    ]


def _with_token(model: LatentModel, photo: Photo, token: str, word: str) -> Photo:
    if model.says(_filled(photo.caption, f"the caption of {photo.path}", token, word), token):
        return photo
    noun = re.compile(rf"(?<![\w{{-])(?:(a)n )?(\{{class\}}|{re.escape(word)})(?![\w-])", re.IGNORECASE)
    before = noun.sub(lambda match: f"{match[1] + ' ' if match[1] else ''}{{token}} {match[2]}", photo.caption, count=1)
    if not model.says(fill(before, token, word), token, whole=False):
        before = f"a {{token}} {{class}}, {photo.caption}"
    return replace(photo, caption=before)


def check_captions(
    model: LatentModel, photos: Sequence[Photo], template: str, *, token: str, word: str, learns_word: bool
) -> list[str]:
    """Remarks on what is trained on: `template`, or a photo's own caption, filled in.

    UserError for a placeholder that is unknown, for a token that is cut off, for a caption that does not say it, and, where a
    new word is learned (`learns_word`), for a template that does not.
    """
    remarks = []
    texts = {f"the caption of {photo.path}": photo.caption for photo in photos if photo.caption}
    if len(texts) < len(photos):
        texts[TEMPLATE] = template
    for where, text in texts.items():
        prompt = _filled(text, where, token, word)
        if rest := model.truncated_words(prompt):
            remarks.append(f"{where} is too long for this base, which does not see {rest!r}")
            if model.says(prompt, token) and not model.says(prompt, token, whole=False):
                raise UserError(f"{remarks[-1]}, and with it not {token!r}. Shorten it, or put {{token}} first.")
        if model.says(prompt, token):
            continue
        if where != TEMPLATE:
            remedy = "Write {token} where the subject is named, or set captions.add_token=true."
            raise UserError(f"{where} does not say {token!r}. {remedy}")
        if learns_word:
            raise UserError(f"{where} does not say {token!r}, the word that is learned. Write {{token}} where it belongs.")
        remarks.append(
            f"{where} does not say {token!r}: what these photos show is taught to every {word}. "
            "Write {token} where the subject is named."
        )
    return remarks


def _filled(text: str, where: str, token: str, word: str) -> str:
    """`fill`, whose UserError says where the text stands."""
    try:
        return fill(text, token, word)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
