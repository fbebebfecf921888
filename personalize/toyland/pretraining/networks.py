"""The standard classes, at Toyland's size: tokenizer, VAE, CLIP pair, U-Net, and an encoder of identity.

Images are 64 or 128 px, latents 16×16 at both: f4 or f8.
"""

from collections.abc import Iterable

SIZE = 64  # px of the shipped base
LATENT = 16
VAE_CHANNELS = {64: (16, 32, 96), 128: (16, 32, 64, 128)}  # by size, px
PATCHES = 8  # a side, of what the two encoders see
MAX_LENGTH = 32  # longest prompt, tokens
LATENT_CHANNELS = 4
TEXT_WIDTH = 192


def tokenizer(captions: Iterable[str]):
    """A byte-complete CLIP tokenizer whose merges make every frequent word of the captions one token."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    template = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=4096, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    import json

    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: k for k, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def vae(size: int = SIZE):
    """AutoencoderKL: (B,3,size,size) <-> (B,4,16,16). The posterior starts narrow, or the colours are lost."""
    import torch
    from diffusers import AutoencoderKL

    channels = VAE_CHANNELS[size]
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels, layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        sample_size=size, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        model.quant_conv.bias[LATENT_CHANNELS:] = -7.0
    return model


def clip(tokenizer, size: int = SIZE):
    """CLIPModel for the ids of `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT_WIDTH, "intermediate_size": 3 * TEXT_WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": TEXT_WIDTH // 32, "max_position_embeddings": MAX_LENGTH, "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=_vision(size), projection_dim=128)
    return CLIPModel._from_config(config, attn_implementation="eager")  # others are slower at this size


def text_encoder(clip):
    """CLIPTextModel: the text tower of the pair, which conditions the U-Net."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return tower


def unet():
    """UNet2DConditionModel: plain at 16×16, cross-attention at 8×8 and 4×4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(96, 160, 160), attention_head_dim=(3, 5, 5), cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


# Our betas -> their name in diffusers' DDIM and where they begin and end; the others are written out.
DIFFUSERS_BETAS = {
    "linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 0.00085, 0.012),
}  # fmt: skip


def scheduler(betas: str = "scaled_linear", prediction: str = "v_prediction"):
    """DDIM over the noise schedule that the U-Net was trained with; `forward_process` is the same for training.

    v and z0 prediction go with zero terminal SNR (Lin et al. 2305.08891), or no night would be dark and no snow white at
    this size; eps prediction cannot.
    """
    from diffusers import DDIMScheduler

    from personalize.core import schedule

    if betas in DIFFUSERS_BETAS:
        table = dict(zip(("beta_schedule", "beta_start", "beta_end"), DIFFUSERS_BETAS[betas], strict=True))
    else:
        table = {"trained_betas": schedule.BETAS[betas](1000).tolist()}
    return DDIMScheduler(
        **table, prediction_type=prediction, rescale_betas_zero_snr=prediction != "epsilon",
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def forward_process(betas: str = "scaled_linear", prediction: str = "v_prediction", zero_snr: bool = True):
    """The noise schedule of `scheduler`. zero_snr: at its end, which eps prediction never has."""
    from personalize.core import schedule

    table = schedule.BETAS[betas](1000)
    if zero_snr and prediction != "epsilon":
        table = schedule.rescale_zero_terminal_snr(table)
    return schedule.from_betas(table, prediction, spacing="trailing")


def identity_encoder(size: int = SIZE):
    """ViTModel whose class token tells individuals apart."""
    from transformers import ViTConfig, ViTModel

    return ViTModel._from_config(ViTConfig(**_vision(size)), add_pooling_layer=False, attn_implementation="eager")


def _vision(size: int) -> dict:
    return {
        "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6,
        "image_size": size, "patch_size": size // PATCHES,
    }  # fmt: skip
