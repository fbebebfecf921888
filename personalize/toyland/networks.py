"""The standard classes, at Toyland's size: tokenizer, VAE, text encoder, U-Net, and two encoders for evaluation."""

from collections.abc import Iterable

SIZE = 64  # px
LATENT = 16
WORDS = 32  # longest prompt, tokens
LATENT_CHANNELS = 4
TEXT_WIDTH = 192


def tokenizer(captions: Iterable[str]):
    """A byte-complete CLIP tokenizer whose merges make every frequent word of the captions one token."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=4096, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    import json

    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: k for k, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WORDS)


def vae():
    """AutoencoderKL, f4: (B,3,64,64) <-> (B,4,16,16). The posterior starts narrow, or the colours are lost."""
    import torch
    from diffusers import AutoencoderKL

    channels = (16, 32, 96)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels, layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        model.quant_conv.bias[LATENT_CHANNELS:] = -7.0
    return model


def text_encoder(words):
    """CLIPTextModel; `words` is the tokenizer, whose ids it takes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text(words, TEXT_WIDTH, 3)))


def unet():
    """UNet2DConditionModel: plain at 16×16, cross-attention at 8×8 and 4×4, v prediction by its scheduler."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(96, 160, 192), attention_head_dim=(4, 5, 6), cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def scheduler():
    """Zero terminal SNR, or no night would be dark and no snow white at this size (Lin et al. 2305.08891)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def clip(words):
    """CLIPModel for evaluation only: it never conditions the U-Net that it judges."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 5,
        "image_size": SIZE, "patch_size": 8,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=_text(words, 160, 2), vision_config=vision, projection_dim=128))


def identity_encoder():
    """ViTModel whose class token tells individuals apart."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False)


def _text(words, width: int, layers: int) -> dict:
    return {
        "vocab_size": len(words), "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "max_position_embeddings": WORDS, "projection_dim": 128,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
