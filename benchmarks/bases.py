"""Bases of random weights, at the sizes of the releases and tiny: what a measurement needs where nothing can be downloaded."""

from collections.abc import Callable
from pathlib import Path

from personalize.formats import reference_configs

PHOTOS = Path(__file__).parents[1] / "data_examples" / "dog"
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = {**TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "hidden_act": "quick_gelu"}  # fmt: skip
TINY_UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
             "attention_head_dim": 4, "cross_attention_dim": 32, "down_block_types": (CROSS, PLAIN)}  # fmt: skip
TINY_VAE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
TINY_TEXT = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "max_position_embeddings": 32}  # fmt: skip
CONFIGS = {
    "sd15": {
        "family": "sd1",
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {**VAE, "sample_size": 512},
        "text_encoder": CLIP_L,
    },
    "sd21": {
        "family": "sd2",
        "unet": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                 "use_linear_projection": True, "upcast_attention": True},
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": {**TEXT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                         "num_attention_heads": 16, "hidden_act": "gelu"},
    },
    "sdxl": {
        "family": "sdxl",
        "unet": {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
                 "block_out_channels": (320, 640, 1280), "down_block_types": (PLAIN, CROSS, CROSS),
                 "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
                 "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": 1280 + 6 * 256},
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                           "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
    },
    "tiny": {"family": "sd1", "unet": TINY_UNET, "vae": TINY_VAE, "text_encoder": TINY_TEXT},
    "tiny-sd21": {"family": "sd2", "unet": {**TINY_UNET, "use_linear_projection": True}, "vae": TINY_VAE,
                  "text_encoder": TINY_TEXT},
    "tiny-sdxl": {
        "family": "sdxl",
        "unet": {**TINY_UNET, "cross_attention_dim": 64, "down_block_types": (PLAIN, CROSS), "use_linear_projection": True,
                 "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": 32 + 6 * 8},
        "vae": TINY_VAE,
        "text_encoder": TINY_TEXT,
        "text_encoder_2": {**TINY_TEXT, "projection_dim": 32},
    },
}  # fmt: skip


def base(kind: str, folder: Path, *, half: bool = False) -> str:
    """The name of a base of random weights, made in `folder` unless it is there; half: in float16, as released."""
    if kind == "toyland":
        return kind
    place = folder / kind
    if (place / "model_index.json").exists():
        return str(place)
    from personalize.common.files import write_json
    from personalize.toyland.pretraining import networks, stages

    configs = CONFIGS[kind]
    words = networks.tokenizer(["a photo of a dog", "a cat in the snow", "a dog sks"] * 5)
    words.model_max_length = configs["text_encoder"]["max_position_embeddings"]
    texts = [part for part in configs if part.startswith("text_encoder")]
    parts = ("vae", "unet", *texts)
    for part in parts:
        random_network(lambda part=part: network(kind, part, words), half=half).save_pretrained(place / part)
    for part in texts:
        tokenizer = place / part.replace("text_encoder", "tokenizer")
        words.save_pretrained(tokenizer)
        stages.tokenizer_files(tokenizer, words)
    family = configs["family"]
    scheduler = reference_configs.scheduler(family, reference_configs.prediction(family, {}, ()), zero_snr=False)
    (place / "scheduler").mkdir(exist_ok=True)
    write_json(place / "scheduler" / "scheduler_config.json", scheduler)
    write_json(place / "model_index.json", reference_configs.pipeline(family, parts, scheduler["_class_name"]))  # the last
    return str(place)


def network(kind: str, part: str, words):
    """A part of a base, with its library's own initialization. words: the tokenizer that the text encoder reads."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CONFIGS[kind][part]
    if part == "unet":
        down = config.get("down_block_types", (CROSS, CROSS, CROSS, PLAIN))
        types = {"down_block_types": down, "up_block_types": tuple(t.replace("Down", "Up") for t in reversed(down))}
        return UNet2DConditionModel(**{**config, **types})
    if part == "vae":
        blocks = len(config["block_out_channels"])
        types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
        return AutoencoderKL(latent_channels=4, **types, **config)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return (CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel)(CLIPTextConfig(**ids, **config))


def random_network(make: Callable, *, half: bool = False):
    """A network with small random weights, without the minutes that its own initialization takes."""
    import torch

    with torch.device("meta"):
        network = make()
    network = (network.half() if half else network).to_empty(device="cpu")
    some = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.float16 if half else torch.float32)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            torch.nn.init.constant_(p, float(name.endswith("weight")))
        else:
            p.data.copy_(some.repeat(-(-p.numel() // 4096))[: p.numel()].view(p.shape))
    for name, b in network.named_buffers():
        assert name.endswith("position_ids"), name
        b.copy_(torch.arange(b.shape[-1])[None])
    return network


def photos_at(size: int, folder: Path) -> Path:
    """`folder` with five photos of a dog, enlarged to the size of a base, px, so that nobody has to."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for photo in sorted(PHOTOS.glob("*.png")):
        if not (folder / photo.name).exists():
            Image.open(photo).convert("RGB").resize((size, size)).save(folder / photo.name)
    return folder
