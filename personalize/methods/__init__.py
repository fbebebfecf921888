"""Which parameters train, and how they are saved. A method is a module with

attach(model, recipe) -> parameter groups   puts what trains into float32 and unfreezes it; each has a name and an lr
state(model) -> {name: tensor}              what trains, for a checkpoint
restore(model, tensors)                     the other way
save(model, folder, recipe)                 what users and other tools load
load(model, folder)                         puts a saved result into a fresh base
"""

import importlib
from pathlib import Path
from types import ModuleType

from torch import nn

from personalize.errors import UserError, nearest

METHODS = {"full": "full", "lora": "peft"}


def method(name: str) -> ModuleType:
    """The module of a method. UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS) or '.'} Known: {', '.join(METHODS)}.")
    return importlib.import_module(f"personalize.methods.{METHODS[name]}")


def the_one(names: tuple[str, ...]) -> ModuleType:
    """The module for a recipe's methods. UserError where there is not exactly one: none of today's compose."""
    if len(names) != 1:
        raise UserError(f"train.methods = {list(names)}: give one of {', '.join(METHODS)}.")
    return method(names[0])


def unfreeze(module: nn.Module) -> list[nn.Parameter]:
    """All parameters of a module, in float32 and trainable."""
    module.float().train().requires_grad_(True)
    return list(module.parameters())


def require_folder(folder: Path, file: str) -> Path:
    """The file in a saved result. UserError where it is missing."""
    if not (folder / file).exists():
        raise UserError(f"{folder} has no {file}: the run did not finish saving, or the file was deleted. Train it again.")
    return folder / file
