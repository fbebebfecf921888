"""Where a base is: Toyland's weights, a diffusers folder, a single file unpacked into one, or the hub's cache."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from personalize.common.bases import folder_of
from personalize.common.errors import UserError, nearest
from personalize.common.files import read_json, sweep, writing
from personalize.common.run_folder import require_free_disk
from personalize.common.untrusted import open_regular, read_bytes
from personalize.models.config_schema import INDEX, SCHEDULER, UNET, VAE

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "scheduler")
NEEDED = ("model_index.json", *(f"{part}/*.{end}" for part in PARTS for end in ("json", "txt", "safetensors")))
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json")
SAMPLES, SAMPLE = 64, 1 << 17  # pieces of a weight file that its fingerprint reads, and their size in bytes

# Toyland with the text keys of released checkpoints -> as it was before: the same weights, for the runs of then.
RENAMED = {"27223bd8e35e": "4dbf7bd25cdb"}


def locate_base(
    base: str,
    say: Callable[[str], None] = print,
    needed: tuple[str, ...] = NEEDED,
    *,
    prediction: str = "",
    base_vae: str = "",
    zero_snr: bool = False,
) -> Path:
    """The local folder of a base; of a hub id, the `needed` files are downloaded first (HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE count).

    A single file is unpacked into a folder of the user's cache, once. Where `prediction`, `base_vae` or `zero_snr`, as in the
    recipe, make another base of it, its folder is there too, and links to the files that are the same; so whatever is read from
    the folder, its fingerprint first, is that of this base. UserError for what is none of these.
    """
    folder = _own_folder(base, say, needed, base_vae)
    is_file = folder_of(base).is_file()
    if base_vae and is_file and not _has_vae(folder_of(base)):
        base_vae = ""  # it is in the folder already
    if not (prediction or base_vae or zero_snr):
        return folder
    from personalize.models.base_settings import folder_with_settings

    return folder_with_settings(folder, base, say, prediction=prediction, base_vae=base_vae, zero_snr=zero_snr)


def _own_folder(base: str, say: Callable[[str], None], needed: tuple[str, ...], base_vae: str) -> Path:
    path = folder_of(base)
    if path.is_dir():
        return path
    from personalize.formats import safetensors_io

    safetensors_io.refuse_pickle(path, "a base")
    if path.suffix.lower() == ".safetensors":
        return _unpack(path, say, base_vae)
    if path.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        hint = nearest(base, ["toyland"]) or "."
        raise UserError(
            f"base {base!r} is no diffusers folder{hint} Give toyland, a hub id (owner/name), a folder or a .safetensors file."
        )
    return _download(base, needed)


def base_size(base: str, say: Callable[[str], None] = print) -> int:
    """Edge in px of the images a base trains at, from its configs alone: of a hub id nothing else is downloaded."""
    folder = locate_base(base, say, CONFIGS)
    cells = read_json(folder / "unet" / "config.json", UNET).get("sample_size")
    if cells is None:
        raise UserError(f"{folder}/unet/config.json does not say sample_size. Give --size, in px.")
    return cells * _downscale(folder)


def base_downscale(base: str) -> int:
    """Px of a latent cell, from the configs alone."""
    return _downscale(locate_base(base, lambda line: None, CONFIGS))


def _downscale(folder: Path) -> int:
    return 2 ** (len(read_json(folder / "vae" / "config.json", VAE).get("block_out_channels", [64])) - 1)


def weight_files(part: Path) -> list[Path]:
    """The .safetensors in a part's folder that are read: half-precision copies only where there is nothing else."""
    files = sorted(path for path in part.glob("*.safetensors") if ".non_ema" not in path.name)
    return [path for path in files if ".fp16" not in path.name] or files


def fingerprint(folder: Path) -> str:
    """12 hex digits that identify a base: of its configs, and of its weights' names, sizes and samples (8 MB a file).

    5 GB take 0.1 s.
    """
    digest = hashlib.sha256()
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        weights = weight_files(part) if part.name in NETWORKS else []
        for path in sorted([*weights, *part.glob("config.json"), *part.glob("scheduler_config.json")]):
            if path in weights:
                digest.update(json.dumps([part.name, path.name]).encode())
                update_with_samples(digest, path)
            else:
                digest.update(read_bytes(path, "JSON file"))
    found = digest.hexdigest()[:12]
    return RENAMED.get(found, found)


def update_with_samples(digest, path: Path) -> None:
    """Add a file's size and pieces of it, at even distances from its start to its end; small files whole."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open_regular(path, "weight file") as file:
        for k in range(SAMPLES):
            file.seek(k * max(size - SAMPLE, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))


def _has_vae(path: Path) -> bool:
    from personalize.formats.infer_config import has_vae
    from personalize.formats.safetensors_io import read_header

    return has_vae(read_header(path)["tensors"])


def _unpack(path: Path, say: Callable[[str], None], base_vae: str) -> Path:
    """The diffusers folder of a single file, made in the user's cache where it is not there yet.

    Of a file without a VAE it has the one that is given.
    """
    if not path.is_file():
        raise UserError(f"base {str(path)!r} is not there. Check the path.")
    from personalize.formats import single_file
    from personalize.models import base_settings
    from personalize.models import base_vae as vaes

    digest = hashlib.sha256()
    update_with_samples(digest, path)
    digest.update(single_file.prediction_beside(path).encode())
    if adds_vae := bool(base_vae) and not _has_vae(path):
        digest.update(vaes.digest_of_vae(base_vae).encode())
    folder = cache_folder() / "bases" / f"{path.stem}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    make_cache(folder.parent)
    size = path.stat().st_size
    require_free_disk(folder, size + size // 20)
    sweep(folder.parent)
    say(f"turning {path.name} ({size / 1e9:.2f} GB) into a diffusers folder, this once: {folder}")
    with suppress(MadeMeanwhile), writing(folder) as temporary:
        single_file.unpack_single_file(path, temporary, needs_vae=not adds_vae)
        if adds_vae:
            vaes.write_vae(base_vae, temporary, temporary / "vae", say)
        how = "" if single_file.says_prediction(path) else base_settings.try_prediction(temporary, str(path))
        if folder.is_dir():
            raise MadeMeanwhile
    kind = read_json(folder / "model_index.json", INDEX)["_class_name"]
    prediction = read_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER).get("prediction_type", "epsilon")
    say(f"{path.name} is taken for a {kind} of {prediction} prediction{how}")
    return folder


def make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {cache_folder()}: {error.strerror}. Set PERSONALIZE_CACHE to a folder with room."
        ) from error


class MadeMeanwhile(Exception):
    """Another process made the folder, and may be reading from it."""


def cache_folder() -> Path:
    """Where unpacked single files are kept."""
    if folder := os.environ.get("PERSONALIZE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "personalize"


def _download(base: str, needed: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns, half, raw = list(needed), "*.fp16*", "*.non_ema*"
    try:
        folder = Path(snapshot_download(base, allow_patterns=patterns, ignore_patterns=[half, raw]))
        if needed == NEEDED and not weight_files(folder / "unet"):  # some have half precision only
            folder = Path(snapshot_download(base, allow_patterns=patterns, ignore_patterns=[raw]))
        return folder
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {base!r}, or it asks for a login: set HF_TOKEN.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"base {base!r} is neither a folder here nor in the hub's local cache, and the hub cannot be reached.{offline} "
            "Check the name and the connection, or use --base toyland."
        ) from error


def public_name(value: str) -> str:
    """A base or file as strangers may see it: the last part of a path, anything else as it is."""
    looks_local = value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1 or Path(value).exists()
    return Path(value.replace("\\", "/")).name if looks_local else value
