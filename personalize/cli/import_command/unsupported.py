"""Why a flag of another trainer is not needed here, or what stands in its place."""

# What is not needed here, and why.
NEEDLESS = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention needs as little memory",
    "set_grads_to_none": "it is always so",
    "pre_compute_text_embeddings": "prompts are always encoded once where no text encoder trains",
    "dataloader_num_workers": "photos are read once, by the process that trains",
    "num_dataloader_workers": "photos are read once, by the process that trains",
    "resume_from_checkpoint": "the same command goes on where it stopped",
    "logging_dir": "logs are in the run's folder",
    "local_rank": "the launcher sets it",
    "pretrained_vae_model_name_or_path": "the base's own VAE works in float32, where it does not overflow",
    "variant": "which of a base's files are read is found out",
    "no_tracemalloc": "memory is measured without it",
    "save_steps": "checkpoints hold the vectors (train.checkpoint_every)",
    "no_safe_serialization": "results are safetensors",
    "cache_dir": "HF_HOME says where downloads lie",
    "image_column": "the column of images is found out",
    "prior_generation_precision": "class images are drawn in dtype",
    "sample_batch_size": "it changes no image",
    "num_validation_images": "four images of the subject and four of the class are drawn (train.sample_every)",
    "repeats": "photos are repeated for as many steps as there are",
    "image_interpolation_mode": "photos are resized with Lanczos's filter",
    "wandb_key": "wandb login stores it",
}

PUBLISH = "publish when it is trained: personalize export --push OWNER/NAME"
# What cannot be done here, or not in a recipe.
MISSING = {
    "revision": "the newest revision is read; for another give its folder as base",
    "tokenizer_name": "the base's own tokenizer is used",
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id"), PUBLISH),
    "allow_tf32": 'matrix products in float32 are exact; dtype = "bfloat16" is the fast one',
    "text_encoder_use_attention_mask": "padding is attended to, as these bases were trained",
    "tokenizer_max_length": "prompts have the length that the base was trained with",
    "class_labels_conditioning": "the U-Net takes no class labels",
    "validation_images": "the U-Net takes no images",
    "validation_scheduler": "images are drawn with draw.sampler",
    "do_edm_style_training": "the noise levels are those of the base's own schedule",
    "caption_column": "write a caption file beside each photo",
    "class_data_dir": "class images of other programs are not read; personalize draws its own into priors/ and keeps them",
    "output_kohya_format": "personalize export --to kohya does it afterwards",
    "save_as_full_pipeline": "the result is the vectors alone",
    "skip_save_text_encoder": "the result is the whole base",
    "real_prior": "class images are drawn by the base, never photos",
    "concepts_list": "give each subject's folder and its --class, and a token for each",
    "wandb_project_name": "a run is logged under the name of its folder",
}
