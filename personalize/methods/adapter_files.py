"""Adapters on disk: LoRA as one file in diffusers' layout, the other kinds as a PEFT folder for each network.

pytorch_lora_weights.safetensors   "<network>.<layer>.lora_A.weight"; ranks and alphas in its header, where diffusers looks
<network>_adapter/                 adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained`

LoRA files of other programs are read too.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from personalize.common.errors import UserError
from personalize.common.files import write_json
from personalize.formats import lora, safetensors_io
from personalize.methods import as_in
from personalize.methods.peft_layers import adaptable_layers
from personalize.models.interface import LatentModel

FILE = "pytorch_lora_weights.safetensors"
ENDING, CONFIG, TENSORS = "_adapter", "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "LOKR", "LOHA", "OFT", "BOFT")
RANK = ".lora_A.weight"  # its first dimension


@dataclass(frozen=True)
class Part:
    """The adapter of one network: its PEFT config, and its tensors by the names PEFT gives them."""

    config: Any
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return str(self.config.peft_type.value).lower()

    @property
    def alpha(self) -> float:
        """The update is alpha / rank times B A; rsLoRA's root is in it."""
        value = getattr(self.config, "lora_alpha", None) or getattr(self.config, "alpha", 1)
        return value * math.sqrt(self.config.r) if getattr(self.config, "use_rslora", False) else value


def write_adapter(folder: Path, parts: dict[str, Part]) -> None:
    """The adapters of several networks, all of one kind, by network."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(part.kind == "lora" for part in parts.values()):
        tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.tensors.items()}
        ranks = {k.removesuffix(RANK): len(v) for k, v in tensors.items() if k.endswith(RANK)}
        alphas = {layer: parts[layer.partition(".")[0]].alpha for layer in ranks}
        lora.write_diffusers(folder / FILE, lora.Adapter(tensors, ranks, alphas))
        return
    for name, part in parts.items():
        place = folder / f"{name}{ENDING}"
        place.mkdir(exist_ok=True)
        # PEFT would write its sets in an order of chance, and the same run would give another file.
        write_json(place / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in part.config.to_dict().items()})
        safetensors_io.save_tensors(place / TENSORS, {f"base_model.model.{k}": v for k, v in part.tensors.items()})


def holds_adapter(source: Path) -> bool:
    """Whether a file or folder has an adapter in it, by its names alone."""
    if source.is_dir():
        return any((source / name).exists() for name in (FILE, CONFIG)) or bool(_folders(source))
    keys = safetensors_io.read_header(source)["tensors"] if source.suffix == ".safetensors" else ()
    return any(".lora" in key or key.startswith("lora_") for key in keys)


def read_adapter(source: Path, model: LatentModel) -> dict[str, Part]:
    """The adapters in a LoRA file or in a folder of ours or PEFT's, by network.

    UserError where there is none, or one for a layer or network that the base has not.
    """
    if not source.is_dir():
        return _lora(source, model)
    if (source / FILE).exists():
        return _lora(source / FILE, model)
    places = {place.name.removesuffix(ENDING): place for place in _folders(source)}
    if (source / CONFIG).exists():
        places["unet"] = source
    if not places:
        raise UserError(f"{source} has neither {FILE} nor {CONFIG}: there is no adapter in it.")
    here, found = adapted_networks(model), {}
    for name, place in places.items():
        if name not in here:
            raise UserError(f"{place} was made for another base than {model.name!r}, which has {', '.join(here)} only.")
        found |= _peft_folder(place, name, model)
    return found


def adapted_networks(model: LatentModel) -> dict[str, nn.Module]:
    """All that can carry an adapter."""
    return {"unet": model.unet, **model.text_encoders}


def _lora(path: Path, model: LatentModel) -> dict[str, Part]:
    """A LoRA of any program: each layer has its own rank and alpha."""
    from peft import LoraConfig

    names = {name: set(adaptable_layers(network)) for name, network in adapted_networks(model).items()}
    adapter, found = lora.read_lora(path, names, model.name), {}
    for name in names:
        own, ranks, alphas = (_of(name, values) for values in (adapter.tensors, adapter.ranks, adapter.alphas))
        if not ranks:
            continue
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=sorted(ranks),
            rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != r},
            alpha_pattern={f"^{layer}": value for layer, value in alphas.items() if value != alpha},
            use_dora=any(key.endswith("lora_magnitude_vector") for key in own),
        )  # fmt: skip
        found[name] = Part(config, own)
    return found


def _peft_folder(place: Path, name: str, model: LatentModel) -> dict[str, Part]:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(place))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place / CONFIG} is no adapter config: {error}.") from error
    if config.peft_type not in KINDS:
        raise UserError(f"{place / CONFIG} is of type {config.peft_type}; known are {', '.join(KINDS)}.")
    if not (place / TENSORS).exists():
        raise UserError(f"{place} has no {TENSORS}: it is not whole, or a pickle, which is not opened.")
    if config.peft_type == "LORA":
        return _lora(place / TENSORS, model)
    tensors = safetensors_io.load_tensors(place / TENSORS, "an adapter")
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    return {name: Part(config, as_in(adapted_networks(model)[name], bare))}


def _of(name: str, values: dict) -> dict:
    """The entries of one network, by layer."""
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def _folders(source: Path) -> list[Path]:
    return sorted(path.parent for path in source.glob(f"*{ENDING}/{CONFIG}"))
