"""At which steps a run saves itself: those that its recipe names, and others by the clock, to go on from after a kill.

A checkpoint off the schedule, by the clock or by a signal, is a spare: the newest two stay while the run trains, and none
once it is finished. So the clock decides neither which files a run leaves nor what it chooses.
"""

import time

from personalize.common import distributed
from personalize.common.recipe import Recipe

SPARES = 2


def is_scored(recipe: Recipe, step: int) -> bool:
    """Whether the checkpoint of this step is scored on the dev split."""
    every = recipe.choose.every
    return bool(every) and (step == recipe.train.steps or step % every == 0)


def is_scheduled(recipe: Recipe, step: int) -> bool:
    """Whether the recipe asks for a checkpoint at this step.

    The first sample images may not fit in memory: if no checkpoint comes before them, there is one at their step.
    """
    train = recipe.train
    intervals = [every for every in (train.checkpoint_every, recipe.choose.every) if every]
    first_sample = train.sample_every if train.sample_every < min(intervals, default=train.steps) else 0
    return step in (train.steps, first_sample) or any(step % every == 0 for every in intervals)


class Clock:
    """Says when the last checkpoint is `minutes` old; 0: never. Where weights are sharded, the first process says it."""

    def __init__(self, minutes: float):
        self.minutes, self.saved = minutes, time.monotonic()

    def is_due(self) -> bool:
        if not self.minutes:
            return False
        return distributed.rank0_decides(time.monotonic() - self.saved >= 60 * self.minutes)

    def reset(self) -> None:
        self.saved = time.monotonic()
