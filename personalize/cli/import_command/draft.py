"""The recipe while a command is converted."""

from dataclasses import dataclass, field

from personalize.cli.import_command.parse import Call
from personalize.common.settings import Value


@dataclass
class Draft:
    """settings by key; notices: sentences on what differs; unknown: on what is left out."""

    call: Call
    settings: dict[str, Value] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    method: str = ""
    photos: str = ""
