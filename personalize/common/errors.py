"""The one exception a user is shown: no traceback, exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something a user can cause and put right: says what happened, with which value, and what to do."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The clause "; did you mean 'x'?" for the choice most like `word`, or "" where none is like it."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


class Interrupted(Exception):
    """Work was stopped by a signal and can go on: says what was kept. Exit status 130."""
