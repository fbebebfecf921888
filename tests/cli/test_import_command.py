"""Commands of other trainers become recipes that do the same work, and nothing of them is dropped in silence."""

import shlex
import subprocess
import sys

import pytest

import personalize
from personalize.cli import app, import_command
from personalize.cli.import_command import convert, split_prompt
from personalize.cli.import_command.schedule import PRODIGY
from personalize.cli.import_command.scripts import SCRIPTS, SEVERAL, SWITCH, flags
from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS, flat_settings, load_recipe

DREAMBOOTH = """
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export INSTANCE_DIR="dog"
export CLASS_DIR="path-to-class-images"
export OUTPUT_DIR="path-to-save-model"

accelerate launch train_dreambooth.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --class_data_dir=$CLASS_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --with_prior_preservation --prior_loss_weight=1.0 \\
  --instance_prompt="a photo of sks dog" \\
  --class_prompt="a photo of dog" \\
  --resolution=512 \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=2 --gradient_checkpointing \\
  --use_8bit_adam \\
  --learning_rate=2e-6 \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --num_class_images=200 \\
  --max_train_steps=800 \\
  --push_to_hub
"""
DREAMBOOTH_TOML = """
base = "CompVis/stable-diffusion-v1-4"
token = ["sks"]
class_word = ["dog"]

[photos]
size = 512
crop = "random"

[prior]
count = 200
prompt = "a photo of {class}"
steps = 50
guidance = 7.5

[train]
prompt = "a photo of {token} {class}"
batch = 2
lr = 2e-06
optimizer = "adamw8bit"
accumulate = 2
gradient_checkpointing = true
checkpoint_every = 500
"""

LORA_SDXL = """
accelerate launch train_dreambooth_lora_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --pretrained_vae_model_name_or_path=$VAE_PATH \\
  --output_dir=$OUTPUT_DIR \\
  --mixed_precision="fp16" \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=1024 \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 \\
  --learning_rate=1e-4 \\
  --report_to="wandb" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --max_train_steps=500 \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub
"""
LORA_SDXL_TOML = """
base = "$MODEL_NAME"
token = ["sks"]
class_word = ["dog"]
dtype = "float16"

[photos]
size = 1024

[prior]
count = 0

[train]
methods = ["lora"]
prompt = "a photo of {token} {class}"
steps = 500
batch = 4
lr = 0.0001
weight_decay = 0.0001
accumulate = 4
checkpoint_every = 500
trackers = ["wandb"]
"""

LORA = """
!accelerate launch --mixed_precision="bf16" --num_processes=2 --multi_gpu train_dreambooth_lora.py
  --pretrained_model_name_or_path runwayml/sd --instance_data_dir dog --instance_prompt 'a photo of sks dog'
  --class_prompt 'a photo of dog' --class_data_dir pictures --with_prior_preservation --train_text_encoder
  --rank 8 --lr_scheduler constant_with_warmup --lr_warmup_steps 20 --max_train_steps 400 --train_batch_size 2
"""
LORA_TOML = """
base = "runwayml/sd"
token = ["sks"]
class_word = ["dog"]
dtype = "bfloat16"

[photos]
size = 512
crop = "random"

[prior]
prompt = "a photo of {class}"
steps = 50
guidance = 7.5

[train]
methods = ["lora"]
text_encoder = true
prompt = "a photo of {token} {class}"
steps = 400
batch = 4
lr = 0.0005
warmup = 20
accumulate = 2

[lora]
rank = 8
"""

INVERSION = """
accelerate launch textual_inversion.py \\
  --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
  --train_data_dir="./cat" \\
  --learnable_property="object" \\
  --placeholder_token="<cat-toy>" \\
  --initializer_token="toy" \\
  --resolution=512 \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 \\
  --max_train_steps=3000 \\
  --learning_rate=5.0e-04 \\
  --scale_lr \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --output_dir="textual_inversion_cat"
"""
INVERSION_TOML = """
base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
token = ["<cat-toy>"]
class_word = ["toy"]
dtype = "float32"

[photos]
size = 512
flip = true

[prior]
count = 0

[train]
methods = ["textual-inversion"]
prompt = "a photo of {token}"
steps = 3000
batch = 4
lr = 0.002
clip = 0.0
accumulate = 4
checkpoint_every = 500

[embedding]
init = "toy"
"""

