"""Importing diffusers and transformers quickly and quietly: packages that are never called stay unread.

Both import every optional package that `find_spec` finds (PEFT and bitsandbytes are called by this package itself), every
model of their own beside the few that are needed, and torch's compiler and distributed tensors to name a few classes. The
first image of Toyland takes 7.0 s of CPU time with this and 10.2 s without (median of 5, alternating, on two busy cores).
"""

import importlib.util
import logging
import os
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HIDDEN = frozenset(
    {"accelerate", "bitsandbytes", "datasets", "flash_attn", "kernels", "optimum", "pandas", "peft", "scipy", "sklearn"}
    | {"tensorboard", "torchao", "torchvision", "xformers"}
)
UNREAD = frozenset({f"diffusers.models.{part}" for part in ("autoencoders", "transformers", "unets")}) | {
    "transformers.models",
    "torch._dynamo",
}
COMPILER_MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators that only torch.compile reads
LIBRARIES = ("diffusers", "transformers", "peft", "bitsandbytes", "huggingface_hub", "datasets", "accelerate", "kernels")


@contextmanager
def lazy_imports():
    """Inside, diffusers and transformers import only what is needed, and print nothing.

    Afterwards the import system is as it was: what was left out is imported as usual by whoever asks for it.
    """
    import torch

    quiet_libraries()
    _no_bars()
    find_spec, is_available = importlib.util.find_spec, torch.distributed.is_available

    def without_hidden(name: str, package: str | None = None):
        root = name.partition(".")[0]
        return None if root in HIDDEN and root not in sys.modules else find_spec(name, package)

    importlib.util.find_spec, torch.distributed.is_available = without_hidden, lambda: False
    finder = _UnreadFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        importlib.util.find_spec, torch.distributed.is_available = find_spec, is_available
        sys.meta_path.remove(finder)
        for package in [m for m in sys.modules.values() if isinstance(m, _Unread)]:
            _forget(package)
        _no_bars()


class _Unread(ModuleType):
    """Stands for a package whose modules are imported without its own `__init__`, until an attribute of it is read."""

    def __getattr__(self, name: str):
        finders = [finder for finder in sys.meta_path if isinstance(finder, _UnreadFinder)]
        if finders and name in COMPILER_MARKS:
            return _unmarked
        for finder in finders:
            finder.read.add(self.__name__)
        _forget(self)
        return getattr(importlib.import_module(self.__name__), name)


class _UnreadFinder:
    """Finds the packages of UNREAD, except those of which an attribute was read."""

    def __init__(self):
        self.read: set[str] = set()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in UNREAD - self.read:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """None: an ordinary module is made."""

    def exec_module(self, module: ModuleType) -> None:
        """Runs no code of the package."""
        module.__class__ = _Unread


def _forget(package: _Unread) -> None:
    parent, _, name = package.__name__.rpartition(".")
    if sys.modules.get(package.__name__) is package:
        del sys.modules[package.__name__]
        vars(sys.modules[parent]).pop(name, None)


def _unmarked(function=None, *rest, **named):
    return function or _unmarked


def _no_bars() -> None:
    for name in ("diffusers", "transformers"):
        if module := sys.modules.get(f"{name}.utils.logging"):
            module.disable_progress_bar()


def quiet_libraries() -> None:
    """Warnings and progress bars of the libraries go to their logs, not to the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.captureWarnings(True)
    for name in (*LIBRARIES, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)]
        logger.addHandler(logging.NullHandler())
        logger.propagate = True
