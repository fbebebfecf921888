"""The recipe: every setting of a run, written once as a field with its unit and meaning.

Validation, the recipe reference and the comments in saved recipes are made from these fields. Values come from
the base's own defaults, then a TOML file, then `key=value` overrides; an unknown key or a wrong type is an error.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from personalize.common.errors import UserError, nearest
from personalize.common.optimizers import check_optimizer, starting_values
from personalize.common.recipe_sections import (
    Captions,
    Choose,
    Distill,
    Embedding,
    Evaluate,
    Lora,
    Photos,
    Prior,
    Prompt,
    SamplingConfig,
    Train,
)
from personalize.common.settings import Setting, Value, parse_value, read_toml, setting, settings_of, validated

DEFAULTS = Path(__file__).parent / "defaults.toml"


@dataclass(frozen=True)
class Recipe:
    """What a run is made of, besides its photos."""

    base: str = setting("toyland", "base model: toyland, a hub id, a diffusers folder or a .safetensors file")
    token: tuple[str, ...] = setting((), "rare word for the subject, one for each of several; empty: chosen")
    class_word: tuple[str, ...] = setting((), "what the subject is, such as dog; one for each of several")
    seed: int = setting(0, "seed of all randomness", least=0, most=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: str = setting(
        "auto",
        "type that the model computes in; auto on a CPU: float32, but class images in bfloat16 where it has that",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    vae: str = setting(
        "whole", "how the VAE works, from fast to small: two images of 512 px at once, one at a time, in tiles",
        choices=("whole", "sliced", "tiled"),
    )  # fmt: skip
    prediction: str = setting(
        "", "what the base's U-Net predicts, where its files say nothing or the wrong; empty: as they say",
        choices=("", "epsilon", "v_prediction"),
    )  # fmt: skip
    zero_snr: bool = setting(
        False,
        "rescale the base's betas to zero terminal SNR, for v prediction; false: as its files say (Lin et al. 2305.08891)",
    )
    base_vae: str = setting(
        "", "VAE in place of the base's, or for a checkpoint without one: a .safetensors file, or a folder of diffusers"
    )
    prompt: Prompt = Prompt()
    photos: Photos = Photos()
    captions: Captions = Captions()
    prior: Prior = Prior()
    train: Train = Train()
    lora: Lora = Lora()
    embedding: Embedding = Embedding()
    draw: SamplingConfig = SamplingConfig()
    evaluate: Evaluate = Evaluate()
    choose: Choose = Choose()
    distill: Distill = Distill()


SETTINGS: dict[str, Setting] = {s.key: s for s in settings_of(Recipe)}
SECTIONS: dict[str, type] = {f.name: f.type for f in fields(Recipe) if is_dataclass(f.type)}


def needs_class_images(recipe: Recipe) -> bool:
    """Textual inversion needs none: the class prompt does not say the token, and nothing else changes."""
    wanted = recipe.prior.count and recipe.train.prior_weight and recipe.prior.kind == "pictures"
    return bool(wanted) and recipe.train.methods != ("textual-inversion",)


def load_recipe(path: Path | None, overrides: Sequence[str] = (), defaults: Mapping | None = None) -> Recipe:
    """The recipe from nested `defaults` of a base, then a TOML file, then "dotted.key=value" texts; later wins.

    An optimizer that these name brings rates of its own in place of the defaults'.

    An override's value is TOML, else taken as text; a list may be written a,b. UserError names the key, the value,
    where it stands and what is expected.
    """
    values = _checked(defaults or {}, "the base's default recipe")
    given = {} if path is None else _checked(read_toml(Path(path)), str(path))
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--set {text!r} has no '='. Write it as --set train.steps=400.")
        given |= _checked({key: parse_value(value, SETTINGS[key].kind) if key in SETTINGS else value}, "--set")
    if optimizer := given.get("train.optimizer"):
        values |= starting_values(optimizer, values, {key: setting.default for key, setting in SETTINGS.items()})
    return _built(values | given)


def recipe_from_dict(table: Mapping, origin: str) -> Recipe:
    """The recipe that `to_dict` gave, such as a manifest's; `origin` is where it stands, for error messages."""
    return _built(_checked(table, origin))


def flat_settings(recipe: Recipe) -> dict[str, Value]:
    """Every setting by its dotted key, in the order of the reference."""
    tree = dataclasses.asdict(recipe)
    return {key: tree[key] if "." not in key else tree[key.split(".")[0]][key.split(".")[1]] for key in SETTINGS}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts and lists, equal to what JSON gives back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _checked(table: Mapping, origin: str, prefix: str = "") -> dict[str, Value]:
    values = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in SETTINGS:
            values[key] = validated(SETTINGS[key], value, origin)
        elif key in SECTIONS and isinstance(value, Mapping):
            values |= _checked(value, origin, f"{key}.")
        elif key in SECTIONS:
            raise UserError(f"{key!r} in {origin} is a section, not a setting. Name one of its settings, as in {key}.…")
        elif isinstance(value, Mapping) and value:
            values |= _checked(value, origin, f"{key}.")
        else:
            alike = [s for s in SETTINGS if s.endswith(f".{key}")]
            hint = f"; did you mean {' or '.join(map(repr, alike))}?" if alike else nearest(key, [*SETTINGS, *SECTIONS])
            where = "" if origin == "--set" else f" in {origin}"
            raise UserError(f"unknown setting {key!r}{where}{hint}")
    return values


def _built(values: Mapping[str, Value]) -> Recipe:
    parts: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (parts[section] if section else parts)[name] = value
    recipe = Recipe(**{name: SECTIONS[name](**part) if name in SECTIONS else part for name, part in parts.items()})
    interval = recipe.draw.interval
    if interval and (len(interval) != 2 or interval[0] >= interval[1]):
        raise UserError(f"draw.interval = {list(interval)} is not a low and a high noise level, such as [0.2, 0.8].")
    if recipe.train.warmup > recipe.train.steps:
        raise UserError(
            f"train.warmup = {recipe.train.warmup} is more than train.steps = {recipe.train.steps}: "
            "the learning rate would never be reached. Lower the one or raise the other."
        )
    check_optimizer(recipe)
    return recipe
