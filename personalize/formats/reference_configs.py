"""What the released Stable Diffusion models have besides their networks: schedulers, pipeline index, header entries.

As in the repositories stable-diffusion-v1-5, stabilityai/stable-diffusion-2 and stable-diffusion-xl-base-1.0; the header
entries are those of github.com/Stability-AI/ModelSpec.
"""

from collections.abc import Collection, Mapping
from typing import Any

Config = dict[str, Any]
# as ModelSpec says them, and as diffusers does
MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS |= {"trained_betas": None, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
BETAS |= {"timestep_spacing": "leading"}
SCHEDULERS = {
    "sd1": {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True},
    "sd2": {"_class_name": "DDIMScheduler", **BETAS},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", **BETAS, "interpolation_type": "linear", "use_karras_sigmas": False},
}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
INPAINTING = {family: kind.replace("Pipeline", "InpaintPipeline") for family, kind in PIPELINES.items()}  # of 9 channels
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
TOKENIZER = ["transformers", "CLIPTokenizer"]
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
# Empty tensors by which ComfyUI and others recognize an SDXL of v prediction, and one of zero terminal SNR.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"


def prediction(family: str, metadata: Mapping[str, str], names: Collection[str]) -> str:
    """ "epsilon", "v_prediction" or "sample": by the header, else by the marks of SDXL files, else as in the release."""
    stated = MODELSPEC_PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "")
    return stated or ("v_prediction" if V_MARK in names or family == "sd2" else "epsilon")


def scheduler(family: str, prediction_type: str, *, zero_snr: bool) -> Config:
    """The scheduler's config of a family. Zero terminal SNR needs another class and spacing (Lin et al. 2305.08891)."""
    config = SCHEDULERS[family] | {"prediction_type": prediction_type}
    if zero_snr and prediction_type == "v_prediction":
        kind = "DDIMScheduler" if family == "sd1" else config["_class_name"]
        config |= {"_class_name": kind, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def pipeline(family: str, parts: Collection[str], scheduler_class: str, *, inpaints: bool = False) -> Config:
    """The pipeline's `model_index.json`."""
    kind = (INPAINTING if inpaints else PIPELINES)[family]
    index: Config = {"_class_name": kind, "feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {"scheduler": ["diffusers", scheduler_class]} | {part: CLASSES[part] for part in parts}
    index |= {part.replace("text_encoder", "tokenizer"): TOKENIZER for part in parts if part.startswith("text_encoder")}
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    return dict(sorted(index.items()))


def modelspec(family: str, prediction_type: str, pixels: int, title: str) -> dict[str, str]:
    """Header entries that say what a single file is."""
    v = prediction_type == "v_prediction"
    kind = ARCHITECTURES.get(family) or ("stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": kind,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": "v" if v else prediction_type,
    }
