"""The tokenizer of a base that comes as a single file, which holds weights only.

CLIP's vocabulary (vocab.json, merges.txt) is the same for every Stable Diffusion; they differ in the padding only.
"""

import json
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.common.untrusted import read_bytes

HUB = "openai/clip-vit-large-patch14"
VOCABULARY_SIZE = 49408  # of OpenAI's vocabulary, which every program has
VOCABULARY, MERGES, ONE_FILE = "vocab.json", "merges.txt", "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"


def read_vocabulary(path: Path) -> tuple[dict[str, int], str]:
    """({piece: id}, text of merges.txt) for a single file at `path`.

    Looked for in a folder `tokenizer` beside the file, else in the hub's cache and on the hub. UserError says where to put
    them.
    """
    beside = Path(path).parent / "tokenizer"
    files = [beside / VOCABULARY, beside / MERGES]
    if not all(file.exists() for file in files):
        if (beside / ONE_FILE).exists():
            return _from_one_file(beside / ONE_FILE)
        files = [_download(name, path, beside) for name in (VOCABULARY, MERGES)]
    return _checked(files[0], read_json(files[0])), _text(files[1])


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: str, *, longest: int, openclip: bool) -> None:
    """Write a folder that transformers loads as a tokenizer for `longest` tokens at most.

    OpenCLIP's encoders were trained with prompts padded by the piece of id 0 ("!"), OpenAI's by the end.
    """
    folder.mkdir()
    pad = next((piece for piece, k in vocabulary.items() if k == 0), END) if openclip else END
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": longest, "do_lower_case": True, "errors": "replace"}
    config |= {"add_prefix_space": False} | special
    files = {VOCABULARY: vocabulary, "tokenizer_config.json": config, "special_tokens_map.json": special}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=None if name == VOCABULARY else 2) + "\n")
    (folder / MERGES).write_text(merges)


def _from_one_file(place: Path) -> tuple[dict[str, int], str]:
    """The vocabulary and merges of a tokenizer.json, which is all that transformers 5 writes."""
    model = read_json(place).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):
        raise UserError(f"{place} has no vocabulary with merges: it is not a tokenizer of CLIP's kind.")
    lines = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]
    return _checked(place, model.get("vocab")), "\n".join(["#version: 0.2", *lines]) + "\n"


def _checked(place: Path, pieces) -> dict[str, int]:
    ids = list(pieces.values()) if isinstance(pieces, dict) else [None]
    if not all(type(k) is int for k in ids) or set(ids) != set(range(len(ids))):
        raise UserError(f"{place} is no vocabulary: it should give each of its pieces one id, from 0 on.")
    if missing := [piece for piece in (START, END) if piece not in pieces]:
        raise UserError(f"{place} is no vocabulary of CLIP's: it has no {missing[0]}.")
    return pieces


def _text(place: Path) -> str:
    try:
        return read_bytes(place, "vocabulary").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {place}: {error}.") from None


def _download(name: str, path: Path, beside: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB, name))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no tokenizer, and {HUB} is not in the hub's local cache, and the hub cannot be reached. "
            f"Put its {VOCABULARY} and {MERGES} into {beside}."
        ) from error
