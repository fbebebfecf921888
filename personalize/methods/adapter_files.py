"""Adapters on disk: LoRA as one file in diffusers' layout, the other kinds as a PEFT folder for each network.

pytorch_lora_weights.safetensors   "<network>.<layer>.lora_A.weight"; ranks and alphas in its header, where diffusers looks
<network>_adapter/                 adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained`

LoRA, LoKr and LoHa files of other programs are read too.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from personalize.common.errors import UserError
from personalize.common.files import read_json, write_json
from personalize.formats import lora, lycoris, safetensors_io
from personalize.formats.lora_names import ALPHA, split_key
from personalize.methods import as_in
from personalize.methods.peft_layers import adaptable_layers, import_peft, norm_layers, weight_shapes
from personalize.models.interface import LatentModel

FILE = "pytorch_lora_weights.safetensors"
ENDING, CONFIG, TENSORS = "_adapter", "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "LOKR", "LOHA", "OFT", "BOFT")
RANK = ".lora_A.weight"  # its first dimension


@dataclass(frozen=True)
class Part:
    """The adapter of one network: its PEFT config, and its tensors by the names PEFT gives them.

    loose: LyCORIS' factors, whose form, shapes and rank may be each layer's own, with a scale of 1; the config has the layers.
    A file of another program may hold more: plain changes of parameters, without or beside an adapter, whose config is None
    where there is none; and embeddings of words.
    """

    config: Any
    tensors: dict[str, Tensor]
    differences: dict[str, Tensor] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    loose: bool = False

    @property
    def kind(self) -> str:
        return str(self.config.peft_type.value).lower()

    @property
    def alpha(self) -> float:
        """The update is alpha / rank times B A; rsLoRA's root is in it."""
        value = getattr(self.config, "lora_alpha", None) or getattr(self.config, "alpha", 1)
        return value * math.sqrt(self.config.r) if getattr(self.config, "use_rslora", False) else value


def write_adapter(folder: Path, parts: dict[str, Part]) -> None:
    """Writes the adapters of several networks, all of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(part.kind == "lora" for part in parts.values()):
        tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.tensors.items()}
        ranks = {k.removesuffix(RANK): len(v) for k, v in tensors.items() if k.endswith(RANK)}
        alphas = {layer: parts[layer.partition(".")[0]].alpha for layer in ranks}
        lora.write_diffusers(folder / FILE, lora.Adapter(tensors, ranks, alphas))
        return
    for name, part in parts.items():
        subfolder = folder / f"{name}{ENDING}"
        subfolder.mkdir(exist_ok=True)
        # PEFT would write its sets in random order, and the same run would give another file.
        write_json(subfolder / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in part.config.to_dict().items()})
        safetensors_io.save_tensors(subfolder / TENSORS, {f"base_model.model.{k}": v for k, v in part.tensors.items()})


def holds_adapter(source: Path) -> bool:
    """Whether a file or folder holds an adapter, judged by names alone."""
    if source.is_dir():
        return any((source / name).exists() for name in (FILE, CONFIG)) or bool(_folders(source))
    keys = safetensors_io.read_header(source)["tensors"] if source.suffix == ".safetensors" else ()
    return any(".lora" in key or key.startswith("lora_") or (split_key(key) or ("", ALPHA))[1] != ALPHA for key in keys)


def read_adapter(source: Path, model: LatentModel) -> dict[str, Part]:
    """Reads the adapters of a LoRA, LoKr or LoHa file, or of a folder of ours or of PEFT, by network.

    UserError where there is none, or one for a layer or network that the base does not have.
    """
    if not source.is_dir():
        return _read_file(source, model)
    if (source / FILE).exists():
        return _read_lora(source / FILE, model)
    subfolders = {path.name.removesuffix(ENDING): path for path in _folders(source)}
    if (source / CONFIG).exists():
        subfolders["unet"] = source
    if not subfolders:
        raise UserError(f"{source} has neither {FILE} nor {CONFIG}: there is no adapter in it.")
    networks, parts = adapted_networks(model), {}
    for name, subfolder in subfolders.items():
        if name not in networks:
            raise UserError(f"{subfolder} was made for another base than {model.name!r}, which has {', '.join(networks)} only.")
        parts |= _read_peft_folder(subfolder, name, model)
    return parts


def adapted_networks(model: LatentModel) -> dict[str, nn.Module]:
    """The networks that can carry an adapter."""
    return {"unet": model.unet, **model.text_encoders}


def layer_shapes(model: LatentModel) -> dict[str, dict[str, tuple[int, ...]]]:
    """{network: {layer: shape of its weight}} of all that can carry an adapter."""
    return {name: weight_shapes(network) for name, network in adapted_networks(model).items()}


def layers_of(parts: dict[str, Part]) -> dict[str, dict[str, Tensor]]:
    """The tensors of LoKr or LoHa parts as {`network.layer`: {"lokr_w1": tensor, …}}."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        for key, value in part.tensors.items():
            layer, _, role = key.rpartition(".")
            layers.setdefault(f"{name}.{layer}", {})[role] = value
    return layers


