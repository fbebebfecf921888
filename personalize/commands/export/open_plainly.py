"""Whether diffusers, transformers and PEFT alone open what was written. A script, for a process that never saw this package."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def open_base(folder: Path) -> str:
    """Open a base's folder -> "", or the first weight that was not taken from it.

    transformers fills what it does not find with random numbers and warns only.
    """
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    for part in [part for part in ("unet", *TEXT_ENCODERS) if getattr(pipeline, part, None)]:
        files = sorted((folder / part).glob("*.safetensors"))
        stored = {key.removeprefix("text_model."): value for file in files for key, value in load_file(file).items()}
        for name, p in getattr(pipeline, part).named_parameters():
            value = stored.get(name.removeprefix("text_model."))
            if value is None or not value.float().equal(p.float()):
                return f"it does not take {part}.{name} from {', '.join(file.name for file in files) or 'any file'}"
    return ""


def open_lora(folder: Path, base: Path) -> str:
    """Load a LoRA's folder into networks of a base's shapes -> "", or the first tensor that is not in them as it is stored."""
    import transformers
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline if (base / "text_encoder_2").exists() else StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(str(folder), return_lora_metadata=True, local_files_only=True)
    options = {"network_alphas": alphas, "metadata": metadata}
    with torch.device("meta"):
        networks = {"unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(base / "unet")))}
        for part in [part for part in TEXT_ENCODERS if any(key.startswith(f"{part}.") for key in state)]:
            config = transformers.CLIPTextConfig.from_pretrained(str(base / part))
            networks[part] = getattr(transformers, TEXT_ENCODERS[part])(config)
    for network in networks.values():
        network.to_empty(device="cpu")  # the base's own weights do not matter
    if any(key.startswith("unet.") for key in state):
        pipeline.load_lora_into_unet(state, unet=networks["unet"], **options)
    for part, network in list(networks.items())[1:]:
        pipeline.load_lora_into_text_encoder(state, text_encoder=network, prefix=part, **options)
    loaded = {}
    for part, network in networks.items():
        for name, p in network.named_parameters():
            if "lora_" in name:
                loaded[f"{part}.{name.replace('.default_0', '').replace('text_model.', '')}"] = p
        if scales := {s for layer in network.modules() for s in getattr(layer, "scaling", {}).values()} - {1.0}:
            return f"{part} scales it by {', '.join(map(str, scales))} where it is stored as it acts"
    for file in sorted(folder.glob("pytorch_lora_weights.safetensors")):
        for key, value in load_file(file).items():
            p = loaded.get(key.replace("text_model.", ""), loaded.get(f"{key.replace('text_model.', '')}.weight"))
            if p is None or not p.float().equal(value.float()):
                return f"it does not take {key} from {file.name}"
    return ""


if __name__ == "__main__":
    written, *on = map(Path, sys.argv[1:])
    sys.exit((open_lora(written, *on) if on else open_base(written)) or 0)
