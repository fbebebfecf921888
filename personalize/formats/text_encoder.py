"""The keys of a CLIP text encoder's weight files in a diffusers folder.

Every released checkpoint has `text_model.` before them. transformers 5 writes CLIPTextModel's without, and transformers 4
then leaves the encoder at random weights, with a warning only; with it both read them.
"""

from pathlib import Path

from personalize.common.files import read_json, write_json
from personalize.formats.ldm import tidy
from personalize.formats.safetensors_io import load_tensors, read_header, save_tensors


def write_released_keys(folder: Path) -> None:
    """Write the weight files in a text encoder's folder anew where their keys are not those of released checkpoints.

    A file that is a link to another is replaced by one of its own. UserError for a file that is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        if set(tidy("text_encoder", dict.fromkeys(header["tensors"]))) != set(header["tensors"]):
            tensors = tidy("text_encoder", load_tensors(path))
            save_tensors(path, tensors, header["metadata"])
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        index = read_json(path)
        if isinstance(shards := index.get("weight_map"), dict) and (renamed := tidy("text_encoder", shards)) != shards:
            write_json(path, index | {"weight_map": renamed})
