"""Textual-inversion files: the rows that a new word adds to the token embedding of one or two text encoders.

diffusers writes `{"<token>": (n,D)}`, AUTOMATIC1111 `{"emb_params": (n,D)}`; for SDXL both, and kohya, write
`{"clip_l": (n,768), "clip_g": (n,1280)}`. n rows are n tokens one after another (Gal et al. 2208.01618).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from personalize.common.errors import UserError
from personalize.formats.safetensors_io import load_tensors, read_header, refuse_pickle, save_tensors

A1111_NAME = "emb_params"
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(.+)")  # word, name within its file: in the LoRA files of OneTrainer and A1111
SDXL_NAMES = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
Rows = dict[str, Tensor]


def read_embedding(path: Path) -> tuple[str, Rows]:
    """(token or "", {"text_encoder": (n,D)} and "text_encoder_2" for SDXL). UserError where the file is not one."""
    path = Path(path)
    refuse_pickle(path, "a textual-inversion embedding")
    shapes = {name: shape for name, (_, shape) in read_header(path)["tensors"].items()}
    if set(shapes) == set(SDXL_NAMES):
        token, names = "", SDXL_NAMES
    elif len(shapes) == 1:
        name = next(iter(shapes))
        token, names = ("" if name == A1111_NAME else name), {name: "text_encoder"}
    else:
        example = min(shapes, default="nothing")[:80]
        raise UserError(
            f"{path} is not a textual-inversion embedding: it has {len(shapes)} tensors such as {example!r}, where one is "
            f"expected, or {' and '.join(SDXL_NAMES)} for SDXL."
        )
    tensors = load_tensors(path)
    rows = {part: _rows(path, name, tensors[name]) for name, part in names.items()}
    if len({len(part) for part in rows.values()}) > 1:
        raise UserError(f"{path} has {' and '.join(str(len(r)) for r in rows.values())} rows for its two text encoders.")
    return token, rows


def bundled_words(keys: Iterable[str]) -> tuple[str, ...]:
    """The words whose embeddings are in a LoRA file with these keys."""
    return tuple(dict.fromkeys(match[1] for key in sorted(keys) if (match := BUNDLED.match(key))))


def read_bundled(path: Path) -> dict[str, Rows]:
    """{word: rows as of `read_embedding`} in a LoRA file, no rows for what is not an embedding of Stable Diffusion.

    UserError for rows that are not finite numbers.
    """
    found: dict[str, dict[str, str]] = {word: {} for word in bundled_words(read_header(path)["tensors"])}
    tensors = load_tensors(path) if found else {}
    for key in sorted(tensors):
        if match := BUNDLED.match(key):
            found[match[1]]["one" if match[2].startswith("string_to_param.") else match[2]] = key
    parts = {("one",): {"one": "text_encoder"}, ("clip_l",): {"clip_l": "text_encoder"}, tuple(SDXL_NAMES): SDXL_NAMES}
    return {
        word: {part: _rows(path, keys[name], tensors[keys[name]]) for name, part in parts.get(tuple(sorted(keys)), {}).items()}
        for word, keys in found.items()
    }


def write_diffusers(path: Path, token: str, rows: Mapping[str, Tensor]) -> None:
    """Write {part: (n,D)} as diffusers' `load_textual_inversion` reads it; SDXL's pair of parts does not name the token."""
    if not token or token == "__metadata__":
        raise UserError(f"token {token!r} cannot stand in an embedding file. Use another, such as <my-dog>.")
    _write(path, token, rows)


def write_a1111(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write {part: (n,D)} as AUTOMATIC1111 and ComfyUI read it, where the file's name is the word."""
    _write(path, A1111_NAME, rows)


def _write(path: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    names = {name: "text_encoder"} if set(rows) == {"text_encoder"} else SDXL_NAMES
    assert set(rows) == set(names.values()), set(rows)
    save_tensors(path, {key: rows[part] for key, part in names.items()})


def _rows(path: Path, name: str, tensor: Tensor) -> Tensor:
    """(n,D) of a tensor that may be a single (D,)."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point() or not rows.isfinite().all():
        raise UserError(
            f"{path}: {name[:80]!r} of shape {tuple(tensor.shape)} is not rows of finite numbers, as an embedding is."
        )
    return rows
