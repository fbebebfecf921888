"""A random network of LyCORIS' standalone wrapper on a U-Net, and the updates that its forward pass adds.

Job: folder, algo, tucker, factor, file, deltas.
"""

import json
import sys

import torch
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris
from safetensors.torch import save_file

job = json.loads(sys.argv[1])
torch.manual_seed(0)
unet = UNet2DConditionModel.from_pretrained(job["folder"], subfolder="unet")
network = create_lycoris(
    unet, 1.0, linear_dim=2, linear_alpha=1, conv_dim=2, conv_alpha=1, algo=job["algo"], use_tucker=job["tucker"],
    factor=job["factor"], decompose_both=job["tucker"],
)  # fmt: skip
network.apply_to()
with torch.no_grad():
    for p in network.parameters():
        p.normal_(std=0.3)
    deltas = {module.lora_name: module.get_weight(module.shape).contiguous() for module in network.loras}
save_file({key: value.contiguous() for key, value in network.state_dict().items()}, job["file"])
save_file(deltas, job["deltas"])
print(json.dumps({"layers": len(deltas)}))
