"""Errors that a user is shown without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that a user can cause and put right. It says what happened, with which value, and what to do; exit status 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The clause "; did you mean 'x'?" for the choice most like `word`, or "" where none is similar."""
    matches = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class Interrupted(Exception):
    """Work that a signal stopped and that can go on. It says what was kept; exit status 130."""
