"""A terminal that records its lines and can stop a run at a step."""

import os
import signal
from contextlib import contextmanager

from personalize.common.terminal import Terminal


class RecordingScreen(Terminal):
    """Keeps the lines, and calls `action` when a progress bar reaches `step`."""

    def __init__(self, step=0, action=lambda: None):
        super().__init__(quiet=True)
        self.lines, self.step, self.action = [], step, action

    def say(self, line):
        self.lines.append(line)

    @contextmanager
    def progress(self, title, total, *, done=0, unit=""):
        step = done

        def advance(n=1, note=""):
            nonlocal step
            step += n
            if step == self.step:
                self.action()

        yield advance


def terminate():
    """SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)
