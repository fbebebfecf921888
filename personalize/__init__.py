"""Teach a text-to-image diffusion model one subject from a few photos, and measure that it learned it.

from personalize import train, generate, evaluate
run = train("photos/", class_word="dog").folder
generate(["a sks dog swimming"], run=run)
evaluate(run)
"""

from personalize.common.openmp import limit_spinning

limit_spinning()  # here, because every command and every module of the package comes by, before torch

__version__ = "0.1.0"
_MODULES = {
    "check_photos": "check_photos", "compare": "compare", "distill": "distill",
    "dreambench": "workflows", "edit": "edit", "evaluate": "evaluate",
    "export": "export", "generate": "generate", "many": "many", "plan": "plan", "plan_many": "plan_many",
    "pretrain": "pretrain", "Personalizer": "personalizer", "prior": "prior", "quickstart": "workflows", "resolve": "session",
    "tokens": "rare_tokens", "train": "train", "upscale": "upscale", "verify": "verify",
}  # fmt: skip
__all__ = list(_MODULES)


def __getattr__(name: str):
    """A command's function; its module is imported when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module 'personalize' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"personalize.commands.{_MODULES[name]}"), name)
