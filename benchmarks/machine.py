"""What a measurement must say of itself: the command, the day, the kind of machine, and versions."""

import importlib.metadata
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def header(arguments: Sequence[str], peers: Sequence[Path]) -> list[str]:
    """Lines of Markdown. Of what lies outside this folder only the name is told."""
    named = shlex.join(Path(a).name if a.startswith(("/", "..")) else a for a in arguments)
    return [
        f"- `python -m benchmarks.compare {named}`, {time.strftime('%Y-%m-%d')}",
        f"- {machine()}; load average before: {os.getloadavg()[0]:.2f}",
        f"- {libraries()}",
        *(f"- {script.name}, which asks for diffusers {required_version(script)} or newer" for script in peers),
    ]


def libraries() -> str:
    """Versions of what computes."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)


def machine() -> str:
    """Architecture, cores and what they can, memory, and the GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [f"{platform.machine()}, {os.cpu_count()} cores", *(name for name in FEATURES if name in flags)]
    words += [f"{memory:.0f} GiB", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def required_version(script: Path) -> str:
    """The version in a script's `check_min_version`."""
    match = re.search(r'check_min_version\("([^"]+)"\)', script.read_text())
    return match[1] if match else "(not said)"
