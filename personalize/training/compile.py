"""Steps whose network is compiled, and what that costs and saves, measured on the run's own steps."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from personalize.models.interface import LatentModel

BACKEND = "inductor"
EAGER, WARM, TIMED = 2, 2, 3  # steps: before it is compiled, until it is warm, measured


class CompiledStep:
    """`run(batch)`, whose `model.predict` is compiled from the third step on. Images generated in between are not.

    Says the break-even once, by the steps with images of the first one's size; each other size is compiled too, in a step of
    its own. If the compiler fails it says so, and that step and all others run eagerly.
    """

    def __init__(self, run: Callable[..., Tensor], model: LatentModel, *, steps: int, say: Callable[[str], None]):
        self.run, self.model, self.steps, self.say = run, model, steps, say
        self.predict = torch.compile(model.predict, backend=BACKEND, dynamic=False)
        self.seconds: list[float] = []
        self.timed: torch.Size | None = None  # the images that are timed
        self.failed = False

    def __call__(self, batch) -> Tensor:
        done, self.timed = len(self.seconds), self.timed or batch.z0.shape
        if done >= EAGER + WARM + TIMED or batch.z0.shape != self.timed:
            return self._step(batch)
        began = self._now()
        out = self._step(batch)
        self.seconds.append(self._now() - began)
        if done + 1 == EAGER + WARM + TIMED and not self.failed:
            self.say(self.words())
        return out

    def words(self) -> str:
        """Seconds to compile, what a step saves by it, and after how many steps that has paid."""
        eager, fast = self.seconds[EAGER - 1], min(self.seconds[EAGER + WARM :])
        cost = sum(self.seconds[EAGER : EAGER + WARM]) - WARM * fast
        line = f"compiled in {cost:.1f} s: {1e3 * eager:.1f} ms a step became {1e3 * fast:.1f}"
        if fast >= eager:
            return f"{line}, which never pays: train.engine=eager"
        needed = cost / (eager - fast)
        verdict = "" if needed < self.steps else "; train.engine=eager is faster here"
        return f"{line}, which pays after {needed:.0f} steps of {self.steps}{verdict}"

    def _step(self, batch) -> Tensor:
        if self.failed or len(self.seconds) < EAGER:
            return self.run(batch)
        plain, self.model.predict = self.model.predict, self.predict
        try:
            return self.run(batch)
        except RuntimeError as error:
            if len(self.seconds) > EAGER:
                raise
            self.failed = True
            self.say(f"steps run eagerly: the compiler failed ({str(error).splitlines()[0]})")
        finally:
            self.model.predict = plain
        return self.run(batch)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()
