"""How near a training step comes to what matrix products reach on this machine."""

import json
import time

from benchmarks.jobs import Job

EDGE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
SECONDS = 2.0  # for which products are repeated


def ceiling(device: str, dtype: str) -> float:
    """FLOP/s (a multiply-add is two) of a large matrix product, the best of many."""
    import torch

    n = EDGE[device]
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, until = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < until:
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def work(job: Job, method: str) -> int:
    """FLOP of the U-Net's forward and backward in one step, counted by torch without computing them."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.gate import LORA

    config = UNet2DConditionModel.load_config(job.folder / "unet")
    words = json.loads((job.folder / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        if method == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            unet.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(**LORA), unet)
        side, B = config["sample_size"], 2 * job.batch
        z_t, cond = torch.randn(B, config["in_channels"], side, side), torch.randn(B, words, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(z_t, torch.zeros(B, dtype=torch.long), cond, return_dict=False)[0].sum().backward()
    return counter.get_total_flops()


def words(job: Job, method: str, ms: dict[str, float]) -> str:
    """A sentence for {side: ms a step}."""
    flop, most = work(job, method), ceiling(job.device, job.dtype)
    shares = (f"{side} {100 * flop / (1e-3 * value) / most:.0f} %" for side, value in ms.items())
    return (
        f"A step is {flop / 1e9:.1f} GFLOP; of the {most / 1e9:.0f} GFLOP/s that a {job.dtype} matrix product reaches here, "
        f"{', '.join(shares)}."
    )