CUSTOM = """
accelerate launch train_custom_diffusion.py \\
  --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4  --instance_data_dir=./data/cat \\
  --output_dir=out --class_data_dir=./real_reg/samples_cat/ \\
  --with_prior_preservation --real_prior --prior_loss_weight=1.0 \\
  --class_prompt="cat" --num_class_images=200 --instance_prompt="photo of a <new1> cat"  \\
  --resolution=512  --train_batch_size=2  --learning_rate=1e-5  --lr_warmup_steps=0 \\
  --max_train_steps=250 --scale_lr --hflip --modifier_token "<new1>"
"""
CUSTOM_TOML = """
base = "CompVis/stable-diffusion-v1-4"
token = ["<new1>"]
class_word = ["cat"]
seed = 42

[photos]
size = 512
flip = true

[prior]
count = 200
prompt = "{class}"
steps = 50
guidance = 7.5

[train]
methods = ["custom-diffusion"]
prompt = "photo of a {token} {class}"
steps = 250
batch = 2
lr = 4e-05
checkpoint_every = 250

[embedding]
init = "ktn"
"""

PEFT = """
accelerate launch train_dreambooth.py --pretrained_model_name_or_path=m --instance_data_dir=toy --use_lora --lora_r 16 \\
  --instance_prompt="a photo of sks toy" --lora_alpha 27 --train_text_encoder --learning_rate=1e-4 --lr_scheduler=linear \\
  --lora_text_encoder_r 16 --lora_text_encoder_alpha 17 --max_train_steps=100 --train_batch_size=1 --no_tracemalloc
"""
PEFT_TOML = """
base = "m"
token = ["sks"]
class_word = ["toy"]

[photos]
size = 512
crop = "random"

[prior]
count = 0

[train]
methods = ["lora"]
text_encoder = true
prompt = "a photo of {token} {class}"
steps = 100
lr = 0.0001
lr_schedule = "linear"
warmup = 100

[lora]
rank = 16
alpha = 27.0
targets = ["to_q", "to_v"]
"""


def least(script, **more):
    """The shortest command of a script, and other flags; a switch that is False is left out."""
    given = {need.split("|")[0]: "a photo of sks dog" if "prompt" in need else "x" for need in SCRIPTS[script].needs}
    given |= {"use_lora": True} if "use_lora" in SCRIPTS[script].flags else {}
    words = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in (given | more).items() if value is not False
    ]
    return shlex.join(["accelerate", "launch", script, *words])


