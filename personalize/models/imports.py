"""What must be set before diffusers or transformers are first imported: optional back-ends hidden, chatter to the log.

Both look for optional packages by `find_spec` and import those they find: seconds of start-up for code we never call
through them (PEFT and bitsandbytes we call ourselves).
"""

import importlib.util
import logging
import os
import sys
import warnings
from contextlib import contextmanager

HIDDEN = frozenset(
    {"accelerate", "bitsandbytes", "datasets", "flash_attn", "kernels", "optimum", "pandas", "peft", "scipy", "sklearn"}
    | {"tensorboard", "torchao", "torchvision", "xformers"}
)
LIBRARIES = (
    "diffusers",
    "transformers",
    "peft",
    "bitsandbytes",
    "huggingface_hub",
    "datasets",
    "accelerate",
    "kernels",
)


@contextmanager
def lean():
    """Import diffusers and transformers inside this: no optional back-ends, nothing on the screen."""
    quiet()
    find_spec = importlib.util.find_spec

    def without_hidden(name: str, package: str | None = None):
        root = name.partition(".")[0]
        return None if root in HIDDEN and root not in sys.modules else find_spec(name, package)

    importlib.util.find_spec = without_hidden
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec


def quiet() -> None:
    """Warnings and progress bars of the libraries go to the `personalize` log, not to the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    for name in (*LIBRARIES, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)]
        logger.addHandler(logging.NullHandler())
        logger.propagate = True
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
