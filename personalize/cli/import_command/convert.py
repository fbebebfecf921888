"""A script's options turned into settings that do the same work, with notices of what is different or missing."""

from personalize.cli.import_command import schedule
from personalize.cli.import_command.draft import Draft
from personalize.cli.import_command.parse import Call
from personalize.cli.import_command.split_prompt import SplitPrompt, split_prompt
from personalize.cli.import_command.unsupported import MISSING, NEEDLESS
from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FLAGS = """
    resolution=photos.size seed=seed adam_beta1=train.beta1 adam_beta2=train.beta2 adam_weight_decay=train.weight_decay
    max_grad_norm=train.clip checkpointing_steps=train.checkpoint_every prior_loss_weight=train.prior_weight
    num_class_images=prior.count snr_gamma=train.snr_gamma text_encoder_lr=train.text_lr rank=lora.rank
    num_vectors=embedding.vectors checkpoints_total_limit=train.keep lora_r=lora.rank lora_alpha=lora.alpha
"""
_SWITCHES = """
    train_text_encoder=train.text_encoder gradient_checkpointing=train.gradient_checkpointing use_dora=lora.dora
    random_flip=photos.flip hflip=photos.flip
"""
PLAIN, SWITCHES = (dict(pair.split("=") for pair in text.split()) for text in (_FLAGS, _SWITCHES))


def convert_call(call: Call) -> Draft:
    """The draft of a recipe. UserError for a value that is not a number."""
    draft = Draft(call, method=call.script.method)
    draft.settings |= {"train.text_encoder": False, "train.snr_gamma": 0.0}  # off where the script has no flag for it
    for part in (_base, _plain, _subject, _method, _prior, schedule.convert_schedule, _outputs, _rest):
        part(draft)
    for key, value in draft.settings.items():
        names = [name for name in call.variables if name in str(value)]
        draft.notices += [f"{key} holds {name}, which the command does not set: put its value in." for name in names]
    return draft


def _plain(draft: Draft) -> None:
    """Flags and switches of the same meaning; then what the script's code fixes."""
    call, flags = draft.call, draft.call.script.flags
    for name, key in PLAIN.items():
        if name in flags and (value := call.number(name, SETTINGS[key].kind)) is not None:
            draft.settings[key] = value
    for name, key in SWITCHES.items():
        if name in flags:
            draft.settings[key] = call.on(name)
    if call.on("offset_noise"):
        draft.settings["train.noise_offset"] = 0.1  # which its code fixes
    cropped, squeezes = call.on("center_crop"), call.script.squeezes
    draft.settings["photos.crop"] = "center" if cropped else "random"
    if squeezes == "always" or (squeezes == "uncropped" and not cropped):
        although = ", whatever --center_crop says" if cropped else ""
        draft.notices.append(f"photos that are not square: squeezed to one there{although}, cut to one here (photos.crop).")
    elif "photos.crop" in call.script.fixed and not cropped:  # its U-Net is told the corner, so the place need not be random
        draft.notices.append("photos: each is cut once at a random place there, in the middle here (photos.crop).")
    draft.settings |= call.script.fixed
    draft.notices += call.script.notes


def _base(draft: Draft) -> None:
    call = draft.call
    draft.settings["base"] = call.text("pretrained_model_name_or_path")
    data, part = call.text("dataset_name"), call.text("dataset_config_name")
    folder = call.text("instance_data_dir") or call.text("train_data_dir")
    if folder and data:
        raise UserError(f"--instance_data_dir={folder} and --dataset_name={data} are both given. Give the one that is meant.")
    draft.photos = folder or (f"hf:{data}/{part}" if part else f"hf:{data}" if data else "")
    precision = call.text("mixed_precision")
    if "mixed_precision" not in call.given:
        precision = call.launch.get("mixed_precision", precision)
    if precision in DTYPES:
        draft.settings["dtype"] = DTYPES[precision]
    else:
        draft.notices.append("mixed_precision is not given: accelerate's configuration decides there, dtype = auto here.")
    options = ", ".join(
        f"--{name}" for name in call.launch if name not in ("mixed_precision", "num_processes", "nproc_per_node")
    )
    if options:
        draft.notices.append(f"{options}: for the launcher, which starts personalize as well; not part of a recipe.")


def _subject(draft: Draft) -> None:
    """Token, class and the templates of the prompts."""
    call = draft.call
    if "placeholder_token" in call.script.flags:
        is_style = call.text("learnable_property") == "style"
        prompt = "a painting in the style of {token}" if is_style else "a photo of {token}"
        split = SplitPrompt(call.text("placeholder_token"), call.text("initializer_token"), prompt, "", True)
        draft.settings["embedding.init"] = split.class_word
    else:
        tokens = call.text("modifier_token").split("+")
        token = tokens[0] if len(tokens) == 1 else ""
        split = split_prompt(call.text("instance_prompt"), call.text("class_prompt"), token=token)
    _take_over(draft, split)
    if "modifier_token" in call.script.flags:
        _modifier(draft, tokens)


def _take_over(draft: Draft, split: SplitPrompt) -> None:
    """Token, class and templates of a prompt, with notices of what it does not say."""
    texts = {"train.prompt": split.photo, "prior.prompt": split.prior, "token": split.token, "class_word": split.class_word}
    draft.settings |= {key: (text,) if key in ("token", "class_word") else text for key, text in texts.items() if text}
    if split.photo and "{token}" not in split.photo:
        draft.notices.append(
            f"no word of {split.photo!r} looks like the subject's own: set token, and put {{token}} into train.prompt."
        )
    elif split.photo and not split.sure:
        draft.notices.append(f"token = {split.token!r} and class {split.class_word!r} are guessed from the prompt: check them.")
    if not split.class_word:
        draft.notices.append("the class of the subject is not given: give it with --class.")


