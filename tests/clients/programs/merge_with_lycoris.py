"""Merges a file into a base with LyCORIS, and saves the weights of U-Net and text encoder. Job: folder, file, out."""

import json
import sys

from diffusers import UNet2DConditionModel
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from safetensors.torch import save_file
from transformers import CLIPTextModel

job = json.loads(sys.argv[1])
unet = UNet2DConditionModel.from_pretrained(job["folder"], subfolder="unet")
text_encoder = CLIPTextModel.from_pretrained(job["folder"], subfolder="text_encoder")
LycorisNetworkKohya.UNET_TARGET_REPLACE_NAME = []  # of diffusers' U-Net it would find the time embedding twice, and stop
network, weights = create_network_from_weights(1.0, job["file"], None, text_encoder, unet)
layers = len(network.unet_loras), len(network.text_encoder_loras)
network.merge_to(text_encoder, unet, weights, None, None)
tensors = {f"unet.{name}": p for name, p in unet.named_parameters()}
tensors |= {f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()}
save_file({name: p.detach().contiguous() for name, p in tensors.items()}, job["out"])
print(json.dumps({"layers": layers, "in_file": len({key.split(".")[0] for key in weights})}))
