"""diffusers' flags on `personalize train`, where they mean the same: `personalize train --instance_data_dir my_dog/ …`."""

from personalize.cli.import_command import split_prompt
from personalize.cli.import_command.convert import DTYPES, PLAIN, SWITCHES
from personalize.cli.import_command.draft import text_of
from personalize.cli.import_command.schedule import SCHEDULES
from personalize.cli.import_command.scripts import SCRIPTS, SWITCH
from personalize.cli.import_command.unsupported import MISSING, NEEDLESS
from personalize.common.errors import UserError

# Flag -> setting, with the same kind of value.
FLAGS: dict[str, str] = {
    **PLAIN, **SWITCHES,
    "pretrained_model_name_or_path": "base", "max_train_steps": "train.steps", "train_batch_size": "train.batch",
    "learning_rate": "train.lr", "lr_warmup_steps": "train.warmup", "sample_batch_size": "prior.batch",
    "validation_steps": "train.sample_every", "report_to": "train.trackers", "initializer_token": "embedding.init",
}  # fmt: skip
del FLAGS["seed"]  # ours has the same name

# Flags that are read in a way of their own.
_OWN = {
    "instance_data_dir", "train_data_dir", "dataset_name", "class_data_dir", "output_dir", "instance_prompt", "class_prompt",
    "with_prior_preservation", "placeholder_token", "modifier_token", "gradient_accumulation_steps", "lr_scheduler",
    "use_8bit_adam", "mixed_precision", "center_crop", "use_lora", "resume_from_checkpoint",
}  # fmt: skip
_SWITCHED = {name for script in SCRIPTS.values() for name, default in script.flags.items() if default is SWITCH}
_KNOWN = {name for script in SCRIPTS.values() for name in script.flags}
_JOINT = {"train_batch_size", "lr_warmup_steps"}  # of FLAGS, those whose meaning another flag changes
_OPTIONS = {"output_dir": "--runs", "class_data_dir": "--prior", "placeholder_token": "--token"}


def translate(argv: list[str]) -> list[str]:
    """Arguments of the terminal, "train" first -> the same, diffusers' flags in our words; other commands stay as they are.

    UserError for a flag of diffusers that has no counterpart, or means another thing here.
    """
    if argv[:1] != ["train"]:
        return argv
    given, rest = _taken(argv[1:])
    if not given:
        return argv
    if given.get("report_to") == "none":
        given["report_to"] = "[]"
    photos = [given[name] for name in ("instance_data_dir", "train_data_dir") if name in given]
    photos += [f"hf:{given['dataset_name']}"] if "dataset_name" in given else []
    options = [part for name, option in _OPTIONS.items() if name in given for part in (option, given[name])]
    for token in given.get("modifier_token", "").split("+") if "modifier_token" in given else []:
        options += ["--token", token]
    plain = {name: key for name, key in FLAGS.items() if name in given and name not in _JOINT}
    settings = [f"{key}={given[name]}" for name, key in plain.items()]
    settings += [*_batch(given), *_course(given), *_switched(given)]
    named, prompts = _prompts(given, rest)
    return ["train", *photos, *rest, *options, *named, *(part for text in settings + prompts for part in ("--set", text))]


def _taken(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """diffusers' flags with their values, "true" for a switch; and all other words."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":
            return given, [*rest, word, *words]
        if not word.startswith("--") or name not in FLAGS.keys() | _OWN:
            if word.startswith("--") and "_" in name and name in _KNOWN:  # an underscore: never one of ours
                why = MISSING.get(name) or NEEDLESS.get(name) or "personalize import-command says what takes its place"
                raise UserError(f"--{name} of diffusers is no flag of personalize: {why}. Leave it out.")
            rest.append(word)
        elif name in _SWITCHED:
            given[name] = "true"
        elif equals:
            given[name] = value
        elif not words or words[0].startswith("--"):
            raise UserError(f"--{name} has no value. Write it as --{name}=…")
        else:
            given[name] = words.pop(0)
    return given, rest


def _batch(given: dict[str, str]) -> list[str]:
    """There the batch of a step is parts times --train_batch_size; train.batch is the whole."""
    one, parts = given.get("train_batch_size"), given.get("gradient_accumulation_steps")
    if parts in (None, "1"):
        return [f"train.batch={one}"] if one else []
    if not (one and one.isdigit() and parts.isdigit()):
        raise UserError(
            f"--gradient_accumulation_steps={parts} multiplies diffusers' --train_batch_size, which is not given as a number. "
            "Give both, or train.batch for the whole batch and train.accumulate for the parts it is computed in."
        )
    return [f"train.batch={int(one) * int(parts)}", f"train.accumulate={parts}"]


def _course(given: dict[str, str]) -> list[str]:
    """diffusers' "constant" has no warm-up, whatever --lr_warmup_steps says."""
    name, warmup = given.get("lr_scheduler"), given.get("lr_warmup_steps")
    if name is not None and (name not in SCHEDULES or name == "piecewise_constant"):
        raise UserError(f"--lr_scheduler={name} has no counterpart. Known: {', '.join(sorted(set(SCHEDULES.values())))}.")
    found = [f"train.lr_schedule={SCHEDULES[name]}"] if name else []
    return found + ([f"train.warmup={warmup}"] if warmup and name != "constant" else [])


def _switched(given: dict[str, str]) -> list[str]:
    found = ["train.optimizer=adamw8bit"] * ("use_8bit_adam" in given) + ["photos.crop=center"] * ("center_crop" in given)
    found += ["train.methods=lora"] * ("use_lora" in given)
    if "with_prior_preservation" in given and "num_class_images" not in given:
        found.append("prior.count=100")  # as many as diffusers then draws
    if "mixed_precision" in given:
        if given["mixed_precision"] not in DTYPES:
            raise UserError(f"--mixed_precision={given['mixed_precision']} is not one of {', '.join(DTYPES)}.")
        found.append(f"dtype={DTYPES[given['mixed_precision']]}")
    if given.get("resume_from_checkpoint", "latest") != "latest":
        raise UserError(
            f"--resume_from_checkpoint={given['resume_from_checkpoint']}: the same command goes on from the run's newest "
            "checkpoint, and from no other. Leave it out."
        )
    return found


def _prompts(given: dict[str, str], rest: list[str]) -> tuple[list[str], list[str]]:
    """Options and settings of --instance_prompt and --class_prompt: token, class, templates. What is said of itself stays."""
    own = [_value(rest, "--token"), given.get("placeholder_token", ""), given.get("modifier_token", "")]
    token, class_word = next(filter(None, own), ""), _value(rest, "--class")
    prompt = given.get("instance_prompt", "")
    found = split_prompt.split_prompt(prompt, given.get("class_prompt", ""), token=token, class_word=class_word)
    settings = [text_of("prior.prompt", found.prior)] if found.prior else []
    if not prompt:
        return [], settings
    if not found.sure or "{token}" not in found.photo:
        raise UserError(f"--instance_prompt={prompt!r} does not say which word is the subject's. Give it: --token …")
    options = [] if token else ["--token", found.token]
    if found.class_word and not class_word:
        options += ["--class", found.class_word]
    return options, [text_of("train.prompt", found.photo), *settings]


def _value(words: list[str], option: str) -> str:
    """The value that an option of ours has among the words, or ""."""
    for word, after in zip(words, [*words[1:], ""]):
        if word == option or word.startswith(f"{option}="):
            return after if word == option else word.partition("=")[2]
    return ""
