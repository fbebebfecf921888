"""Parsing a command as it is pasted from a page or a shell's history: the script, its options, the launcher's options."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from personalize.cli.import_command.scripts import SCRIPTS, SEVERAL, SWITCH, Script
from personalize.common.errors import UserError, nearest

PEFT = "lora_dreambooth/train_dreambooth.py"
_ENDS = ("&&", "||", "|", "&", ";")


@dataclass
class Call:
    """A script and its options. launch: the launcher's options by name; variables: shell variables without a value.

    `read` collects the options that were asked for, so that none is dropped silently.
    """

    script: Script
    given: dict[str, str | bool | list[str]]
    launch: dict[str, str]
    variables: list[str]
    read: set[str] = field(default_factory=set)

    def text(self, name: str) -> str:
        """The value of an option, else the script's default, else ""."""
        self.read.add(name)
        default = self.script.flags.get(name)
        value = self.given.get(name, default if isinstance(default, str) else None)
        return value if isinstance(value, str) else ""

    def on(self, name: str) -> bool:
        """Whether a switch was given."""
        self.read.add(name)
        return name in self.given

    def number(self, name: str, kind: type = int) -> int | float | None:
        """The value of an option as a number, None where there is no value. UserError where it is not a number."""
        text = self.text(name)
        try:
            return kind(text) if text else None
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            remedy = "Put the variable's value in." if "$" in text else "Correct it."
            raise UserError(f"--{name}={text} is not {expected}. {remedy}") from None


def parse_command(command: str) -> Call:
    """UserError for a command without a known script, with a flag that the script lacks, or without one that it needs."""
    variables: dict[str, str] = {}
    for line in _lines(command):
        words = _words(line)
        while words and (match := re.fullmatch(r"(?:export|set)|([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
            if match[1]:
                variables[match[1]] = match[2]
            words = words[1:]
        place = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        if place is None:
            continue
        words, unknown = _filled(words, variables)
        end = next((k for k, word in enumerate(words) if word in _ENDS or re.match(r"\d?>", word)), len(words))
        name, options = words[place], words[place + 1 : end]
        script = _script(name, options)
        given = _options(script, options)
        for need in script.needs:
            if not any(one in given for one in need.split("|")):
                raise UserError(f"{script.title} needs --{need.replace('|', ' or --')}. Give the whole command.")
        return Call(script, given, _launch(words[:place]), unknown)
    raise UserError(f"no training script in {command.strip()[:60]!r}. Known: {', '.join(SCRIPTS)}.")


def _lines(command: str) -> list[str]:
    """The lines of a command: continued lines joined, even without a backslash, and shell or notebook prompts removed."""
    text = re.sub(r"[ \t]*[\\^`][ \t]*\r?\n", " ", command)
    text = re.sub(r"\s*\n\s*(?=--\w)", " ", text)
    return [re.sub(r"^\s*(?:[!$>%]\s*)?", "", line) for line in text.splitlines() if not line.lstrip().startswith("#")]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line.removesuffix("\\"), comments=False)
    except ValueError:
        raise UserError(f"a quotation mark is not closed in {line.strip()[:60]!r}. Paste the whole command.") from None


def _filled(words: list[str], variables: dict[str, str]) -> tuple[list[str], list[str]]:
    """The words with the variables that the command itself sets filled in, and the names of the other variables."""
    unknown: list[str] = []

    def value(match: re.Match) -> str:
        name = match[1] or match[2]
        if name not in variables and f"${name}" not in unknown:
            unknown.append(f"${name}")
        return variables.get(name, match[0])

    return [re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", value, word) for word in words], unknown


def _script(path: str, options: list[str]) -> Script:
    """The script of this file name. PEFT's has the same name as one of diffusers, and is recognized by its flags."""
    name = PurePosixPath(path.replace("\\", "/")).name
    peft_flags = SCRIPTS[PEFT].flags.keys() - SCRIPTS["train_dreambooth.py"].flags.keys()
    if name == "train_dreambooth.py" and any(word.partition("=")[0].removeprefix("--") in peft_flags for word in options):
        return SCRIPTS[PEFT]
    if name not in SCRIPTS:
        hint = nearest(name, SCRIPTS) or "."
        raise UserError(f"{name} is not a script that can be imported{hint} Known: {', '.join(SCRIPTS)}.")
    return SCRIPTS[name]


def _options(script: Script, words: list[str]) -> dict[str, str | bool | list[str]]:
    """The options as argparse reads them: --name value, --name=value, and unambiguous beginnings of names."""
    given: dict[str, str | bool | list[str]] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"{word!r} belongs to no flag. Put a value with spaces into quotes.")
        name = _full_name(script, name)
        default = script.flags[name]
        if default is SWITCH:
            given[name] = True
        elif equals:
            given[name] = value
        elif not words or words[0].startswith("--"):
            raise UserError(f"--{name} has no value. Write it as --{name}=…")
        elif default is SEVERAL:
            given[name] = []
            while words and not words[0].startswith("--"):
                given[name].append(words.pop(0))
        else:
            given[name] = words.pop(0)
    return given


def _full_name(script: Script, name: str) -> str:
    matches = [name] if name in script.flags else [flag for flag in script.flags if name and flag.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    hint = nearest(f"--{name}", [f"--{flag}" for flag in script.flags])
    raise UserError(f"{script.title} has no flag --{name}{hint or '. Check the spelling.'}")


def _launch(words: list[str]) -> dict[str, str]:
    """Options of accelerate launch, torchrun and the like: name -> value, "" for a switch."""
    options: dict[str, str] = {}
    for k, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            after = words[k + 1] if k + 1 < len(words) else ""
            options[name] = value if equals else "" if after.startswith("-") else after
    return options
