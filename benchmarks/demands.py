"""What is demanded of the numbers, and whether it holds."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """A measure's bar, which must be reached, and its aim. least: a ratio of theirs to ours; else at most, in `unit`."""

    measure: str
    bar: float
    aim: float
    least: bool = True
    unit: str = "×"

    def met(self, value: float) -> bool:
        return value >= self.bar if self.least else value <= self.bar

    def words(self, value: float | None) -> str:
        if value is None:
            return f"{self.measure}: not measured (bar {self.bar:g} {self.unit}, aim {self.aim:g})"
        verdict = "met" if self.met(value) else "MISSED"
        return f"{self.measure}: {value:.2f} {self.unit} {verdict} (bar {self.bar:g}, aim {self.aim:g})"


DEMANDS = {
    "cpu": (
        Demand("full step, ratio", 1.3, 1.8),
        Demand("lora step, ratio", 1.3, 1.8),
        Demand("cold job, same sampler and steps, ratio", 1.5, 1.5),
        Demand("cold job, own defaults, ratio", 2.5, 4),
        Demand("drawing 64 pictures, ratio", 1.1, 1.5),
        Demand("one picture cold, ratio", 1.4, 3),
    ),
    "cuda": (
        Demand("full step, ratio", 3.5, 3.5),
        Demand("full step", 22, 15, False, "ms"),
        Demand("lora step, ratio", 5, 5),
        Demand("lora step", 14, 9, False, "ms"),
        Demand("class pictures, same steps, ratio", 1.6, 2),
        Demand("class pictures, own defaults", 18, 8, False, "s"),
        Demand("one picture, 50 steps", 0.30, 0.22, False, "s"),
        Demand("cold job, same sampler and steps", 50, 27, False, "s"),
        Demand("cold job, same sampler and steps, ratio", 4, 4),
    ),
}


def judge(demands: tuple[Demand, ...], measured: Mapping[str, float], *, whole: bool) -> tuple[list[str], bool]:
    """What was measured, by the demands' names -> a line each, and whether none is missed.

    whole: what was not measured is missed too; else it was not asked for.
    """
    lines = [demand.words(measured.get(demand.measure)) for demand in demands]
    return lines, all(d.met(measured[d.measure]) if d.measure in measured else not whole for d in demands)
