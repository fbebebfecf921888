"""No network, one thread, and a tiny random Stable Diffusion saved as users have it."""

import os
import socket
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes: another number of threads gives other bits
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

EXAMPLES = Path(__file__).parents[1] / "data_examples"


@pytest.fixture(autouse=True)
def closed_network(monkeypatch):
    """A test that reaches for the network fails here, not by a time-out. Local sockets stay."""

    def refuse(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"the network is closed in tests: {address}")
        return connect(self, address, *rest)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A diffusers folder of the Stable Diffusion 1.x layout, random, 32 px, epsilon prediction, PNDM config."""
    import torch

    from personalize.models.imports import lean
    from personalize.toyland import networks, stages

    with lean():
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny_sd")
    torch.manual_seed(0)
    words = networks.tokenizer(["a photo of a dog", "a cat in the snow", "a dog zqv", "a red hat", "a photo of a cat"] * 5)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=networks.WORDS, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            norm_num_groups=8, attention_head_dim=4, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    stages.tokenizer_files(folder / "tokenizer", words)
    return folder


@pytest.fixture
def photos() -> Path:
    """Five ordinary picture files of one dog, 64 px."""
    return EXAMPLES / "dog"
