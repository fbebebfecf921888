"""The training schedule in a script's options: batch, optimizer, learning rate, steps, sample images."""

import math
from pathlib import Path

from personalize.cli.import_command.draft import Draft
from personalize.cli.import_command.parse import Call
from personalize.common.optimizers import NEAR_ONE
from personalize.common.recipe import SETTINGS

SCHEDULES = {  # diffusers' schedule -> ours that it is, or for the last is nearest to
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_restarts": "cosine-restarts", "polynomial": "polynomial", "piecewise_constant": "constant",
}  # fmt: skip
# The script's flags of Prodigy, without "prodigy_" -> what ours always has.
PRODIGY = {"beta3": "", "decouple": "True", "use_bias_correction": "True", "safeguard_warmup": "True"}


def convert_schedule(draft: Draft) -> None:
    """UserError for a value that is not a number."""
    call, settings = draft.call, draft.settings
    # there, a step's batch is that of one process times parts times processes; here it is the whole, cut into parts
    parts = call.number("gradient_accumulation_steps") * _processes(call)
    settings |= {"train.batch": call.number("train_batch_size") * parts, "train.accumulate": parts}
    _optimizer(draft)
    _lr_schedule(draft)
    _steps(draft)


def _processes(call: Call) -> int:
    count = call.launch.get("num_processes") or call.launch.get("nproc_per_node") or "1"
    return max(1, int(count)) if count.isdigit() else 1


def _optimizer(draft: Draft) -> None:
    call, settings = draft.call, draft.settings
    lr = call.number("learning_rate", float)
    if call.on("scale_lr"):
        lr *= settings["train.batch"] * (2 if "real_prior" in call.script.flags and settings["prior.count"] else 1)
        draft.notices.append("--scale_lr: the learning rate times the batch is written out in train.lr.")
    settings["train.lr"] = float(f"{lr:.12g}")
    name, in_8_bits = call.text("optimizer").lower(), call.on("use_8bit_adam")
    if name == "prodigy":
        _prodigy(draft)
    elif in_8_bits:
        settings["train.optimizer"] = "adamw8bit"
    if name == "prodigy" and in_8_bits:
        draft.notices.append("--use_8bit_adam has no effect with Prodigy, and is left out.")
    elif name not in ("", "adamw", "prodigy"):
        draft.unknown.append(f"--optimizer={call.text('optimizer')}: AdamW is used, which needs another learning rate.")
    if (epsilon := call.number("adam_epsilon", float)) != 1e-8:
        draft.unknown.append(f"--adam_epsilon={epsilon:g}: it is 1e-08 here.")


def _prodigy(draft: Draft) -> None:
    """Prodigy has one rate for all that trains. A small one, which the script lets be with a warning, hardly trains."""
    call, settings, lr = draft.call, draft.settings, draft.settings["train.lr"]
    settings["train.optimizer"] = "prodigy"
    settings["train.text_lr"] = 0.0
    if not NEAR_ONE[0] <= lr <= NEAR_ONE[1]:
        settings["train.lr"] = 1.0
        draft.notices.append(f"--learning_rate={lr:g} is a factor on the rate that Prodigy finds: it is 1 here (train.lr).")
    if "text_encoder_lr" in call.given:
        draft.notices.append("--text_encoder_lr: with Prodigy the text encoders have the U-Net's rate, there too.")
    for flag, ours in PRODIGY.items():
        if (given := call.text(f"prodigy_{flag}")) not in ("", ours):
            draft.unknown.append(f"--prodigy_{flag}={given}: it is {ours or 'the root of train.beta2'} here.")


def _lr_schedule(draft: Draft) -> None:
    """The learning rate's schedule by its name in diffusers, whose plain "constant" ignores --lr_warmup_steps."""
    call = draft.call
    name, cycles = call.text("lr_scheduler"), call.number("lr_num_cycles")
    power, warmup = call.number("lr_power", float), call.number("lr_warmup_steps")
    draft.settings["train.lr_schedule"] = SCHEDULES.get(name, "constant")
    if name == "cosine_with_restarts":
        draft.settings["train.lr_cycles"] = cycles or 1
    if name == "polynomial":
        draft.settings["train.lr_power"] = 1.0 if power is None else power
    if name not in ("constant", "piecewise_constant"):
        draft.settings["train.warmup"] = warmup
    elif "lr_warmup_steps" in call.given and warmup:
        draft.notices.append(f"--lr_warmup_steps={warmup} has no effect with the schedule {name}, and is left out.")
    if name not in SCHEDULES or name == "piecewise_constant":
        draft.unknown.append(f"--lr_scheduler={name}: constant is the nearest schedule there is.")


def _steps(draft: Draft) -> None:
    call, settings = draft.call, draft.settings
    steps, epochs = call.number("max_train_steps"), call.number("num_train_epochs")
    epoch = _epoch(draft)
    if steps is None and epoch:
        steps = epochs * epoch
        draft.notices.append(f"--num_train_epochs={epochs} is {steps} steps of train.batch photos.")
    elif steps is None:
        draft.notices.append(
            f"how long: {epochs} × photos / train.batch steps (--num_train_epochs); the photos are not here: set train.steps."
        )
    if steps is not None:
        settings["train.steps"] = steps
        _limit_to_steps(draft, steps)
    _samples(draft, epoch)


def _limit_to_steps(draft: Draft, steps: int) -> None:
    """Limit warm-up and checkpoints to what happens in this number of steps."""
    settings, keep = draft.settings, SETTINGS["train.keep"].default
    if settings.get("train.warmup", 0) > steps:
        draft.notices.append(
            f"the warm-up of {settings['train.warmup']} steps outlasts training: all {steps} steps are warm-up."
        )
        settings["train.warmup"] = steps
    checkpoints = steps // (settings.get("train.checkpoint_every") or steps + 1)
    if not checkpoints and "checkpointing_steps" not in draft.call.given:
        settings.pop("train.checkpoint_every", None)
    elif checkpoints > keep and "train.keep" not in settings:
        draft.notices.append(f"of {checkpoints} checkpoints the newest {keep} are kept, there all (train.keep).")


def _epoch(draft: Draft) -> int:
    """Optimizer steps of one pass over photos and class images, as the scripts count them; 0 where the photos are not here."""
    call, settings, folder = draft.call, draft.settings, Path(draft.photos)
    photos = sum(1 for _ in folder.iterdir()) if draft.photos and folder.is_dir() else 0
    images = max(photos * (call.number("repeats") or 1), settings["prior.count"])
    batches = math.ceil(images / max(1, call.number("train_batch_size")))
    return math.ceil(math.ceil(batches / _processes(call)) / max(1, call.number("gradient_accumulation_steps")))


def _samples(draft: Draft, epoch: int) -> None:
    call = draft.call
    prompt, every, rounds = call.text("validation_prompt"), call.number("validation_steps"), call.number("validation_epochs")
    if not prompt:
        return
    if every is None or "validation_epochs" in call.given:  # the older flag wins, as there
        every = rounds * epoch
    if every:
        draft.settings["train.sample_every"] = every
    else:
        draft.notices.append(
            f"--validation_epochs={rounds}: how many steps these are is not known here; set train.sample_every."
        )
    draft.notices.append(
        "--validation_prompt: sample images show the prompts of the photos and the class. "
        f"Afterwards: personalize generate {prompt!r}"
    )