def body(text):
    """A recipe without the comments at its head."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("#")) + "\n"


def recipe(command):
    return load_recipe(None, import_command.recipe_from(command).settings)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (DREAMBOOTH, DREAMBOOTH_TOML), (LORA_SDXL, LORA_SDXL_TOML), (LORA, LORA_TOML), (INVERSION, INVERSION_TOML),
        (CUSTOM, CUSTOM_TOML), (PEFT, PEFT_TOML),
    ],
    ids=["dreambooth", "lora-sdxl", "lora", "textual-inversion", "custom-diffusion", "peft"],
)  # fmt: skip
def test_the_commands_of_the_guides_become_these_recipes(command, expected, tmp_path):
    imported = import_command.recipe_from(command)
    text = import_command.toml(imported)
    assert body(text) == expected
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe(None, imported.settings)


@pytest.mark.parametrize("command", [DREAMBOOTH, LORA_SDXL, LORA, INVERSION, CUSTOM, PEFT, *map(least, SCRIPTS)])
def test_the_file_says_the_same_on_top_of_what_its_base_and_method_start_from(command, tmp_path):
    """A value that equals the plain default is not left out where the method starts from another."""
    imported = import_command.recipe_from(command)
    start = personalize.resolve(None, import_command.foundation(imported))
    path = tmp_path / "recipe.toml"
    path.write_text(import_command.toml(imported, start=start))
    there, meant = flat_settings(personalize.resolve(path)), flat_settings(load_recipe(None, imported.settings))
    keys = [text.partition("=")[0] for text in imported.settings]
    assert {key: there[key] for key in keys} == {key: meant[key] for key in keys}
    others = there.keys() - set(keys)
    assert {key: there[key] for key in others} == {key: flat_settings(start)[key] for key in others}


def test_the_head_says_how_to_use_the_recipe_and_what_is_different():
    text = import_command.toml(import_command.recipe_from(DREAMBOOTH), name="dog.toml")
    assert text.startswith(
        "# From train_dreambooth.py of diffusers. Use:\n# personalize train dog --recipe dog.toml --runs path-to"
    )
    differs, left_out = text.index("# What differs:"), text.index("# What has no counterpart and is left out:")
    assert (
        differs
        < text.index("accelerate's configuration decides")
        < left_out
        < text.index("# - --push_to_hub: publish when it is trained")
    )
    assert 'personalize train "$INSTANCE_DIR" --recipe recipe.toml --runs "$OUTPUT_DIR"' in import_command.toml(
        import_command.recipe_from(LORA_SDXL)
    )


def test_a_command_that_says_little_has_the_defaults_of_its_script():
    read = recipe(least("train_dreambooth.py"))
    assert (read.train.batch, read.train.lr, read.prior.count, read.photos.crop, read.photos.size) == (
        4,
        5e-6,
        0,
        "random",
        512,
    )
    assert (read.train.lr_schedule, read.train.warmup) == ("constant", 0)  # its 500 steps of warm-up do nothing there
    read = recipe(least("textual_inversion.py"))
    assert (read.train.batch, read.train.steps, read.train.lr, read.train.clip) == (16, 5000, 1e-4, 0)
    read = recipe(least("train_dreambooth_lora_sdxl.py"))
    assert (read.train.weight_decay, read.photos.size, read.train.lr) == (1e-4, 1024, 1e-4)
    assert recipe(least("train_custom_diffusion.py", with_prior_preservation=True)).prior.count == 200


def test_photos_of_sdxl_are_cut_once_as_its_script_does_and_their_latents_are_kept():
    """The U-Net is told the corner of the cut, so that it learns no cut images from it."""
    free, middle = (import_command.recipe_from(least("train_dreambooth_lora_sdxl.py", center_crop=on)) for on in (False, True))
    assert all(load_recipe(None, read.settings).photos.crop == "center" for read in (free, middle))
    assert any("at a random place there, in the middle here" in line for line in free.notices)
    assert not any("at a random place" in line for line in middle.notices)
    assert recipe(least("train_dreambooth_lora.py")).photos.crop == "random", "cut anew at every step there too"


def test_text_lr_and_weight_decay_of_sdxl_are_told_where_the_text_encoders_train():
    imported = import_command.recipe_from(least("train_dreambooth_lora_sdxl.py", train_text_encoder=True))
    assert load_recipe(None, imported.settings).train.text_lr == 5e-6
    assert any("0.001 there" in line for line in imported.notices)
    assert "train.text_lr" not in import_command.toml(import_command.recipe_from(least("train_dreambooth_lora_sdxl.py")))


def value_for(default, name):
    """Some value other than a flag's own."""
    special = {"lr_scheduler": "cosine", "mixed_precision": "fp16", "learnable_property": "style", "freeze_model": "crossattn"}
    special |= {"resolution": "640", "optimizer_type": "Lion", "log_with": "wandb", "learning_rate": "0.125"}
    if name in special:
        return special[name]
    if isinstance(default, str) and default.replace(".", "").replace("e-", "").replace("-", "").isdigit():
        return "0.5" if "." in default or "e-" in default or name in ("prior_loss_weight", "max_grad_norm", "lr_power") else "7"
    return "7"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_dropped_in_silence(script):
    """Each flag with another value than its own changes the recipe or is told: alone, and with what it needs."""
    steps = {"max_train_steps": "900"}
    together = {
        "class_prompt": {"with_prior_preservation": True}, "num_class_images": {"with_prior_preservation": True},
        "prior_loss_weight": {"with_prior_preservation": True}, "lr_warmup_steps": {"lr_scheduler": "linear"},
        "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"}, "lr_power": {"lr_scheduler": "polynomial"},
        "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
        "lr_scheduler_power": {"lr_scheduler": "polynomial"},
        "validation_steps": {"validation_prompt": "x"}, "validation_epochs": {"validation_prompt": "x"},
        "dataset_config_name": {"dataset_name": "x", "instance_data_dir": ""}, "dataset_name": {"instance_data_dir": ""},
        "text_encoder_lr": {"train_text_encoder": True}, "adam_weight_decay_text_encoder": {"train_text_encoder": True},
        "lora_text_encoder_r": {"train_text_encoder": True}, "lora_text_encoder_alpha": {"train_text_encoder": True},
        "lora_text_encoder_dropout": {"train_text_encoder": True}, "lora_text_encoder_bias": {"train_text_encoder": True},
        "num_train_epochs": {"max_train_steps": ""}, "use_lora": {"lora_r": "3"},
        **{f"prodigy_{flag}": {"optimizer": "prodigy", "learning_rate": "1"} for flag in PRODIGY},
    }  # fmt: skip
    found = SCRIPTS[script].flags
    for name, default in found.items():
        value = True if default is SWITCH else value_for(default, name)
        alone = [] if name == "dataset_name" else [{}]  # instead of the photos that every command here has
        for more in [*alone, together.get(name, {})]:
            around = {k: v for k, v in (steps | more).items() if k in found and k != name}
            off = {name: False} if default is SWITCH else {}
            with_it, without = (
                import_command.recipe_from(least(script, **given)) for given in (around | {name: value}, around | off)
            )
            assert with_it != without, (name, more)


