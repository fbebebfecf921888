"""The LoRA family, through PEFT (Hu et al. 2106.09685). Saved as `pytorch_lora_weights.safetensors`, diffusers' layout."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalize.config import Recipe
from personalize.errors import UserError
from personalize.methods import require_folder
from personalize.models.base import LatentModel

FILE = "pytorch_lora_weights.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """Adapters in float32 whatever the base's dtype; a fresh adapter changes nothing."""
    train, lora = recipe.train, recipe.lora
    groups = []
    for part, module in _parts(model, train.text_encoder):
        targets = lora.targets if part == "unet" else TEXT_TARGETS
        _inject(module, rank=lora.rank, alpha=lora.alpha or lora.rank, targets=targets)
        params = [p for p in module.parameters() if p.requires_grad]
        for p in params:
            p.data = p.data.float()
        lr = train.lr if part == "unet" else train.text_lr or train.lr
        groups.append({"name": part, "params": params, "lr": lr})
        module.train()
        if train.gradient_checkpointing and part == "unet":
            module.enable_gradient_checkpointing()
        elif train.gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    return groups


def state(model: LatentModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {
        f"{part}.{k}": v
        for part, module in _parts(model, True)
        if hasattr(module, "peft_config")
        for k, v in get_peft_model_state_dict(module).items()
    }


def restore(model: LatentModel, tensors: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    for part, module in _parts(model, True):
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        if own:
            try:
                result = set_peft_model_state_dict(module, own)
            except RuntimeError as error:  # a layer of the same name and another width
                raise UserError(f"this LoRA was made for another base than {model.name!r}: {error}") from error
            strange = result.unexpected_keys + [k for k in result.missing_keys if "lora_" in k]
            if strange:
                raise UserError(f"this LoRA was made for another base than {model.name!r}: they differ in {strange[0]}.")


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """One file, with rank and alpha in its header, where diffusers' `load_lora_weights` looks for them too."""
    header = {}
    for part, module in _parts(model, True):
        if hasattr(module, "peft_config"):
            config = module.peft_config["default"]
            fields = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
            header |= {f"{part}.{k}": v for k, v in fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in state(model).items()}
    # One entry only: safetensors writes several in an order of chance, and the same run would give another file.
    save_file(tensors, folder / FILE, metadata={"lora_adapter_metadata": json.dumps(header)})


def load(model: LatentModel, folder: Path) -> None:
    path = require_folder(folder, FILE)
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for part, module in _parts(model, True):
        if f"{part}.r" in header:
            targets = header[f"{part}.target_modules"]
            _inject(module, rank=header[f"{part}.r"], alpha=header[f"{part}.lora_alpha"], targets=targets)
    restore(model, load_file(path))


def _inject(module: nn.Module, *, rank: int, alpha: float, targets) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
    try:
        inject_adapter_in_model(config, module)
    except ValueError as error:
        raise UserError(f"lora.targets = {list(targets)} matches no layer of this base: {error}") from error
    module.peft_config = {"default": config}


def _parts(model: LatentModel, text: bool):
    yield "unet", model.unet
    if text:
        yield "text_encoder", model.text_encoder
