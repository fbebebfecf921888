"""Teach a text-to-image diffusion model one subject from a few photos, and measure that it learned it.

from personalize import train, generate, evaluate
run = train("photos/", class_word="dog").folder
generate(["a sks dog swimming"], run=run)
evaluate(run)
"""

__version__ = "0.1.0"
__all__ = ["compare", "dreambench", "evaluate", "export", "generate", "prior", "quickstart", "resolve", "train"]


def __getattr__(name: str):
    if name in __all__:
        from personalize import api

        return getattr(api, name)
    raise AttributeError(f"module 'personalize' has no attribute {name!r}")