def test_every_flag_of_diffusers_that_is_left_out_has_a_reason_of_its_own():
    for script, entry in SCRIPTS.items():
        for name, default in entry.flags.items():
            given = {name: True if default is SWITCH else value_for(default, name)}
            imported = import_command.recipe_from(
                least(script, **({"instance_data_dir": ""} if name == "dataset_name" else {}), **given)
            )
            assert not [line for line in imported.unknown if "there is no setting for it" in line], (script, name)


def test_the_batch_is_that_of_all_parts_and_processes():
    command = least("train_dreambooth.py", train_batch_size=2, gradient_accumulation_steps=3)
    read = recipe(command.replace("launch", "launch --num_processes 4"))
    assert (read.train.batch, read.train.accumulate) == (24, 12)
    assert recipe(command.replace("accelerate launch", "torchrun --nproc_per_node=2")).train.batch == 12


@pytest.mark.parametrize(
    ("given", "schedule", "warmup", "told"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 50}, "constant", 0, "has no effect"),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 50}, "constant", 50, ""),
        ({"lr_scheduler": "cosine"}, "cosine", 500, ""),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2000}, "linear", 900, "outlasts training"),
        ({"lr_scheduler": "polynomial"}, "polynomial", 500, ""),
        ({"lr_scheduler": "polynomial", "lr_power": 2}, "polynomial", 500, ""),
        ({"lr_scheduler": "cosine_with_restarts"}, "cosine-restarts", 500, ""),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3}, "cosine-restarts", 500, ""),
        ({"lr_scheduler": "piecewise_constant"}, "constant", 0, "nearest schedule"),
    ],
)
def test_the_course_of_the_learning_rate(given, schedule, warmup, told):
    imported = import_command.recipe_from(least("train_dreambooth.py", max_train_steps=900, **given))
    read = load_recipe(None, imported.settings)
    assert (read.train.lr_schedule, read.train.warmup) == (schedule, warmup)
    assert (read.train.lr_cycles, read.train.lr_power) == (given.get("lr_num_cycles", 1), given.get("lr_power", 1))
    lines = [line for line in imported.notices + imported.unknown if "lr_" in line or "warm-up" in line]
    assert told in "".join(lines) and bool(lines) == bool(told)


def test_prodigy_has_the_rate_that_it_needs_and_says_what_is_different():
    script = "train_dreambooth_lora_sdxl.py"
    given = {"optimizer": "prodigy", "train_text_encoder": True, "text_encoder_lr": 1.0, "use_8bit_adam": True}
    imported = import_command.recipe_from(least(script, learning_rate=1.0, **given))
    read = load_recipe(None, imported.settings).train
    assert (read.optimizer, read.lr, read.text_lr) == ("prodigy", 1.0, 0.0)
    assert any("text encoders have the U-Net's rate" in line for line in imported.notices)
    assert any("--use_8bit_adam has no effect with Prodigy" in line for line in imported.notices)
    small = import_command.recipe_from(least(script, optimizer="Prodigy", prodigy_beta3=0.9, prodigy_decouple="True"))
    assert load_recipe(None, small.settings).train.lr == 1.0
    assert any("--learning_rate=0.0001 is a factor on the rate that Prodigy finds: it is 1 here" in x for x in small.notices)
    assert [line for line in small.unknown if "prodigy" in line] == ["--prodigy_beta3=0.9: it is the root of train.beta2 here."]


def test_offset_noise_has_the_strength_that_the_script_fixes():
    assert recipe(least("train_dreambooth.py", offset_noise=True)).train.noise_offset == 0.1
    assert recipe(least("train_dreambooth.py")).train.noise_offset == 0


