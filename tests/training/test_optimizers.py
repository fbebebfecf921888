"""Every optimizer is its library's own, starts from its own rates, goes on bit for bit, and says what it cannot do."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler
from engine_cases import LORA, batch_of, engine_of, ran, same
from torch import nn

from personalize import methods, resolve
from personalize.common import checkpoint
from personalize.common.errors import UserError
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import SETTINGS, load_recipe, recipe_to_dict
from personalize.methods import peft_layers
from personalize.training.engine import lr_factor, why_not_captured
from personalize.training.find_run import decisive_settings
from personalize.training.load_run import load_checkpoint
from personalize.training.optimizer import averaged_weights, make_optimizer, optimizer_class, set_learning_rates
from personalize.training.run import checkpoint_parts
from personalize.training.sharding import _why_not
from personalize.training.validation import eval_mode

STEPS, LR = {"prodigy": 60}, {"prodigy": 1.0}  # it takes as long to find its rate
OTHERS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not importlib.util.find_spec(row.place.split(".")[0].split(":")[0]), reason=row.package)
    )
    for name, row in OPTIMIZERS.items()
    if name != "adamw"
]
FREE = OTHERS[[*OPTIMIZERS].index("adamw-schedulefree") - 1].marks


def settings_of(name, *more):
    return load_recipe(None, [f"train.optimizer={name}", *more]).train


def weights(seed=0):
    """A matrix, a vector, one that is zero as LoRA's B, and a convolution; the first large enough for 8 bits."""
    g = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=g) * size)
        for shape, size in (((80, 60), 1), ((5,), 1), ((9, 4), 0), ((4, 3, 3, 3), 1))
    ]


def stepped(optimizer, params, steps, scale=lambda step: 1.0):
    """Steps downhill to the same far point each time, with noise."""
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = (p.detach() - 3) + 0.1 * torch.randn(p.shape, generator=g)
        set_learning_rates(optimizer, scale(step))
        optimizer.step()
    return params


