"""What a person sees on stderr while a command works: one line per phase and a progress bar. Results go to stdout."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """One line without what moves a cursor, turns the direction or is no character: names of files and keys are strangers'."""
    return "".join(c if c.isprintable() or c in " \u00a0\u202f\u3000" else c.encode("unicode_escape").decode() for c in text)


class Terminal:
    """Lines and progress bars by Rich; `quiet` shows neither."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._console = None

    def say(self, line: str) -> None:
        """Print one line, without markup."""
        if not self.quiet:
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    @property
    def console(self):
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
        """A bar with pace and time left; yields advance(n=1, note=""). It ends as one line that says how long it took."""
        start = time.monotonic()
        if self.quiet or total <= done:
            yield lambda n=1, note="": None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        count = 0
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(printable(title), total=total, completed=done, pace="", note="")

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal count
                count += n
                rate = count / max(time.monotonic() - start, 1e-6)
                pace = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.rstrip('s')}"
                bar.update(task, advance=n, pace=pace, note=note)

            yield advance
        seconds = time.monotonic() - start
        self.say(f"{title}: {count} {unit} in {seconds:.1f} s")


SILENT = Terminal(quiet=True)