def test_epochs_are_steps_where_photos_are_at_hand_and_told_where_they_are_not(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").touch()
    given = {"num_train_epochs": 3, "train_batch_size": 2}
    there = least("train_dreambooth.py", instance_data_dir=tmp_path, **given)
    assert recipe(there).train.steps == 9
    assert recipe(there + " --gradient_accumulation_steps=2").train.steps == 6
    assert recipe(there + " --with_prior_preservation --num_class_images=40").train.steps == 60
    away = import_command.recipe_from(least("train_dreambooth.py", **given))
    assert any("3 × photos / train.batch steps" in line for line in away.notices)
    assert not any(text.startswith("train.steps") for text in away.settings)


def test_checkpoints_and_images_on_the_way():
    imported = import_command.recipe_from(
        least(
            "train_dreambooth.py",
            max_train_steps=900,
            checkpointing_steps=100,
            validation_prompt="a sks dog",
            validation_steps=50,
        )
    )
    read = load_recipe(None, imported.settings)
    assert (read.train.checkpoint_every, read.train.sample_every) == (100, 50)
    assert any("of 9 checkpoints the newest 2 are kept" in line for line in imported.notices)
    assert any("personalize generate 'a sks dog'" in line for line in imported.notices)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (("a photo of sks dog",), ("sks", "dog", "a photo of {token} {class}", "", True)),
        (("a photo of sks dog", "a photo of dog"), ("sks", "dog", "a photo of {token} {class}", "a photo of {class}", True)),
        (("photo of a <new1> cat", "cat"), ("<new1>", "cat", "photo of a {token} {class}", "{class}", True)),
        (("a purple qwe backpack", "a backpack"), ("qwe", "backpack", "a purple {token} {class}", "a {class}", True)),
        (("photo of sks", "photo of a man"), ("sks", "man", "photo of {token}", "photo of a {class}", True)),
        (("zwx man, sharp", "photo of a person"), ("zwx", "man", "{token} {class}, sharp", "photo of a person", True)),
        (("sks coffee mug on a table", "a coffee mug"), ("sks", "coffee mug", "{token} {class} on a table", "a {class}", True)),
        (("a sks yellow dog", "a dog"), ("sks", "dog", "a {token} yellow {class}", "a {class}", True)),
        (("a painting in the style of TOK",), ("TOK", "", "a painting in the style of {token}", "", True)),
        (("a photo of alice woman",), ("alice", "woman", "a photo of {token} {class}", "", False)),
        (("a photo of my cat",), ("", "", "a photo of my cat", "", False)),
        (("sks dog {4k}", "dog"), ("sks", "dog", "{token} {class} {{4k}}", "{class}", True)),
    ],
)
def test_token_and_class_are_found_in_the_prompts(prompts, expected):
    assert tuple(split_prompt.split_prompt(*prompts)) == expected


def test_a_guess_and_a_prompt_without_a_word_for_the_subject_are_told():
    guessed = import_command.recipe_from(least("train_dreambooth.py", instance_prompt="a photo of alice woman"))
    assert any("'alice' and class 'woman' are guessed" in line for line in guessed.notices)
    without = import_command.recipe_from(least("train_dreambooth.py", instance_prompt="a photo of my cat"))
    assert any("looks like the subject's own" in line for line in without.notices)


@pytest.mark.parametrize(
    "command",
    [
        'accelerate launch train_dreambooth.py --pretrained_model_name_or_path m --instance_data_dir "my dog" '
        "--instance_prompt 'a sks dog' --seed 3",
        'python3 train_dreambooth.py --pretrained_model_name_or_path=m --instance_data_dir="my dog" \\ \n'
        '  --instance_prompt="a sks dog" \\\n  --seed=3 && echo done',
        "$ accelerate launch ^\r\n examples/dreambooth/train_dreambooth.py ^\r\n --pretrained_model_name_or_path m ^\r\n"
        ' --instance_data_dir "my dog" --instance_prompt "a sks dog" --seed 3\r\n',
        'cd examples\nM=m; \nexport M=m DIR="my dog"\nCUDA_VISIBLE_DEVICES=0 accelerate launch train_dreambooth.py\n'
        '--pretrained_model_name_or_path=${M}\n--instance_data_dir="$DIR"\n--instance_prompt="a sks dog"\n--seed=3 > log.txt',
        '!accelerate launch train_dreambooth.py --pretrained_model_name_or_path m --instance_data_dir "my dog" \\\n'
        '  --instance_pro="a sks dog" --see 3',
    ],
    ids=["plain", "continued", "windows", "exports", "notebook"],
)  # fmt: skip
def test_a_command_is_read_as_it_is_pasted(command):
    imported = import_command.recipe_from(command)
    read = load_recipe(None, imported.settings)
    assert (imported.photos, read.base, read.seed, read.token, read.class_word) == ("my dog", "m", 3, ("sks",), ("dog",))
    assert read.train.prompt == "a {token} {class}"
    assert "personalize train 'my dog' --recipe" in import_command.toml(imported)