PLAIN = {
    "adamw8bit": {"betas": (0.9, 0.999)},
    "prodigy": {"betas": (0.9, 0.999), "use_bias_correction": True, "safeguard_warmup": True},
    "adamw-schedulefree": {"betas": (0.9, 0.999), "warmup_steps": 4},
    "adafactor": {"relative_step": False, "scale_parameter": False},
    "lion8bit": {"betas": (0.9, 0.99)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_steps_are_those_of_the_library(name):
    """Schedule-free's own warm-up is ours too."""
    lr, ours, plain = LR.get(name, 1e-2), weights(), weights()
    mine = make_optimizer([{"params": ours, "lr": lr}], settings_of(name, "train.weight_decay=0.1"))
    theirs = optimizer_class(name)(plain, lr=lr, weight_decay=0.1, **PLAIN[name])
    if name == "adamw-schedulefree":
        theirs.train()
    scale = (lambda step: min(1.0, (step + 1) / 4)) if name == "adamw-schedulefree" else lambda step: 1.0
    stepped(mine, ours, range(12), scale)
    for group in theirs.param_groups:
        group["initial_lr"] = lr
    stepped(theirs, plain, range(12))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert all((a - b).abs().max() > 0 for a, b in zip(ours, weights(), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_goes_on_from_a_file_bit_for_bit(name, tmp_path):
    def made(params):
        parts = [{"params": params[:2], "lr": LR.get(name, 1e-2)}, {"params": params[2:], "lr": LR.get(name, 1e-2)}]
        return make_optimizer(parts, settings_of(name))

    whole, cut, again, steps = weights(), weights(), weights(1), STEPS.get(name, 12)
    stepped(made(whole), whole, range(steps))
    optimizer = made(cut)
    stepped(optimizer, cut, range(steps // 2))
    tensors = checkpoint.optimizer_tensors(optimizer)
    checkpoint.save_state(tmp_path / "state", {"trained": dict(zip("abcd", cut, strict=True)), "optimizer": tensors}, 6)
    parts, _ = checkpoint.load_state(tmp_path / "state")
    for p, value in zip(again, parts["trained"].values(), strict=True):
        p.data.copy_(value)
    other = made(again)
    checkpoint.restore_optimizer(other, parts["optimizer"])
    stepped(other, again, range(steps // 2, steps))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    if name == "prodigy":
        assert other.param_groups[0]["d"] > 10 * other.param_groups[0]["d0"], "what it found goes on too"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_start_where_the_optimizer_needs_them_and_given_ones_stay(name):
    own = resolve(settings=[f"train.optimizer={name}"])
    expected = {"prodigy": (1.0, 0.0), "lion8bit": (2e-5, 0.0)}.get(name, (2e-4, 0.0))
    assert (own.train.lr, own.train.text_lr) == expected
    assert own.train.beta2 == (0.99 if name == "lion8bit" else 0.999)
    lora = resolve(settings=[f"train.optimizer={name}", "train.methods=lora"])  # its base has another rate for the text encoder
    assert lora.train.text_lr == {"prodigy": 0.0, "lion8bit": 3e-5}.get(name, 3e-4)
    given = resolve(settings=[f"train.optimizer={name}", "train.lr=0.5", "train.beta1=0.9"])
    assert given.train.lr == 0.5
    assert load_recipe(None, defaults=recipe_to_dict(own)) == own, "a run's recipe is read as it was"


def test_the_setting_names_what_the_table_holds():
    assert SETTINGS["train.optimizer"].choices == tuple(OPTIMIZERS) and SETTINGS["train.optimizer"].default == "adamw"


@pytest.mark.parametrize(
    "more, why",
    [
        (["train.optimizer=prodigy", "train.lr=5e-6"], "train.lr = 5e-06 is a factor on that; give train.lr=1.0"),
        (["train.optimizer=prodigy", "train.text_encoder=true", "train.text_lr=0.5"], "give train.text_lr=0"),
        (["train.optimizer=prodigy", "train.methods=textual-inversion", "embedding.lr=0.03"], "give embedding.lr=0"),
        (["train.optimizer=prodigy", "lora.plus_ratio=16"], "give lora.plus_ratio=1"),
        (["train.optimizer=adamw-schedulefree", "train.lr_schedule=cosine"], "give train.lr_schedule=constant"),
        (["train.optimizer=adamw-schedulefree", "train.ema=0.99"], "give train.ema=0"),
        (["train.optimizer=adafactor", "train.beta1=0.95"], "it has no train.beta1, which is 0.95"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_an_optimizer_are_refused_by_name(more, why):
    with pytest.raises(UserError, match=f"train.optimizer = '.*' is not possible: .*{why}.*train.optimizer=adamw"):
        load_recipe(None, more)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_cannot_shard_split_or_be_captured_says_so(tiny_sd, name, monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    row, recipe = OPTIMIZERS[name], load_recipe(None, [f"train.optimizer={name}", "prior.count=0"])
    sharded = _why_not(recipe, torch.float32)
    assert sharded == ("" if row.sharded else f"{row.title} does not know sharded weights; give train.optimizer=adamw")
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, unet=nn.Linear(1, 1))
    assert why_not_captured(model, recipe, []) == ("" if row.captured else row.title)
    split = load_recipe(None, [f"train.optimizer={name}", "train.masters=split"])
    if row.split:
        methods.check_split_weights(split, torch.bfloat16)
        return
    with pytest.raises(UserError, match=f"{row.title} looks at whole weights.*give train.optimizer=adamw"):
        methods.check_split_weights(split, torch.bfloat16)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.package])
def test_a_package_that_is_missing_is_named_with_what_installs_it(name, monkeypatch):
    package = OPTIMIZERS[name].package
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"train.optimizer = '{name}' needs {package}: pip install {package}"):
        optimizer_class(name)


@pytest.mark.parametrize("name", [pytest.param("adamw-schedulefree", marks=FREE)])
def test_a_schedule_free_result_is_its_own_eval_and_looking_changes_no_bit(tiny_sd, name, tmp_path):
    more = [LORA, f"train.optimizer={name}", "train.lr_schedule=constant"]
    plain, watched = engine_of(tiny_sd, *more), engine_of(tiny_sd, *more)
    expected = ran(plain)
    for step in range(5):
        watched.step(batch_of(watched, step), scale=lr_factor(watched.recipe, step))
        trains = [p.detach().clone() for p in watched.params]
        with eval_mode(watched.model, watched.params, watched.averaged()):
            shown = [p.detach().clone() for p in watched.params]
        assert all(torch.equal(a, b) for a, b in zip(trains, watched.params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected[1], watched.params, strict=True))
    parts = checkpoint_parts(watched, [])
    assert all(torch.equal(parts["average"][str(i)], x) for i, x in enumerate(shown))
    tensors = {part: {k: v.clone() for k, v in values.items()} for part, values in parts.items()}
    checkpoint.save_state(tmp_path / "state.safetensors", tensors, 5)
    plain.optimizer.eval()
    assert all(torch.equal(x, p) for x, p in zip(shown, plain.params, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(shown, trains, strict=True))
    load_checkpoint(watched.model, watched.recipe, watched.params, tmp_path)
    assert all(torch.equal(x, p) for x, p in zip(shown, watched.params, strict=True)), "a checkpoint is its average"


@pytest.mark.parametrize("name", [pytest.param("adamw-schedulefree", marks=FREE)])
def test_before_the_first_step_the_average_is_the_weights(name):
    params = weights()
    averages = averaged_weights(make_optimizer([{"params": params, "lr": 1e-2}], settings_of(name)))
    assert all(torch.equal(a, p) for a, p in zip(averages, params, strict=True))


SCHEDULES = {
    "constant": ("constant_with_warmup", []),
    "linear": ("linear", []),
    "cosine": ("cosine", []),
    "cosine-restarts": ("cosine_with_restarts", ["train.lr_cycles=3"]),
    "polynomial": ("polynomial", ["train.lr_power=2"]),
}


@pytest.mark.parametrize("name", SETTINGS["train.lr_schedule"].choices)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_diffusers(name, warmup):
    theirs, more = SCHEDULES[name]
    recipe = load_recipe(
        None, ["train.steps=50", f"train.warmup={warmup}", f"train.lr_schedule={name}", "train.lr=1e-4", *more]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    factor = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=50, num_cycles=3, power=2.0
    ).lr_lambdas[0]
    if name == "cosine":  # there its number of cycles is half a one, which get_scheduler does not hand on
        factor = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=50).lr_lambdas[0]
    for step in range(50):
        assert lr_factor(recipe, step) == pytest.approx(factor(step if step >= warmup else step + 1), abs=1e-12)
    assert lr_factor(recipe, 49) != lr_factor(recipe, 25) or name == "constant"


def test_cycles_and_power_change_their_schedules_and_are_other_runs():
    def factor(*more):
        return lr_factor(load_recipe(None, ["train.steps=50", *more]), 20)

    assert factor("train.lr_schedule=cosine-restarts") != factor("train.lr_schedule=cosine-restarts", "train.lr_cycles=3")
    assert factor("train.lr_schedule=polynomial") != factor("train.lr_schedule=polynomial", "train.lr_power=3")
    before = recipe_to_dict(load_recipe(None))
    later = {"train": ("lr_cycles", "lr_power"), "lora": ("plus_ratio",)}
    for section, names in later.items():
        for key in names:
            del before[section][key]
    default = decisive_settings(recipe_to_dict(load_recipe(None)))
    assert default == decisive_settings(before), "a run from before these settings is the same run"
    for text in ("train.lr_cycles=2", "train.lr_power=2", "lora.plus_ratio=2"):
        assert decisive_settings(recipe_to_dict(load_recipe(None, [text]))) != default


def test_lora_plus_has_the_rates_of_peft(tiny_sd):
    settings = [LORA, "train.text_encoder=true", "train.text_lr=1e-4", "lora.dora=true", "lora.conv=true"]
    engine = engine_of(tiny_sd, *settings, "lora.plus_ratio=16")
    rates = {id(p): float(group["initial_lr"]) for group in engine.optimizer.param_groups for p in group["params"]}
    networks = {"unet": (engine.model.unet, 1e-3), **{k: (v, 1e-4) for k, v in engine.model.text_encoders.items()}}
    peft_layers.import_peft()
    from peft.optimizers import create_loraplus_optimizer

    for network, lr in networks.values():
        theirs = create_loraplus_optimizer(network, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16)
        for group in theirs.param_groups:
            assert all(rates.pop(id(p)) == pytest.approx(group["lr"]) for p in group["params"])
    assert not rates
    assert not same(ran(engine, steps=1), ran(engine_of(tiny_sd, *settings), steps=1))


def test_lora_plus_is_refused_for_adapters_without_a_and_b(tiny_sd):
    with pytest.raises(UserError, match="lora.plus_ratio = 16 is for lora, which has A and B, not for lokr"):
        engine_of(tiny_sd, "train.methods=lokr", "lora.plus_ratio=16")
