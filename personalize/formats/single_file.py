"""A base in one `.safetensors` file, as most are passed around, to and from a diffusers folder. No model is built."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import read_json, writing
from personalize.common.untrusted import read_bytes
from personalize.formats import clip_tokenizer, detect, reference_configs
from personalize.formats.infer_config import first_difference, infer_configs, set_size
from personalize.formats.ldm import CLIP, PREFIXES, State, from_ldm, to_ldm
from personalize.formats.safetensors_io import load_tensors, read_header, refuse_pickle, save_tensors, save_unsynced

Config = dict[str, Any]
PARAMETERIZATION = re.compile(r"""^[ \t]*parameterization:[ \t]*["']?(\w+)["']?[ \t]*(?:#.*)?\r?$""", re.MULTILINE)
OLD_CONFIGS = "personalize.configs"  # header entry of earlier versions: the configs of the base, as JSON


def unpack_single_file(path: Path, folder: Path, *, needs_vae: bool = True) -> None:
    """Unpack a single-file Stable Diffusion 1.x, 2.x or SDXL into a diffusers folder that does not exist yet.

    The configs are told from its tensors. SD2 exists with epsilon and v prediction, and is taken for the 768 pixel model
    with v where neither the header nor the `.yaml` beside it says anything; for the tokenizer see
    `clip_tokenizer.read_vocabulary`. Of a file without a VAE, if that will do, the folder has none either. UserError for a
    pickle, a damaged or a foreign file.
    """
    path, folder = Path(path), Path(folder)
    refuse_pickle(path, "a base")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already. Give a folder that is new or empty.")
    header = read_header(path)
    shapes = {name: shape for name, (_, shape) in header["tensors"].items()}
    family = detect.detect_family(shapes, path, needs_vae=needs_vae)
    try:
        beside = {"modelspec.prediction_type": said} if (said := prediction_beside(path)) else {}
        configs = _infer(shapes, family, beside | header["metadata"])
        _refuse_old_configs(header["metadata"], configs)
        vocabulary, merges = clip_tokenizer.read_vocabulary(path)
        _require_vocabulary_fits(path, len(vocabulary), configs)
        states = from_ldm(load_tensors(path), family, configs)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    with writing(folder) as temporary:
        temporary.mkdir()
        for part, state in states.items():
            _write_json(temporary / part / "config.json", configs[part])
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            save_unsynced(temporary / part / f"{stem}.safetensors", state, {"format": "pt"})
            if part.startswith("text_encoder"):
                place, longest = temporary / part.replace("text_encoder", "tokenizer"), configs[part]["max_position_embeddings"]
                openclip = not PREFIXES[family][part].endswith(CLIP)
                clip_tokenizer.write_tokenizer(place, vocabulary, merges, longest=longest, openclip=openclip)
        _write_json(temporary / "scheduler" / "scheduler_config.json", configs["scheduler"])
        inpaints = configs["unet"]["in_channels"] > configs["unet"]["out_channels"]
        index = reference_configs.pipeline(family, PREFIXES[family], configs["scheduler"]["_class_name"], inpaints=inpaints)
        _write_json(temporary / "model_index.json", index)


def says_prediction(path: Path) -> bool:
    """Whether a single file, or the `.yaml` beside it, says what its U-Net predicts."""
    header = read_header(path)
    stated = header["metadata"].get("modelspec.prediction_type") in reference_configs.MODELSPEC_PREDICTIONS
    return stated or reference_configs.V_MARK in header["tensors"] or bool(prediction_beside(path))


def predicting(folder: Path, prediction: str) -> dict[str, Config]:
    """{part: config} of an unpacked single file as they are where its U-Net predicts this."""
    configs, family = _folder_configs(folder)
    set_size(configs, family, prediction)
    scheduler = reference_configs.scheduler(family, prediction, zero_snr=False)
    return {"scheduler": scheduler} | {part: configs[part] for part in ("unet", "vae")}


def prediction_beside(path: Path) -> str:
    """ "v" or "epsilon" by the `.yaml` of Stability's and AUTOMATIC1111's programs beside a single file, "" where none says.

    Only this one line is looked for; nothing is built from a stranger's YAML.
    """
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return ""
    text = read_bytes(config, "YAML file").decode("utf-8", "replace")
    return {"v": "v", "eps": "epsilon"}.get(found[1], "") if (found := PARAMETERIZATION.search(text)) else ""


def pack_single_file(folder: Path, out: Path, *, half: bool) -> None:
    """Pack a diffusers folder of Stable Diffusion 1.x, 2.x or SDXL into one file, in half precision if `half`.

    UserError for a folder that `require_packable` refuses, and for weights that are too large for half precision.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a single file is written as .safetensors only. Give it that ending.")
    require_packable(folder, str(folder))
    configs, family = _folder_configs(folder)
    states = _states(folder, family, load_tensors)
    if half:
        states = {part: {key: _halved(f"{part}.{key}", v) for key, v in state.items()} for part, state in states.items()}
    blocks = len(configs["vae"].get("block_out_channels", [64]))
    latent_size = configs["unet"].get("sample_size") or 64
    pixels = latent_size * 2 ** (blocks - 1) if type(latent_size) is int else 512
    spec = reference_configs.modelspec(family, _prediction(configs), pixels, out.stem)
    save_tensors(out, _to_file(states, family, configs), spec | {"format": "pt"})


def require_packable(folder: Path, name: str) -> None:
    """UserError, which calls it `name`, for a diffusers folder that a single file cannot hold. Reads no weights.

    So it is where the folder is not whole, has pickles only or is of another kind of model; and where a reader of the
    file, who sees shapes alone, would take other settings than the folder's.
    """
    configs, family = _folder_configs(folder)
    states = _states(folder, family, _shapes)
    try:
        tensors = _to_file(states, family, configs)
        spec = reference_configs.modelspec(family, _prediction(configs), 512, name)
        inferred = _infer({key: tuple(value.shape) for key, value in tensors.items()}, family, spec)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if difference := first_difference(configs, inferred):
        raise UserError(
            f"{name} has {difference}, which a single file cannot say: whoever reads it would draw something else. "
            "Use --to diffusers."
        )


def _infer(shapes: detect.Shapes, family: str, metadata: Mapping[str, str]) -> dict[str, Config]:
    """{part: config}, "scheduler" among them, of a single file."""
    prediction = reference_configs.prediction(family, metadata, shapes)
    zero_snr = reference_configs.ZERO_SNR_MARK in shapes
    scheduler = reference_configs.scheduler(family, prediction, zero_snr=zero_snr)
    return infer_configs(shapes, family, prediction=prediction) | {"scheduler": scheduler}


def _states(folder: Path, family: str, read: Callable[[Path], State]) -> dict[str, State]:
    """{part: state dict}, read from the weight files of a diffusers folder."""
    files = {part: _weight_files(folder / part) for part in PREFIXES[family]}
    return {part: {key: v for place in places for key, v in read(place).items()} for part, places in files.items()}


def _shapes(path: Path) -> State:
    """As `load_tensors`, but without the numbers."""
    return {key: torch.empty(shape, device="meta") for key, (_, shape) in read_header(path)["tensors"].items()}


def _to_file(states: Mapping[str, State], family: str, configs: Mapping[str, Config]) -> State:
    """The tensors of one file; empty ones mark an SDXL of v prediction, and of zero terminal SNR."""
    tensors = to_ldm(states, family, configs)
    if family == "sdxl" and _prediction(configs) == "v_prediction":
        tensors[reference_configs.V_MARK] = torch.zeros(0)
        if configs["scheduler"].get("rescale_betas_zero_snr"):
            tensors[reference_configs.ZERO_SNR_MARK] = torch.zeros(0)
    return tensors


def _prediction(configs: Mapping[str, Config]) -> str:
    return configs["scheduler"].get("prediction_type", "epsilon")


def _refuse_old_configs(metadata: Mapping[str, str], inferred: Mapping[str, Config]) -> None:
    """UserError for a file of an earlier version whose tensors do not tell what its header does, such as a Toyland."""
    if OLD_CONFIGS not in metadata:
        return
    try:
        stored = json.loads(metadata[OLD_CONFIGS])
        difference = first_difference(stored["parts"] | {"scheduler": stored["scheduler"]}, inferred)
    except (ValueError, KeyError, TypeError, RecursionError):
        difference = f"a header entry {OLD_CONFIGS} that cannot be read"
    if difference:
        raise UserError(
            f"it is a single file of an earlier personalize with {difference}, which only its header says and no other "
            "program reads. Export its run again with --to diffusers, and give that folder as the base."
        )


def _require_vocabulary_fits(path: Path, pieces: int, configs: Mapping[str, Config]) -> None:
    for part, config in configs.items():
        if part.startswith("text_encoder") and pieces > config["vocab_size"]:
            raise UserError(
                f"the tokenizer has {pieces} pieces, but the {part} of {path} knows {config['vocab_size']}: it was made with "
                f"another vocabulary. Put its own {clip_tokenizer.VOCABULARY} and {clip_tokenizer.MERGES} into "
                f"{path.parent / 'tokenizer'}."
            )


def _folder_configs(folder: Path) -> tuple[dict[str, Config], str]:
    """({part: config}, "scheduler" among them, and the family) of a diffusers folder."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"{folder} is not a diffusers folder: it has no model_index.json.")
    kind = read_json(index).get("_class_name", "?")
    kinds = [*reference_configs.PIPELINES.values(), *reference_configs.INPAINTING.values()]
    if kind not in kinds:
        known = ", ".join(dict.fromkeys(kinds))
        raise UserError(f"{folder} is a {kind}; a single file can hold {known} only.")
    parts = PREFIXES["sdxl" if "XL" in kind else "sd1"]
    configs = {part: read_json(folder / part / "config.json") for part in parts}
    if purpose := detect.more_than_noise(configs["unet"].get("in_channels", 4)):
        raise UserError(f"{folder} is {purpose}, which personalize does not train.")
    # A reader takes the activation from the layout: GELU with OpenCLIP's names, its quick approximation with CLIP's.
    one_encoder = "sd2" if configs["text_encoder"].get("hidden_act", "quick_gelu") == "gelu" else "sd1"
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    return configs, "sdxl" if "text_encoder_2" in parts else one_encoder


def _weight_files(place: Path) -> list[Path]:
    """The weights in a part's folder: one file, several by an index, or the half-precision variant alone."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            if (whole := place / f"{stem}{variant}.safetensors").exists():
                return [whole]
            if (index := place / f"{stem}.safetensors.index{variant}.json").exists():
                shards = read_json(index).get("weight_map")
                names = shards.values() if isinstance(shards, dict) else [None]
                if not all(isinstance(name, str) and name == Path(name).name for name in names):
                    raise UserError(f"{index} has no weight_map of files beside it. Download it again.")
                return [place / name for name in sorted(set(names))]
    raise UserError(
        f"{place} has no .safetensors file (pickles such as .bin are not opened, they can run code). "
        "Convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
    )


def _halved(name: str, tensor: Tensor) -> Tensor:
    """A floating tensor in float16, any other as it is. UserError where a weight is too large for it."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} has values of {tensor.abs().max():.3g}, too large for half precision. Write it in full.")
    return half


def _write_json(path: Path, value: Config) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
