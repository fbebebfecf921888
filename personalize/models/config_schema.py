"""What the JSON files of a base may say: every field of the libraries' configs, its kind, and the values that work here.

A field that asks for what personalize does not do (`Only`) is refused by name: a U-Net with it would draw something else
without a word. `tests/models/test_config_schema.py` walks the libraries' classes, so that a new field is noticed.
"""

from personalize.common.untrusted import SWITCH, Either, Many, Number, Only, Table, Text

NULL = Only((None,))
REMEDY = "Restore the file, or use another base."
WIDTH, DEPTH, REAL = Number(1, 16_384), Number(1, 64), Number(-1e6, 1e6, real=True)
WIDTHS, KINDS = Many(WIDTH, 1, 8), Many(Text(most=60), 1, 8)


def _each(kind) -> Either:
    """One value, or one a block, where the transformers of a block may differ too."""
    return Either((kind, Many(Either((kind, Many(kind, 1, 64), NULL)), 1, 8), NULL))


_SHARED = {
    "_class_name": Text(), "act_fn": Text(("silu", "swish", "mish", "gelu", "relu")), "block_out_channels": WIDTHS,
    "down_block_types": KINDS, "up_block_types": KINDS, "norm_num_groups": Number(1, 1024),
    "quantization_config": NULL,  # would load weights by another library
}  # fmt: skip

UNET = Table(
    _SHARED
    | {
        "sample_size": Number(1, 1024), "in_channels": Number(1, 64), "out_channels": Number(1, 64),
        "layers_per_block": _each(DEPTH), "transformer_layers_per_block": _each(DEPTH),
        "reverse_transformer_layers_per_block": _each(DEPTH), "cross_attention_dim": _each(WIDTH),
        "attention_head_dim": _each(WIDTH), "num_attention_heads": _each(WIDTH),
        "only_cross_attention": _each(SWITCH), "use_linear_projection": SWITCH, "upcast_attention": SWITCH,
        "center_input_sample": SWITCH, "flip_sin_to_cos": SWITCH, "freq_shift": REAL, "downsample_padding": Number(0, 8),
        "mid_block_type": Text(("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D")),
        "mid_block_scale_factor": REAL, "mid_block_only_cross_attention": Either((SWITCH, NULL)),
        "dropout": Number(0, 1, real=True), "norm_eps": Number(0, 1, real=True),
        "resnet_time_scale_shift": Text(("default", "scale_shift")), "resnet_skip_time_act": SWITCH,
        "resnet_out_scale_factor": REAL, "time_embedding_type": Text(("positional", "fourier")),
        "time_embedding_dim": Either((WIDTH, NULL)), "time_embedding_act_fn": Either((Text(), NULL)),
        "timestep_post_act": Either((Text(), NULL)), "conv_in_kernel": Number(1, 15), "conv_out_kernel": Number(1, 15),
        "cross_attention_norm": Either((Text(("layer_norm", "group_norm")), NULL)),
        "addition_embed_type": Only((None, "text_time")), "addition_time_embed_dim": Either((WIDTH, NULL)),
        "projection_class_embeddings_input_dim": Either((WIDTH, NULL)), "addition_embed_type_num_heads": WIDTH,
        "time_cond_proj_dim": NULL,  # guidance as an input: a distilled U-Net, which classifier-free guidance spoils
        "class_embed_type": NULL, "num_class_embeds": NULL, "class_embeddings_concat": Only((False,)),  # class labels
        "encoder_hid_dim": NULL, "encoder_hid_dim_type": NULL, "dual_cross_attention": Only((False,)),  # other conditions
        "attention_type": Only(("default",)),  # "gated" reads boxes
    },
    remedy=REMEDY,
)  # fmt: skip

VAE = Table(
    _SHARED
    | {
        "in_channels": Only((3,)), "out_channels": Only((3,)), "latent_channels": Number(1, 64), "layers_per_block": DEPTH,
        "sample_size": Either((Number(1, 8192), Many(Number(1, 8192), 1, 2))),
        "scaling_factor": Number(1e-6, 1e6, real=True), "shift_factor": Either((REAL, NULL)),
        "force_upcast": Either((SWITCH, NULL)), "use_quant_conv": SWITCH, "use_post_quant_conv": SWITCH,
        "mid_block_add_attention": SWITCH,
        "latents_mean": NULL, "latents_std": NULL,  # latents are shifted and scaled by one number each
    },
    remedy=REMEDY,
)  # fmt: skip

