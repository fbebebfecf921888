"""The training scripts whose commands can be imported: their flags, their defaults, and what they do otherwise.

Flags and defaults: the examples of diffusers (commit 58eb52c, 2026-08) and of PEFT (5d602fd). A flag is written `name`
where it is a switch, `name=` where it takes a value and has none of its own, `name=4` where 4 is its own value, and `name+`
where it takes several. --output_dir has none here: without it, runs/ is the place.
"""

from dataclasses import dataclass, field

from personalize.common.errors import UserError
from personalize.common.settings import Value

_ALL = """
    pretrained_model_name_or_path= revision= center_crop resume_from_checkpoint= gradient_accumulation_steps=1
    gradient_checkpointing scale_lr lr_scheduler=constant lr_warmup_steps=500 lr_num_cycles=1 adam_beta1=0.9 adam_beta2=0.999
    adam_epsilon=1e-08 adam_weight_decay=0.01 push_to_hub hub_token= hub_model_id= logging_dir=logs allow_tf32
    report_to=tensorboard validation_prompt= num_validation_images=4 local_rank=-1 seed= resolution=512 mixed_precision=
    enable_xformers_memory_efficient_attention output_dir= checkpointing_steps=500 max_train_steps=
"""
_BOOTH = """
    tokenizer_name= instance_data_dir= class_data_dir= instance_prompt= class_prompt= with_prior_preservation
    prior_loss_weight=1 num_class_images=100 train_text_encoder train_batch_size=4 sample_batch_size=4 num_train_epochs=1
    learning_rate=5e-06 lr_power=1 use_8bit_adam max_grad_norm=1 prior_generation_precision=
"""
_DIFFUSERS = "variant= checkpoints_total_limit= dataloader_num_workers=0"
_FLOYD = """
    pre_compute_text_embeddings tokenizer_max_length= text_encoder_use_attention_mask validation_images+
    class_labels_conditioning=
"""
_FULL = """
    validation_steps=100 set_grads_to_none offset_noise snr_gamma= skip_save_text_encoder
    validation_scheduler=DPMSolverMultistepScheduler
"""
_LORA = "validation_epochs=50 rank=4 lora_dropout=0 image_interpolation_mode=lanczos learning_rate=0.0005"
_SDXL = """
    learning_rate=0.0001 text_encoder_lr=5e-06 snr_gamma= resolution=1024 adam_weight_decay=0.0001
    adam_weight_decay_text_encoder=0.001 optimizer=AdamW use_dora random_flip repeats=1 pretrained_vae_model_name_or_path=
    dataset_name= dataset_config_name= cache_dir= image_column=image caption_column= do_edm_style_training
    output_kohya_format prodigy_beta3= prodigy_decouple=True prodigy_use_bias_correction=True
    prodigy_safeguard_warmup=True
"""
_CUSTOM = """
    validation_steps=50 real_prior num_class_images=200 seed=42 checkpointing_steps=250 learning_rate=1e-05
    dataloader_num_workers=2 num_validation_images=2 freeze_model=crossattn_kv concepts_list= set_grads_to_none
    modifier_token= initializer_token=ktn+pll+ucd hflip noaug no_safe_serialization
"""
_PEFT = """
    validation_steps=100 use_lora lora_r=8 lora_alpha=32 lora_dropout=0 lora_bias=none lora_text_encoder_r=8
    lora_text_encoder_alpha=32 lora_text_encoder_dropout=0 lora_text_encoder_bias=none num_dataloader_workers=1
    no_tracemalloc wandb_key= wandb_project_name=
"""
_WORD = """
    save_steps=500 save_as_full_pipeline num_vectors=1 train_data_dir= placeholder_token= initializer_token=
    learnable_property=object repeats=100 train_batch_size=16 num_train_epochs=100 max_train_steps=5000
    learning_rate=0.0001 mixed_precision=no validation_steps=100
"""

SWITCH, SEVERAL = object(), object()  # the "defaults" of a flag without a value and of one with several


