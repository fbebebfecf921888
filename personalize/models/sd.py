"""Stable Diffusion 1.x and 2.x, and everything of that shape: one CLIP text encoder, 4-channel latents, eps or v.

B pictures, C latent channels, h w latent size, L tokens, D text width.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from personalize.core import schedule as schedules
from personalize.core.guidance import Cond
from personalize.errors import UserError
from personalize.files import read_json
from personalize.models.imports import lean

with lean():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer


class StableDiffusion:
    """A `LatentModel`. Its parts are in `dtype` and frozen; a method puts what trains into float32."""

    def __init__(self, folder: Path, name: str, device: torch.device, dtype: torch.dtype):
        self.folder, self.name, self.device, self.dtype = folder, name, device, dtype
        self.fingerprint = ""
        self.text_encoder = _part(CLIPTextModel, folder, "text_encoder", dtype).to(device)
        self.tokenizer = _tokenizer(folder, most=self.text_encoder.config.max_position_embeddings)
        self.vae = _part(AutoencoderKL, folder, "vae", torch.float32).to(device)
        self.unet = _part(UNet2DConditionModel, folder, "unet", dtype).to(device)
        self.schedule = schedule_of(folder)
        self.latent_channels = self.unet.config.in_channels
        if self.latent_channels != self.vae.config.latent_channels:
            raise UserError(
                f"base {name!r} takes {self.latent_channels} channels where its VAE gives {self.vae.config.latent_channels}: "
                "an inpainting or editing U-Net, which personalize does not train. Use the plain text-to-image base."
            )
        self.downscale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = self.unet.config.sample_size * self.downscale

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode_latents(self, z0: Tensor) -> Tensor:
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor
        return self.vae.decode(z0.to(self.device, torch.float32) / scale + shift).sample.clamp(-1, 1)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """(B,L,D) hidden states of the last layer. Gradients flow where the text encoder trains."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        # Padding is attended to, as in training of these bases; diffusers passes a mask only where the config asks.
        return {"text": self.text_encoder(ids).last_hidden_state}

    def predict(self, z_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = torch.get_autocast_dtype(z_t.device.type) if torch.is_autocast_enabled(z_t.device.type) else self.dtype
        return self.unet(z_t.to(dtype), t, encoder_hidden_states=cond["text"].to(dtype), return_dict=False)[0]

    def overlong(self, prompt: str) -> str:
        ids = self.tokenizer(prompt).input_ids
        return self.tokenizer.decode(ids[self.tokenizer.model_max_length - 1 : -1])


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, *, fingerprint: str) -> StableDiffusion:
    """The base in a diffusers folder. UserError where a part is missing or only there as a pickle."""
    model = StableDiffusion(folder, name, device, dtype)
    model.fingerprint = fingerprint
    return model


def schedule_of(folder: Path) -> schedules.Schedule:
    """The noise schedule and prediction type that the folder's scheduler config names."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    config |= read_json(path)
    T, kind = config["num_train_timesteps"], config["beta_schedule"]
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
    prediction = config.get("prediction_type", "epsilon")
    if config.get("trained_betas"):
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind not in names:
        raise UserError(f"{path} has beta_schedule {kind!r}; known are {', '.join(names)}.")
    elif kind == "squaredcos_cap_v2":
        betas = schedules.cosine(T)
    else:
        betas = schedules.BETAS[names[kind]](T, config["beta_start"], config["beta_end"])
    if config.get("rescale_betas_zero_snr"):
        betas = schedules.rescale_zero_terminal_snr(betas)
        if prediction == "epsilon":
            raise UserError(f"{path} asks for zero terminal SNR with epsilon prediction, which says nothing of z0 there.")
    spacing = config.get("timestep_spacing", "leading")
    for key, value, known in (
        ("prediction_type", prediction, schedules.PREDICTIONS),
        ("timestep_spacing", spacing, schedules.SPACINGS),
    ):
        if value not in known:
            raise UserError(f"{path} has {key} {value!r}; known are {', '.join(known)}.")
    return schedules.from_betas(
        betas,
        prediction,
        spacing=spacing,
        steps_offset=config.get("steps_offset", 0),
        final_alpha_one=config.get("set_alpha_to_one", True),
    )


def _tokenizer(folder: Path, *, most: int) -> CLIPTokenizer:
    """The base's tokenizer, which cuts at `most` tokens. Without its files transformers would make an empty one."""
    place = folder / "tokenizer"
    if not any((place / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{place} has neither tokenizer.json nor vocab.json: it is not a whole Stable Diffusion base.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{place} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    return tokenizer


def _part(kind, folder: Path, part: str, dtype: torch.dtype):
    place = folder / part
    if not place.is_dir():
        raise UserError(f"{folder} has no folder {part}: it is not a whole Stable Diffusion base.")
    if not list(place.glob("*.safetensors")):
        raise UserError(
            f"{place} has no .safetensors file (pickles such as .bin are not opened, they can run code). "
            "Convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)."
        )
    try:
        with lean():
            module, found = kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{place} cannot be loaded: {str(error).splitlines()[0]}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{place} lacks {len(missing)} weights, such as {missing[0]}: it is not whole. Download it again.")
    return module.eval().requires_grad_(False)