def _modifier(draft: Draft, tokens: list[str]) -> None:
    """Custom Diffusion's words, and the words that they start from."""
    call = draft.call
    starts = call.text("initializer_token").split("+")[: len(tokens)]
    draft.settings["embedding.init"] = starts[0]
    if tokens == [""]:
        draft.notices.append("no --modifier_token: there no word trains, here the token does.")
    if len(tokens) > 1:
        draft.settings["token"] = tuple(tokens)
    if len(set(starts)) > 1:
        draft.notices.append(f"the words start from {', '.join(starts)} there, all from {starts[0]} here (embedding.init).")
    if call.text("freeze_model") != "crossattn_kv":
        draft.unknown.append("--freeze_model: of cross-attention keys and values train, nothing else.")
    if not call.on("noaug"):
        draft.notices.append(
            "photos are shrunk and enlarged at random there, and the prompt says so; here they are not (--noaug)."
        )


def _method(draft: Draft) -> None:
    call = draft.call
    if "use_lora" in call.script.flags:
        if call.on("use_lora"):
            draft.settings["lora.targets"] = ("to_q", "to_v")
        else:
            draft.method = "full"
    if draft.method != "lora":
        draft.settings = {key: value for key, value in draft.settings.items() if not key.startswith("lora.")}
    draft.settings["train.methods"] = (draft.method,)
    trains = call.on("train_text_encoder")
    same = {"lora_text_encoder_r": call.text("lora_r"), "lora_text_encoder_alpha": call.text("lora_alpha")}
    for name in (*same, "lora_text_encoder_dropout", "lora_text_encoder_bias", "lora_dropout", "lora_bias"):
        value, value_here = call.text(name), "the same as the U-Net's" if name in same else "none"
        is_default = value in ("", same.get(name, "none")) or _zero(value)
        if draft.method == "lora" and not is_default and (trains or "text" not in name):
            draft.unknown.append(f"--{name}={value}: it is {value_here} here.")
    if trains and "lora.targets" in draft.settings:
        draft.notices.append("the text encoder: queries and values there, all projections of its attention here.")
    if "adam_weight_decay_text_encoder" in call.script.flags:
        decay = call.number("adam_weight_decay_text_encoder", float)
        if trains and decay != draft.settings["train.weight_decay"]:
            draft.notices.append(f"weight decay of the text encoders: {decay:g} there, train.weight_decay here.")
        if not trains:
            del draft.settings["train.text_lr"]


def _zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def _prior(draft: Draft) -> None:
    call, settings = draft.call, draft.settings
    if "with_prior_preservation" not in call.script.flags:
        return
    if not call.on("with_prior_preservation"):
        settings["prior.count"] = 0
        for key in ("prior.prompt", "train.prior_weight"):
            settings.pop(key, None)
        return
    settings |= {"prior.steps": 50, "prior.guidance": call.script.guidance}
    draft.notices.append("class images: drawn by the base's own sampler there, by draw.sampler here.")
    if settings["train.snr_gamma"]:
        draft.notices.append("min-SNR weights: for the photos there, for the class images too here.")


def _outputs(draft: Draft) -> None:
    call = draft.call
    trackers = call.text("report_to")
    if "report_to" in call.given and trackers == "all":
        draft.unknown.append("--report_to=all: name the trackers in train.trackers.")
    elif "report_to" in call.given and trackers != "none":
        draft.settings["train.trackers"] = (trackers,)
    if call.text("output_dir"):
        draft.notices.append("the result is in a folder of its own in --runs, under model/.")


def _without_effect(draft: Draft) -> set[str]:
    """Flags that the script itself ignores, if given, because of what else the command says or does not say."""
    call, adapts = draft.call, draft.method == "lora"
    frozen = not draft.settings.get("train.text_encoder")
    lr_scheduler, validation_prompt = call.text("lr_scheduler"), call.text("validation_prompt")
    ignored = {
        "validation_steps validation_epochs": not validation_prompt,
        "text_encoder_lr adam_weight_decay_text_encoder": frozen,
        "lr_num_cycles": lr_scheduler != "cosine_with_restarts",
        "lr_power": lr_scheduler != "polynomial",
        " ".join(f"prodigy_{flag}" for flag in schedule.PRODIGY): call.text("optimizer").lower() != "prodigy",
        "num_train_epochs": call.text("max_train_steps"),
        "dataset_config_name": not call.text("dataset_name"),
        "lora_r lora_alpha lora_dropout lora_bias": not adapts,
        "lora_text_encoder_r lora_text_encoder_alpha lora_text_encoder_dropout lora_text_encoder_bias": frozen or not adapts,
        "class_data_dir class_prompt num_class_images prior_loss_weight real_prior": draft.settings.get("prior.count") == 0,
    }
    return {name for names, is_ignored in ignored.items() if is_ignored for name in names.split()}


def _rest(draft: Draft) -> None:
    """Say why each flag that nothing above has read is left out."""
    ignored = _without_effect(draft)
    for name in draft.call.given:
        if name in ignored:
            draft.notices.append(f"--{name} has no effect in that command, and is left out.")
        elif name in NEEDLESS:
            draft.notices.append(f"--{name} is not needed: {NEEDLESS[name]}.")
        elif name not in draft.call.read or name in MISSING:
            draft.unknown.append(f"--{name}: {MISSING.get(name, 'there is no setting for it')}.")