def flags(*texts: str, without: str = "") -> dict[str, object]:
    """Name -> default: a text, None for a value without one, SWITCH or SEVERAL; later texts win."""
    defaults: dict[str, object] = {}
    for word in " ".join(texts).split():
        name, equals, default = word.partition("=")
        defaults[name.removesuffix("+")] = default or None if equals else SEVERAL if name.endswith("+") else SWITCH
    return {name: default for name, default in defaults.items() if name not in without.split()}


@dataclass(frozen=True)
class Script:
    """A script. fixed: settings that its code fixes; needs: flags without which it does not start, a|b for either.

    notes: what it does that no recipe can say. guidance: of its pipeline for class images. squeezes: whether photos are
    squeezed into squares: never, always, or "uncropped", which is without --center_crop.
    """

    file: str
    method: str
    flags: dict[str, object]
    needs: tuple[str, ...]
    fixed: dict[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guidance: float = 7.5
    squeezes: str = "never"

    @property
    def title(self) -> str:
        return f"{self.file} of {'PEFT' if '/' in self.file else 'diffusers'}"


_SUBJECT = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt")
_NEW_WORD = ("pretrained_model_name_or_path", "train_data_dir", "placeholder_token", "initializer_token")
_SENTENCES = "prompts: one of many sentences at random for each photo there, train.prompt or a photo's caption file here."
_INVERSION = {"prior.count": 0, "train.clip": 0.0, "photos.flip": True, "photos.crop": "center"}
_FLIPPED_ONCE = "--random_flip: each photo is mirrored once there, anew at every step here (photos.flip)."

_ROWS = (
    Script("train_dreambooth.py", "full", flags(_ALL, _BOOTH, _DIFFUSERS, _FLOYD, _FULL), _SUBJECT),
    Script("train_dreambooth_lora.py", "lora", flags(_ALL, _BOOTH, _DIFFUSERS, _FLOYD, _LORA), _SUBJECT),
    Script(
        "train_dreambooth_lora_sdxl.py",
        "lora",
        flags(_ALL, _BOOTH, _DIFFUSERS, _LORA, _SDXL, without="tokenizer_name"),
        ("pretrained_model_name_or_path", "instance_data_dir|dataset_name", "instance_prompt"),
        {"photos.crop": "center"},
        (_FLIPPED_ONCE,),
        guidance=5.0,
    ),
    Script(
        "textual_inversion.py",
        "textual-inversion",
        flags(_ALL, _DIFFUSERS, _WORD, "tokenizer_name= validation_epochs= no_safe_serialization"),
        _NEW_WORD,
        _INVERSION,
        (_SENTENCES,),
        squeezes="uncropped",
    ),
    Script(
        "textual_inversion_sdxl.py",
        "textual-inversion",
        flags(_ALL, _DIFFUSERS, _WORD, "use_8bit_adam"),
        _NEW_WORD,
        _INVERSION,
        (_SENTENCES,),
        squeezes="always",
    ),
    Script(
        "train_custom_diffusion.py",
        "custom-diffusion",
        flags(_ALL, _BOOTH, _DIFFUSERS, _CUSTOM, without="train_text_encoder lr_num_cycles lr_power"),
        ("pretrained_model_name_or_path", "instance_data_dir|concepts_list", "instance_prompt|concepts_list"),
        {"photos.crop": "center"},
        squeezes="always",
    ),
    Script("lora_dreambooth/train_dreambooth.py", "lora", flags(_ALL, _BOOTH, _PEFT), _SUBJECT),
)
SCRIPTS = {script.file: script for script in _ROWS}


def refuse_flag(flag: str) -> None:
    """UserError where an option that `personalize train` does not have is a flag of one of the scripts."""
    for script in SCRIPTS.values():
        if flag.removeprefix("--") in script.flags:
            raise UserError(
                f"{flag} is a flag of {script.title}; personalize train has none of that name. Turn the command into a recipe: "
                f'personalize import-command "accelerate launch {script.file} {flag} …"'
            )