def test_a_variable_that_the_command_does_not_set_is_kept_and_told():
    imported = import_command.recipe_from(LORA_SDXL)
    assert [line for line in imported.notices if "$" in line] == [
        "base holds $MODEL_NAME, which the command does not set: put its value in."
    ]
    assert (imported.photos, imported.runs) == ("$INSTANCE_DIR", "$OUTPUT_DIR")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ls -l", "no training script in 'ls -l'. Known: train_dreambooth.py"),
        (
            "accelerate launch train_dreambooth_flux.py --seed 1",
            "train_dreambooth_flux.py is not a script that can be imported",
        ),
        (least("train_dreambooth.py", max_train_step_s=3), "has no flag --max_train_step_s; did you mean '--max_train_steps'"),
        (least("train_dreambooth.py", lr_=1), "has no flag --lr_"),
        (least("train_dreambooth.py") + " --seed", "--seed has no value"),
        (least("train_dreambooth.py") + " --class_prompt a photo", "'photo' belongs to no flag. Put a value with spaces into"),
        (least("train_dreambooth.py", seed="one"), "--seed=one is not a whole number"),
        (least("train_dreambooth.py", learning_rate="$LR"), r"--learning_rate=\$LR is not a number. Put the variable's value"),
        (least("train_dreambooth.py", resolution=-1), "photos.size = -1"),
        (least("train_dreambooth_lora_sdxl.py", dataset_name="y"), "--instance_data_dir=x and --dataset_name=y are both given"),
        ("accelerate launch train_dreambooth.py --seed 1", "needs --pretrained_model_name_or_path"),
        ("accelerate launch train_dreambooth.py --class_prompt 'a dog", "a quotation mark is not closed"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(command, message):
    with pytest.raises(UserError, match=message):
        import_command.recipe_from(command)


def test_the_notation_of_flags():
    assert flags("a b= c=4 d+", "c=5", without="b") == {"a": SWITCH, "c": "5", "d": SEVERAL}


def test_flags_are_names_of_scripts_and_of_settings():
    """A flag that becomes a setting of the same meaning is a switch exactly where the setting is true or false."""
    for table, switches in ((convert.PLAIN, False), (convert.SWITCHES, True)):
        for name, key in table.items():
            kinds = {script.flags[name] is SWITCH for script in SCRIPTS.values() if name in script.flags}
            assert kinds == {switches} == {SETTINGS[key].kind is bool}, name


@pytest.mark.parametrize(
    ("words", "flag", "script"),
    [
        ("--instance_data_dir dog --class dog", "--instance_data_dir", "train_dreambooth.py of diffusers"),
        ("dog --steps 3 --max_train_steps=400", "--max_train_steps", "train_dreambooth.py of diffusers"),
        ("dog --placeholder_token x", "--placeholder_token", "textual_inversion.py of diffusers"),
        ("dog --lora_r 8", "--lora_r", "lora_dreambooth/train_dreambooth.py of PEFT"),
    ],
)
def test_a_flag_of_another_trainer_is_refused_with_what_to_do(words, flag, script, monkeypatch, capsys):
    status, out, err = terminal(monkeypatch, capsys, f"train {words}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {flag} is a flag of {script};") and 'personalize import-command "' in err


@pytest.mark.parametrize("words", ["train dog --no-such-flag", "train dog --seed", "generate x --max_train_steps 4"])
def test_other_mistakes_are_told_as_everywhere(words, monkeypatch, capsys):
    """A flag that nobody has, one of ours without its value, and another command."""
    status, _, err = terminal(monkeypatch, capsys, words)
    assert status == 2 and "Error" in err and "import-command" not in err


def terminal(monkeypatch, capsys, words):
    """Exit status, stdout and stderr of a command line."""
    monkeypatch.setattr(sys, "argv", ["personalize", *shlex.split(words)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0, *capsys.readouterr()


def test_it_needs_the_standard_library_only():
    """A refused flag of `train` asks it, and waits for nothing heavy."""
    heavy = "{'torch', 'numpy', 'typer', 'rich', 'transformers', 'diffusers'}"
    code = f"import sys, personalize.cli.import_command; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
