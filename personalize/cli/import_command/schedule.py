"""The training schedule in a script's options: batch, optimizer, learning rate, steps, sample images."""

import math
from pathlib import Path

from personalize.cli.import_command.draft import Draft
from personalize.cli.import_command.parse import Call
from personalize.common.recipe import SETTINGS

SCHEDULES = {  # our schedule -> those of diffusers that it is, or is nearest to
    "constant": ("constant", "constant_with_warmup", "piecewise_constant"),
    "linear": ("linear", "polynomial"),
    "cosine": ("cosine", "cosine_with_restarts"),
}


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
    if call.text("optimizer").lower() not in ("", "adamw"):
        draft.unknown.append(f"--optimizer={call.text('optimizer')}: AdamW is used, which needs another learning rate.")
    if call.on("use_8bit_adam"):
        settings["train.optimizer"] = "adamw8bit"
    if (epsilon := call.number("adam_epsilon", float)) != 1e-8:
        draft.unknown.append(f"--adam_epsilon={epsilon:g}: it is 1e-08 here.")


def _lr_schedule(draft: Draft) -> None:
    """The learning rate's schedule by its name in diffusers, whose plain "constant" ignores --lr_warmup_steps."""
    call = draft.call
    name, cycles = call.text("lr_scheduler"), call.text("lr_num_cycles")
    power, warmup = call.number("lr_power", float), call.number("lr_warmup_steps")
    nearest = next((ours for ours, theirs in SCHEDULES.items() if name in theirs), "")
    draft.settings["train.lr_schedule"] = nearest or "constant"
    if name not in ("constant", "piecewise_constant"):
        draft.settings["train.warmup"] = warmup
    elif "lr_warmup_steps" in call.given and warmup:
        draft.notices.append(f"--lr_warmup_steps={warmup} has no effect with the schedule {name}, and is left out.")
    exact = {"cosine_with_restarts": cycles in ("", "1"), "polynomial": power in (None, 1.0), "piecewise_constant": False}
    if not nearest or not exact.get(name, True):
        draft.unknown.append(f"--lr_scheduler={name}: {nearest or 'constant'} is the nearest schedule there is.")


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
