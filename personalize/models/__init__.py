"""Bases: finding one by name, and the families that can be loaded."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from personalize.errors import UserError, nearest
from personalize.files import read_json
from personalize.models.base import LatentModel

TOYLAND = Path(__file__).parent.parent / "toyland" / "weights"
MODELS = {"StableDiffusionPipeline": "sd"}  # pipeline class in model_index.json -> module
NEEDED = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors")


def load(base: str, *, device: str = "auto", dtype: str = "auto", say: Callable[[str], None] = print) -> LatentModel:
    """The base called "toyland", a hub id or a diffusers folder, ready on a device. UserError for anything else."""
    folder = locate(base)
    family = families(folder, base)
    from personalize.models import devices, sd

    assert family == "sd", family
    where = devices.choose(device)
    return sd.load(folder, base, where, devices.dtype_for(where, dtype, say), fingerprint=fingerprint(folder))


def locate(base: str) -> Path:
    """The local folder of a base, downloaded first when it is a hub id (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count)."""
    if base == "toyland":
        return TOYLAND
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise UserError(f"base {base!r} is a pickle, which can run code when opened. Use a diffusers folder.")
    if path.suffix == ".safetensors":
        raise UserError(f"base {base!r} is a single file, which is not read yet. Convert it to a diffusers folder.")
    if path.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        hint = nearest(base, ["toyland"]) or "."
        raise UserError(f"base {base!r} is no diffusers folder{hint} Give toyland, a hub id (owner/name) or a folder.")
    return _download(base)


def _download(base: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=list(NEEDED), ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {base!r}, or it asks for a login: set HF_TOKEN.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"base {base!r} is neither a folder here nor in the hub's local cache, and the hub cannot be reached.{offline} "
            "Check the name and the connection, or use --base toyland."
        ) from error


def families(folder: Path, base: str) -> str:
    """The module that loads the pipeline in a diffusers folder. UserError where there is none."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"base {base!r} is not a diffusers folder: {folder} has no model_index.json.")
    kind = read_json(index).get("_class_name", "?")
    if kind not in MODELS:
        raise UserError(f"base {base!r} is a {kind}; personalize trains {', '.join(MODELS)}, such as Stable Diffusion 1.5.")
    return MODELS[kind]


def fingerprint(folder: Path) -> str:
    """12 hex digits of a base: names, sizes and configs whole, weights sampled (1 MB at 8 places), so 5 GB take 0.1 s."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        if path.suffix == ".safetensors" and path.parent.name in ("unet", "vae", "text_encoder"):
            size = path.stat().st_size
            digest.update(json.dumps([path.parent.name, path.name, size]).encode())
            with path.open("rb") as file:
                for k in range(8):
                    file.seek(k * max(size - (1 << 20), 0) // 7)
                    digest.update(file.read(1 << 20))
        elif path.name in ("config.json", "scheduler_config.json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