def _read_file(path: Path, model: LatentModel) -> dict[str, Part]:
    """A file of any program."""
    safetensors_io.refuse_pickle(path, "an adapter")
    if not lycoris.kind_of(safetensors_io.read_header(path)):
        return _read_lora(path, model)
    peft = import_peft()
    adapter, parts = lycoris.read_lycoris(path, layer_shapes(model), model.name), {}
    config = {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[adapter.kind]
    for name in adapted_networks(model):
        if layers := _of(name, adapter.layers):
            tensors = {f"{layer}.{role}": value for layer, factors in layers.items() for role, value in factors.items()}
            parts[name] = Part(config(r=1, alpha=1, target_modules=sorted(layers)), tensors, loose=True)
    return parts


def _read_lora(path: Path, model: LatentModel) -> dict[str, Part]:
    """A LoRA file of any program, in which each layer has its own rank and alpha."""
    peft = import_peft()
    networks = adapted_networks(model).items()
    names = {name: {*adaptable_layers(network), *norm_layers(network)} for name, network in networks}
    adapter, parts = lora.read_lora(path, names, model.name), {}
    for name in names:
        tensors, ranks, alphas = (_of(name, values) for values in (adapter.tensors, adapter.ranks, adapter.alphas))
        differences = _of(name, adapter.differences)
        if not ranks:
            if differences:
                parts[name] = Part(None, {}, differences, adapter.words)
            continue
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, target_modules=sorted(ranks),
            rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != r},
            alpha_pattern={f"^{layer}": value for layer, value in alphas.items() if value != alpha},
            use_dora=any(key.endswith("lora_magnitude_vector") for key in tensors),
        )  # fmt: skip
        parts[name] = Part(config, tensors, differences, adapter.words)
    return parts


def _read_peft_folder(folder: Path, name: str, model: LatentModel) -> dict[str, Part]:
    peft = import_peft()
    read_json(folder / CONFIG)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG} is no adapter config: {error}.") from error
    if config.peft_type not in KINDS:
        raise UserError(f"{folder / CONFIG} is of type {config.peft_type}; known are {', '.join(KINDS)}.")
    if not (folder / TENSORS).exists():
        raise UserError(f"{folder} has no {TENSORS}: it is not whole, or a pickle, which is not opened.")
    if config.peft_type == "LORA":
        return _read_lora(folder / TENSORS, model)
    tensors = safetensors_io.load_tensors(folder / TENSORS, "an adapter")
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    return {name: Part(config, as_in(adapted_networks(model)[name], bare))}


def _of(name: str, values: dict) -> dict:
    """The entries of one network, by layer."""
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def _folders(source: Path) -> list[Path]:
    return sorted(path.parent for path in source.glob(f"*{ENDING}/{CONFIG}"))
