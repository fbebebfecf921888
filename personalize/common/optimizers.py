"""The optimizers of `train.optimizer`: a row each says what it is, what it starts from, and what does not go with it.

Nothing of them is imported here; `training.optimizer` makes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from personalize.common.errors import UserError

if TYPE_CHECKING:
    from personalize.common.recipe import Recipe

RATES = ("train.lr", "train.text_lr", "embedding.lr")
NEAR_ONE = (0.1, 10.0)  # Prodigy's learning rate


@dataclass(frozen=True)
class Optimizer:
    """title: in sentences. place: "module:class". package: as pip calls it, where it is no dependency of ours.

    options: what it is always made with; has_betas: beside them train.beta1 and beta2. starts: settings where neither file
    nor command says them; rate: factor on the base's own rates there. state_bytes: of its state, a weight, about.
    captured, sharded, split: whether it works in a CUDA graph, on sharded and on split weights. averages: its result is not
    what trains but an average of it. refuses: recipe -> why it cannot be, or "".
    """

    title: str
    place: str
    state_bytes: int
    package: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    has_betas: bool = True
    starts: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    captured: bool = False
    sharded: bool = False
    split: bool = False
    averages: bool = False
    lighter: str = ""  # the one of the same rates with a smaller state
    refuses: Callable[["Recipe"], str] = lambda recipe: ""


def _prodigy(recipe: "Recipe") -> str:
    """One rate, near 1, is all that it can be told."""
    train, lr = recipe.train, recipe.train.lr
    if not NEAR_ONE[0] <= lr <= NEAR_ONE[1]:
        return f"it finds the learning rate itself and train.lr = {lr:g} is a factor on that; give train.lr=1.0"
    rates = {"train.text_lr": train.text_lr if train.text_encoder else 0.0}
    rates["embedding.lr"] = recipe.embedding.lr if {"textual-inversion", "custom-diffusion"} & set(train.methods) else 0.0
    for key, rate in rates.items():
        if rate not in (0, lr):
            return f"it finds one rate for all that trains, and {key} = {rate:g} is another; give {key}=0"
    if recipe.lora.plus_ratio != 1:
        return (
            f"it finds one rate for all that trains, not lora.plus_ratio = {recipe.lora.plus_ratio:g}; give lora.plus_ratio=1"
        )
    return ""


def _schedule_free(recipe: "Recipe") -> str:
    train = recipe.train
    if train.lr_schedule != "constant":
        return f"its average takes the place of train.lr_schedule = {train.lr_schedule!r}; give train.lr_schedule=constant"
    return f"its own average takes the place of train.ema = {train.ema:g}; give train.ema=0" if train.ema else ""


def _adafactor(recipe: "Recipe") -> str:
    for name, usual in (("beta1", 0.9), ("beta2", 0.999)):
        if (value := getattr(recipe.train, name)) != usual:
            return f"it has no train.{name}, which is {value:g}; leave that out"
    return ""


OPTIMIZERS = {
    # Loshchilov & Hutter 1711.05101
    "adamw": Optimizer(
        "AdamW", "torch.optim:AdamW", 8, options={"fused": True}, captured=True, sharded=True, split=True, lighter="adamw8bit",
    ),
    # Dettmers et al. 2110.02861
    "adamw8bit": Optimizer("8-bit AdamW", "bitsandbytes.optim:AdamW8bit", 2, "bitsandbytes", split=True),
    # Mishchenko & Defazio 2306.06101; bias correction and the safeguard are on in diffusers' scripts and in the authors' advice
    "prodigy": Optimizer(
        "Prodigy", "prodigyopt:Prodigy", 16, "prodigyopt", {"use_bias_correction": True, "safeguard_warmup": True},
        starts={"train.lr": 1.0, "train.text_lr": 0.0, "embedding.lr": 0.0}, refuses=_prodigy,
    ),
    # Defazio et al. 2405.15682
    "adamw-schedulefree": Optimizer(
        "schedule-free AdamW", "schedulefree:AdamWScheduleFree", 8, "schedulefree", averages=True, refuses=_schedule_free,
    ),
    # Shazeer & Stern 1804.04235, at train.lr: without its relative steps, which ignore every rate and schedule
    "adafactor": Optimizer(
        "Adafactor", "transformers.optimization:Adafactor", 3,
        options={"relative_step": False, "scale_parameter": False, "warmup_init": False}, has_betas=False, refuses=_adafactor,
    ),
    # Chen et al. 2302.06675, section 5: a rate 3 to 10 times smaller than AdamW's, and beta2 0.99
    "lion8bit": Optimizer(
        "8-bit Lion", "bitsandbytes.optim:Lion8bit", 1, "bitsandbytes", starts={"train.beta2": 0.99}, rate=0.1, split=True,
    ),
}  # fmt: skip


def starting_values(name: str, values: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe with this optimizer starts from: the settings it changes of the base's own `values`, else of the `plain`.

    Its rates are then of the size that the optimizer needs, as long as nobody gives others.
    """
    row = OPTIMIZERS.get(name, OPTIMIZERS["adamw"])
    rates = {key: float(f"{row.rate * values.get(key, plain[key]):.12g}") for key in RATES} if row.rate != 1 else {}
    return rates | dict(row.starts)


def check_optimizer(recipe: "Recipe") -> None:
    """UserError for settings that do not go with the recipe's optimizer."""
    if why := OPTIMIZERS[recipe.train.optimizer].refuses(recipe):
        raise UserError(f"train.optimizer = {recipe.train.optimizer!r} is not possible: {why}, or train.optimizer=adamw.")
