"""What a person sees while a command works: a line a phase and a progress bar, on stderr; results go to stdout."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminal:
    """Lines and bars by Rich. `quiet` shows neither; results and errors are not its business."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._console = None

    def say(self, line: str) -> None:
        """One line of plain words."""
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def console(self):
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    @contextmanager
    def progress(self, what: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
        """A bar with pace and time left; call what it gives as advance(n=1, note=""). Ends as one line with the time."""
        began = time.monotonic()
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
            task = bar.add_task(what, total=total, completed=done, pace="", note="")

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal count
                count += n
                rate = count / max(time.monotonic() - began, 1e-6)
                pace = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.rstrip('s')}"
                bar.update(task, advance=n, pace=pace, note=note)

            yield advance
        seconds = time.monotonic() - began
        self.say(f"{what}: {count} {unit} in {seconds:.1f} s")


SILENT = Terminal(quiet=True)
