"""A recipe while a command is read into it."""

from dataclasses import dataclass, field

from personalize.cli.import_command.parse import Call
from personalize.cli.import_command.split_prompt import SplitPrompt
from personalize.common.recipe import SETTINGS
from personalize.common.settings import Value, parse_value, to_toml_value


@dataclass
class Draft:
    """The recipe while it is read. settings by key; notices: what differs; unknown: what is left out."""

    call: Call
    settings: dict[str, Value] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    method: str = ""
    photos: str = ""

    def name(self, named: SplitPrompt) -> None:
        """Token, class and templates that a prompt gave, and what it did not say."""
        if named.photo:
            self.settings["train.prompt"] = named.photo
        if named.prior:
            self.settings["prior.prompt"] = named.prior
        if named.token:
            self.settings["token"] = (named.token,)
        if named.class_word:
            self.settings["class_word"] = (named.class_word,)
        if named.photo and "{token}" not in named.photo:
            self.notices.append(
                f"no word of {named.photo!r} looks like the subject's own: set token, and put {{token}} into train.prompt."
            )
        elif named.photo and not named.sure:
            self.notices.append(
                f"token = {named.token!r} and class {named.class_word!r} are guessed from the prompt: see that they are right."
            )
        if not named.class_word:
            self.notices.append("the class of the subject is not said: give it with --class.")


def text_of(key: str, value: Value) -> str:
    """A setting as --set takes it: plain where that reads back as the same value, else TOML."""
    plain = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    kind = SETTINGS[key].kind
    same = parse_value(plain, kind) == (list(value) if isinstance(value, tuple) else value)
    return f"{key}={plain if same and plain == plain.strip() else to_toml_value(value)}"
