"""`personalize plan`: memory and time of a training run on this machine, before a weight is read; and what to turn."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize import methods
from personalize.commands.session import resolve_subjects
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.subjects import Subject, load_subjects
from personalize.models import devices
from personalize.training.memory import machine, rehearsal
from personalize.training.memory.switches import memory_switches
from personalize.training.preflight import duration


@dataclass(frozen=True)
class PlanResult:
    """peak, free: bytes; seconds: of all training steps; switch: the first setting with which it fits, or ""."""

    peak: int
    free: int
    seconds: float
    switch: str

    @property
    def fits(self) -> bool:
        return self.peak <= self.free


def plan(
    photos: Path | str | Sequence[str],
    *,
    class_word: str | Sequence[str] = (),
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    screen: Terminal = SILENT,
) -> PlanResult:
    """Memory and time that `train` with the same arguments takes. UserError as from `train`, but for the photos' size."""
    recipe, sources = resolve_subjects(photos, class_word, recipe, settings)
    methods.check_methods(
        recipe.train.methods, quantize=recipe.train.quantize, text_encoder=recipe.train.text_encoder, lora=recipe.lora
    )
    tokens = recipe.token or tuple(f"<subject-{i}>" for i in range(len(recipe.class_word)))  # any will do: none is read
    subjects, _ = load_subjects(sources, recipe, tokens=tokens, size=1)
    recipe, device = dataclasses.replace(recipe, token=tokens), devices.choose_device(recipe.device)
    counted, free = rehearsal.rehearse(recipe, subjects), machine.free_bytes(device)
    speed = machine.measure_speed(device, devices.dtype_for(device, recipe.dtype, screen.say))
    seconds = speed.seconds(counted.phases["step"].work) * recipe.train.steps
    screen.say(f"memory: {counted.words()}")
    screen.say(f"free on {device}: {free / 1e9:.2f} GB")
    screen.say(f"training: about {duration(seconds)} for {recipe.train.steps} steps, right to a factor of two")
    switch = "" if counted.peak <= free else _fitting(recipe, subjects, free, screen)
    return PlanResult(counted.peak, free, seconds, switch)


def _fitting(recipe: Recipe, subjects: list[Subject], free: int, screen: Terminal) -> str:
    """Turns one switch after the other until the run fits; says what each gives."""
    switches, train = [], recipe.train
    for name, values in memory_switches(recipe):
        train = dataclasses.replace(train, **values)
        try:
            counted = rehearsal.rehearse(dataclasses.replace(recipe, train=train), subjects)
        except UserError:  # a switch that this method does not have
            continue
        switches.append(name)
        screen.say(f"with {' '.join(f'--set {switch}' for switch in switches)}: {counted.peak / 1e9:.2f} GB")
        if counted.peak <= free:
            return " ".join(switches)
    screen.say("it fits with none of these: use a smaller photos.size, or a device with more memory")
    return ""
