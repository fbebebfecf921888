"""A base in one `.safetensors` file, as most are passed around, against a diffusers folder. No model is built for either."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.common.files import read_json, writing
from personalize.formats import clip_tokenizer, detect, reference_configs
from personalize.formats import stored_config as stored
from personalize.formats.infer_config import infer_configs
from personalize.formats.ldm import PREFIXES, State, from_ldm, to_ldm
from personalize.formats.safetensors_io import load_tensors, read_header, refuse_pickle, save_tensors, save_unsynced

Config = dict[str, Any]


def unpack_single_file(path: Path, folder: Path, *, tokenizer: Path | None = None, prediction: str = "") -> None:
    """Unpack a single-file Stable Diffusion 1.x, 2.x or SDXL into a diffusers folder that does not exist yet.

    The configs are those that `from_folder` put into the file, else told from its tensors. `prediction` ("epsilon",
    "v_prediction") settles what a file of another program may not say: SD2 exists with both, and is taken for the 768
    pixel model with v where nothing says otherwise. `tokenizer` is a folder with vocab.json and merges.txt; see
    `words.vocabulary`. UserError for a pickle, a damaged or a foreign file.
    """
    path, folder = Path(path), Path(folder)
    refuse_pickle(path, "a base")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already. Give a folder that is new or empty.")
    header = read_header(path)
    shapes = {name: shape for name, (_, shape) in header["tensors"].items()}
    family = detect.detect_family(shapes, path)
    configs, scheduler = _configs(path, header["metadata"], shapes, family=family, asked=prediction)
    vocabulary, merges = clip_tokenizer.vocabulary(path, tokenizer)
    _fit(path, len(vocabulary), configs)
    try:
        states = from_ldm(load_tensors(path), family, configs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with writing(folder) as temporary:
        temporary.mkdir()
        for part, state in states.items():
            _write_part(temporary / part, state, configs[part])
        for part in (part for part in states if part.startswith("text_encoder")):
            pad = clip_tokenizer.padding(vocabulary, openclip=PREFIXES[family][part].endswith(".model."))
            place = temporary / part.replace("text_encoder", "tokenizer")
            clip_tokenizer.write_tokenizer(place, vocabulary, merges, longest=configs[part]["max_position_embeddings"], pad=pad)
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(temporary / "model_index.json", reference_configs.pipeline(family, states, scheduler["_class_name"]))


def pack_single_file(folder: Path, out: Path, *, half: bool) -> None:
    """Pack a diffusers folder of Stable Diffusion 1.x, 2.x or SDXL into one file, in half precision if `half`.

    Its configs go into the header, so that `to_folder` gives the same folder back. UserError for a folder that is not
    whole, has its weights as pickles only, or is of another kind of model.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a single file is written as .safetensors only. Give it that ending.")
    configs, family = _folder_configs(folder)
    scheduler = _config(folder / "scheduler" / "scheduler_config.json")
    match _config(folder / "model_index.json").get("scheduler"):
        case ["diffusers", str() as kind]:  # what the pipeline makes of the settings, whoever wrote them
            scheduler["_class_name"] = kind
    states = {part: _read_part(folder / part) for part in PREFIXES[family]}
    if half:
        states = {part: {key: _halved(f"{part}.{key}", v) for key, v in state.items()} for part, state in states.items()}
    try:
        tensors = to_ldm(states, family, configs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    prediction = scheduler.get("prediction_type", "epsilon")
    if family == "sdxl" and prediction == "v_prediction":
        tensors |= {reference_configs.V_MARK: torch.zeros(0)}
        tensors |= {reference_configs.ZERO_SNR_MARK: torch.zeros(0)} if scheduler.get("rescale_betas_zero_snr") else {}
    blocks = len(configs["vae"].get("block_out_channels", [64]))
    pixels = configs["unet"].get("sample_size") or 64
    spec = reference_configs.modelspec(family, prediction, pixels * 2 ** (blocks - 1) if type(pixels) is int else 512, out.stem)
    save_tensors(out, tensors, spec | {"format": "pt", stored.KEY: stored.packed(family, configs, scheduler)})


def _configs(path: Path, metadata: Mapping[str, str], shapes: detect.Shapes, *, family: str, asked: str):
    """({part: config}, scheduler's config): the header's own where it has them."""
    prediction = reference_configs.prediction(family, metadata, shapes, asked)
    try:
        inferred = infer_configs(shapes, family, prediction=prediction)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if stored.KEY in metadata:
        configs, scheduler = stored.unpacked(metadata[stored.KEY], family, inferred, path)
        return configs, scheduler | ({"prediction_type": asked} if asked else {})
    return inferred, reference_configs.scheduler(family, prediction, zero_snr=reference_configs.ZERO_SNR_MARK in shapes)


def _fit(path: Path, pieces: int, configs: Mapping[str, Config]) -> None:
    for part, config in configs.items():
        if part.startswith("text_encoder") and pieces > config["vocab_size"]:
            raise UserError(
                f"the tokenizer has {pieces} pieces, but the {part} of {path} knows {config['vocab_size']}: it was made with "
                f"another vocabulary. Put its own {clip_tokenizer.VOCABULARY} and {clip_tokenizer.MERGES} into "
                f"{path.parent / 'tokenizer'}."
            )


def _folder_configs(folder: Path) -> tuple[dict[str, Config], str]:
    """({part: config.json}, family) of a diffusers folder."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"{folder} is not a diffusers folder: it has no model_index.json.")
    kind = _config(index).get("_class_name", "?")
    if kind not in reference_configs.PIPELINES.values():
        known = ", ".join(dict.fromkeys(reference_configs.PIPELINES.values()))
        raise UserError(f"{folder} is a {kind}; a single file is written of {known} only.")
    parts = PREFIXES["sdxl" if kind == reference_configs.PIPELINES["sdxl"] else "sd1"]
    configs = {part: _config(folder / part / "config.json") for part in parts}
    if what := detect.more_than_noise(configs["unet"].get("in_channels", 4)):
        raise UserError(f"{folder} is {what}, which personalize does not train.")
    # The layout decides the activation that a reader takes: GELU with OpenCLIP's names, its quick approximation with CLIP's.
    small = "sd2" if configs["text_encoder"].get("hidden_act", "quick_gelu") == "gelu" else "sd1"
    return configs, "sdxl" if "text_encoder_2" in parts else small


def _config(path: Path) -> Config:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object. Download it again.")
    return config


def _read_part(place: Path) -> State:
    """The weights in a part's folder: one file, several by an index, or the half-precision variant alone."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            if (whole := place / f"{stem}{variant}.safetensors").exists():
                return load_tensors(whole)
            if (index := place / f"{stem}.safetensors.index{variant}.json").exists():
                return _sharded(place, index)
    raise UserError(
        f"{place} has no .safetensors file (pickles such as .bin are not opened, they can run code). "
        "Convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
    )


def _sharded(place: Path, index: Path) -> State:
    shards = _config(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and name == Path(name).name for name in shards.values()):
        raise UserError(f"{index} has no weight_map of files beside it. Download it again.")
    state: State = {}
    for name in sorted(set(shards.values())):
        state |= load_tensors(place / name)
    return state


def _halved(name: str, tensor: Tensor) -> Tensor:
    """In float16, if it is a floating number. UserError where a weight is too large for it."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} has values of {tensor.abs().max():.3g}, too large for half precision. Write it in full.")
    return half


def _write_part(place: Path, state: State, config: Config) -> None:
    place.mkdir()
    name = "model" if place.name.startswith("text_encoder") else "diffusion_pytorch_model"
    save_unsynced(place / f"{name}.safetensors", state, {"format": "pt"})
    _write_json(place / "config.json", config)


def _write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
