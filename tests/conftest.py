"""No network, one thread, and tiny random Stable Diffusions saved as users have them."""

import gc
import json
import os
import socket
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes: another number of threads gives other bits
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

EXAMPLES = Path(__file__).parents[1] / "data_examples"


def pytest_collection_modifyitems(items):
    """The longest first: it is one fixture, for which one worker would wait at the end while the others have nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_learning.py")


def pytest_configure():
    gc.disable()


def pytest_collection_finish():
    """The collector never walks what imports and 4,000 tests made: 0.3 s each time, and each phase of a rehearsal asks."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def closed_network(monkeypatch):
    """A test that reaches for the network fails here, not by a time-out. Local sockets stay."""

    def refuse(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"the network is closed in tests: {address}")
        return connect(self, address, *rest)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def terminal(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder -> exit status, stdout, stderr."""
    from personalize.cli import app

    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["personalize", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A diffusers folder of the Stable Diffusion 1.x layout, random, 32 px, epsilon prediction, PNDM config."""
    import torch

    from personalize.models.lazy_imports import lazy_imports
    from personalize.toyland.pretraining import networks, stages

    with lazy_imports():
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny_sd")
    torch.manual_seed(0)
    words = networks.tokenizer(["a photo of a dog", "a cat in the snow", "a dog zqv", "a red hat", "a photo of a cat"] * 5)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=networks.MAX_LENGTH, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
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


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A diffusers folder of the SDXL layout, random, 32 px: encoders of two widths, a tokenizer that pads with "!"."""
    import torch

    from personalize.models.lazy_imports import lazy_imports
    from personalize.toyland.pretraining import networks, stages

    with lazy_imports():
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny_sdxl")
    torch.manual_seed(0)
    words = networks.tokenizer(["a photo of a dog", "a cat in the snow", "a dog zqv", "a red hat", "a photo of a cat"] * 5)
    model = json.loads(words.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    padded = CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token="!", model_max_length=networks.MAX_LENGTH)
    text = {
        "vocab_size": len(words), "num_attention_heads": 2, "max_position_embeddings": networks.MAX_LENGTH, "eos_token_id": 2,
        "num_hidden_layers": 3,
    }  # fmt: skip
    first = CLIPTextConfig(hidden_size=24, intermediate_size=48, hidden_act="quick_gelu", **text)
    second = CLIPTextConfig(hidden_size=40, intermediate_size=80, hidden_act="gelu", projection_dim=36, **text)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(first), text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=words, tokenizer_2=padded,
        unet=UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            norm_num_groups=8, attention_head_dim=(2, 4), cross_attention_dim=24 + 40, use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=36 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    stages.tokenizer_files(folder / "tokenizer", words)
    stages.tokenizer_files(folder / "tokenizer_2", padded)
    return folder


@pytest.fixture(scope="session")
def eyes(tmp_path_factory) -> Path:
    """Encoders of random weights in the layout that Toyland ships: encoders/identity, encoders/clip."""
    import torch

    from personalize.toyland.pretraining import networks

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    words = networks.tokenizer(["a dog in the snow", "a cat on the beach"] * 4)
    networks.clip(words).save_pretrained(root / "encoders" / "clip")
    networks.identity_encoder().save_pretrained(root / "encoders" / "identity")
    words.save_pretrained(root / "tokenizer")
    words.save_pretrained(root / "encoders" / "clip")
    return root


@pytest.fixture(scope="session")
def photos() -> Path:
    """Five ordinary image files of one dog, 64 px."""
    return EXAMPLES / "dog"


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A folder for unpacked bases that a module's tests share, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONALIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