UPSCALER = Table(  # UNet2DModel, given a small image and its noise level: `models.upscaler`
    _SHARED
    | {
        "sample_size": Number(8, 1024), "in_channels": Only((15,)), "out_channels": Only((12,)),
        "center_input_sample": Only((False,)), "time_embedding_type": Text(("positional", "fourier")),
        "time_embedding_dim": Either((WIDTH, NULL)), "freq_shift": REAL, "flip_sin_to_cos": SWITCH,
        "mid_block_type": Either((Text(("UNetMidBlock2D",)), NULL)), "layers_per_block": DEPTH, "mid_block_scale_factor": REAL,
        "downsample_padding": Number(0, 8), "downsample_type": Text(("conv", "resnet")),
        "upsample_type": Text(("conv", "resnet")), "dropout": Number(0, 1, real=True),
        "attention_head_dim": Either((WIDTH, NULL)), "attn_norm_num_groups": Either((Number(1, 1024), NULL)),
        "norm_eps": Number(0, 1, real=True), "resnet_time_scale_shift": Text(("default", "scale_shift")),
        "add_attention": SWITCH, "class_embed_type": NULL, "num_class_embeds": Number(1, 1000),
        "num_train_timesteps": Either((Number(1, 100_000), NULL)),
    },
    needs=("sample_size", "in_channels", "out_channels", "num_class_embeds"),
    remedy="Give an upscaler of this package: personalize pretrain BASE --part upscaler.",
)  # fmt: skip

PRIOR = Table(  # PriorTransformer, for embeddings and tokens of one width: `models.unclip`
    {
        "_class_name": Only(("PriorTransformer",)), "num_attention_heads": Number(1, 256),
        "attention_head_dim": Number(1, 1024), "num_layers": DEPTH, "embedding_dim": WIDTH,
        "num_embeddings": Number(1, 1024), "additional_embeddings": Only((4,)),
        "dropout": Number(0, 1, real=True), "time_embed_act_fn": Text(("silu", "swish", "mish", "gelu", "relu")),
        "norm_in_type": Only((None, "layer")), "embedding_proj_norm_type": Only((None, "layer")),
        "encoder_hid_proj_type": Only(("linear",)), "added_emb_type": Only(("prd",)), "time_embed_dim": Either((WIDTH, NULL)),
        "embedding_proj_dim": NULL, "clip_embed_dim": NULL,
    },
    needs=("embedding_dim", "num_embeddings"),
    remedy="Train the part again: personalize pretrain BASE --part unclip.",
)  # fmt: skip

TEXT_ENCODER = Table(
    {
        "vocab_size": Number(1, 1_000_000), "hidden_size": WIDTH, "intermediate_size": Number(1, 65_536),
        "projection_dim": WIDTH, "num_hidden_layers": Number(1, 128), "num_attention_heads": Number(1, 256),
        "max_position_embeddings": Number(3, 10_000), "layer_norm_eps": Number(0, 1, real=True),
        "hidden_act": Text(("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")),
        "attention_dropout": Number(0, 1, real=True), "initializer_range": REAL, "initializer_factor": REAL,
        "pad_token_id": Either((Number(-1, 1_000_000), NULL)), "bos_token_id": Either((Number(0, 1_000_000), NULL)),
        "eos_token_id": Either((Number(0, 1_000_000), NULL)),
    },
    remedy=REMEDY,
)  # fmt: skip

IMAGE_ENCODER = Table(
    {
        "image_size": Number(1, 4096), "patch_size": Number(1, 256), "num_channels": Only((3,)),
        **{name: kind for name, kind in TEXT_ENCODER.fields.items() if not name.startswith(("vocab", "max_pos"))},
    },
    remedy=REMEDY,
)  # fmt: skip

SCHEDULER = Table(
    {
        "_class_name": Text(), "num_train_timesteps": Number(1, 100_000), "beta_schedule": Text(), "prediction_type": Text(),
        "beta_start": Number(0, 1, real=True), "beta_end": Number(0, 1, real=True), "steps_offset": Number(0, 1000),
        "trained_betas": Either((Many(Number(0, 1, real=True), 1, 100_000), NULL)), "timestep_spacing": Text(),
        "set_alpha_to_one": SWITCH, "rescale_betas_zero_snr": SWITCH,
    },
    remedy=REMEDY,
)  # fmt: skip

INDEX = Table({"_class_name": Text()}, needs=("_class_name",), remedy=REMEDY)
