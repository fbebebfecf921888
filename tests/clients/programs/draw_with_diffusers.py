"""Opens a folder with diffusers, a LoRA on it, and draws latents from given noise. Job: folder, lora, prompt, noise, out."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

job = json.loads(sys.argv[1])
_, info = CLIPTextModel.from_pretrained(job["folder"], subfolder="text_encoder", output_loading_info=True)
pipeline = StableDiffusionPipeline.from_pretrained(job["folder"], torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
if job["lora"]:
    path = Path(job["lora"])
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
words = pipeline.tokenizer(job["prompt"], padding="max_length", max_length=pipeline.tokenizer.model_max_length)
text = pipeline.text_encoder(torch.tensor([words.input_ids]))[0]
noise = load_file(job["noise"])["noise"]
latents = pipeline(
    job["prompt"], latents=noise, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
    height=noise.shape[2] * pipeline.vae_scale_factor, width=noise.shape[3] * pipeline.vae_scale_factor,
).images  # fmt: skip
save_file({"text": text.detach().contiguous(), "latents": latents.contiguous()}, job["out"])
print(json.dumps({"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "ids": words.input_ids}))
