"""The recipe while a command is converted."""

from dataclasses import dataclass, field

from personalize.cli.import_command.parse import Call
from personalize.cli.import_command.split_prompt import SplitPrompt
from personalize.common.recipe import SETTINGS
from personalize.common.settings import Value, parse_value, to_toml_value


@dataclass
class Draft:
    """settings by key; notices: sentences on what differs; unknown: on what is left out."""

    call: Call
    settings: dict[str, Value] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    method: str = ""
    photos: str = ""

    def apply(self, split: SplitPrompt) -> None:
        """Take over token, class and templates of a prompt, with notices of what it does not say."""
        settings = {"train.prompt": split.photo, "prior.prompt": split.prior}
        settings |= {
            "token": (split.token,) if split.token else (),
            "class_word": (split.class_word,) if split.class_word else (),
        }
        self.settings |= {key: value for key, value in settings.items() if value}
        if split.photo and "{token}" not in split.photo:
            self.notices.append(
                f"no word of {split.photo!r} looks like the subject's own: set token, and put {{token}} into train.prompt."
            )
        elif split.photo and not split.sure:
            self.notices.append(
                f"token = {split.token!r} and class {split.class_word!r} are guessed from the prompt: check them."
            )
        if not split.class_word:
            self.notices.append("the class of the subject is not given: give it with --class.")


def text_of(key: str, value: Value) -> str:
    """A setting as --set takes it: bare where that is parsed as the same value, else as TOML."""
    plain = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    kind = SETTINGS[key].kind
    reads_back = parse_value(plain, kind) == (list(value) if isinstance(value, tuple) else value)
    return f"{key}={plain if reads_back and plain == plain.strip() else to_toml_value(value)}"
