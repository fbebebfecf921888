"""Masks of photos by a network that the user brings: U²-Net or IS-Net as an ONNX file.

What finds the salient object of a photo, as rembg stores it: U²-Net (2005.09007) and its kin see 320 px, IS-Net
(2203.03041) 1024. ONNX holds no code, but it may point to other files: such a one is refused. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from personalize.common.errors import UserError
from personalize.common.untrusted import read_bytes

MEAN = (0.485, 0.456, 0.406)
DEVIATIONS = {320: (0.229, 0.224, 0.225), 1024: (1.0, 1.0, 1.0)}  # side in px -> of each colour: U²-Net, IS-Net
SEEN_FROM = 0.5  # a map that nowhere gets so high shows no object: stretched to white it would invent one
ROUNDING = 1e-3  # by which a share may leave [0,1]

Segment = Callable[[Image.Image], np.ndarray | None]


def read_mask_model(path: str | Path) -> Segment:
    """An ONNX file -> a function of an RGB image that gives (side,side) in [0,1], 1 = subject, or None where nothing is seen.

    UserError for a file that is absent, too large, damaged, in several files, or of other inputs or outputs, and where
    onnx or onnxruntime is not installed.
    """
    data = read_bytes(path, "mask model")
    _require_one_file(data, path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises is enough
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each fault of a model has a class of its own
        raise _refusal(path, f"onnxruntime refuses it ({_first_line(error)})") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    side = shape[-1] if len(shape) == 4 else 0
    if shape[1:] != [3, side, side] or side not in DEVIATIONS or shape[0] not in (1, None) and type(shape[0]) is not str:
        found = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise _refusal(path, f"its input is {found or 'missing'}, where 1 × 3 × 320 × 320 or 1 × 3 × 1024 × 1024 is needed")

    def segment(image: Image.Image) -> np.ndarray | None:
        try:
            shares = session.run([session.get_outputs()[0].name], {inputs[0].name: _seen(image, side)})[0]
        except Exception as error:
            raise _refusal(path, f"it cannot be run ({_first_line(error)})") from error
        return _stretched(_checked(shares, side, path))

    return segment


def _seen(image: Image.Image, side: int) -> np.ndarray:
    """An RGB image -> (1,3,side,side) as the networks were trained: brightest value 1, then mean and deviation."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
    pixels = (pixels / max(pixels.max(), 1.0) - np.float32(MEAN)) / np.float32(DEVIATIONS[side])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _checked(shares: np.ndarray, side: int, path: str | Path) -> np.ndarray:
    """What a model gave -> (side,side) in [0,1]."""
    if not isinstance(shares, np.ndarray) or shares.shape != (1, 1, side, side):
        raise _refusal(
            path, f"its first output is {getattr(shares, 'shape', 'no tensor')}, where (1, 1, {side}, {side}) is needed"
        )
    low, high = float(shares.min()), float(shares.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also where one is no number
        raise _refusal(path, f"its values go from {low:.3g} to {high:.3g}, where shares from 0 to 1 are needed")
    return shares[0, 0].astype(np.float32)


def _stretched(shares: np.ndarray) -> np.ndarray | None:
    """(side,side) in [0,1] -> the same from 0 to 1, as in the papers; None where it shows nothing."""
    low, high = shares.min(), shares.max()
    return None if high < SEEN_FROM or high == low else (shares - low) / (high - low)


def _require_one_file(data: bytes, path: str | Path) -> None:
    """UserError for what is no ONNX, and for a model whose tensors lie in other files: their names are a stranger's."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"the mask model {path} needs onnx and onnxruntime: pip install onnx onnxruntime") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's, which onnx does not name
        raise _refusal(path, f"it is not ONNX ({_first_line(error)})") from error
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and (message.external_data or message.data_location):
            raise _refusal(path, "it keeps its weights in other files, which are never opened")


def _messages(message) -> Iterator:
    """A protobuf message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if not hasattr(value, "ListFields") else [value]:
                yield from _messages(part)


def _refusal(path: str | Path, why: str) -> UserError:
    return UserError(f"the mask model {path} cannot be used: {why}. Give U²-Net or IS-Net as one ONNX file.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__
