"""What the name of a base says before anything of it is read. Only this module knows the name "toyland"."""

import os
from pathlib import Path

TOYLAND = Path(__file__).parents[1] / "toyland" / "weights"


def folder_of(base: str) -> Path:
    """The folder that a base's name stands for; for a hub id or a single file it is no folder."""
    return TOYLAND if base == "toyland" else Path(base).expanduser()


def absolute_base(base: str) -> str:
    """A base's name as a manifest has it: of a folder or a file here, its whole path, which is the same from any folder."""
    path = Path(base).expanduser()
    return os.path.abspath(path) if base != "toyland" and path.exists() else base


def has_world(base: str) -> bool:
    """Whether a base is a Toyland, whatever its folder is called: probes in it tell what its images show."""
    return (folder_of(base) / "probes").is_dir()
