"""Training a student: the networks, what is learned at a step, and its loop, which saves and resumes as any run does.

No image is needed: a student learns from noise and prompts, along its own path, what its teacher says there.
B images; z (B,C,h,w).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from personalize import methods
from personalize.common import checkpoint
from personalize.common.errors import Interrupted
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.terminal import Terminal
from personalize.core import distillation, rng
from personalize.core.guidance import Cond, Guided
from personalize.generation import sampling
from personalize.methods import peft_layers
from personalize.models import fast_unet
from personalize.models.interface import LatentModel
from personalize.training import loop
from personalize.training.checkpoint_schedule import Clock
from personalize.training.engine import Engine, lr_factor
from personalize.training.log import stop_signals
from personalize.training.run import TrainingRun, save, step_fits

TEACHERS = "teachers"  # in the run's folder: students that taught the next one


@dataclass
class Lesson:
    """What a student learns. It stands where a run has its training set.

    model: the student; teacher: of the same prompts, with the guidance of `draw` until a student takes its place.
    paths: of each student in turn its steps, as timesteps that its teacher stops at; [] for lcm.
    """

    model: LatentModel
    recipe: Recipe
    teacher: LatentModel
    draw: SamplingConfig
    prompts: list[str]
    paths: list[list[list[int]]]
    photos: Sequence = ()
    stage: int = field(init=False, default=0)

    def release(self) -> None:
        self.model.release(vae=True)

    def loss(self, step: int) -> Tensor:
        """() at step 0…"""
        settings, model, g = self.recipe.distill, self.model, rng.generator(self.recipe.seed, "distill", step)
        rows = torch.randint(0, len(self.prompts), (settings.batch,), generator=g).tolist()
        shape = (settings.batch, *sampling.latent_shape(model, model.size))
        noise = torch.randn(shape, generator=g).to(model.device)
        with torch.no_grad():
            cond, guided = self._teacher([self.prompts[k] for k in rows])
        if settings.method == "progressive":
            return distillation.path_loss(model.schedule, model.predict, guided, noise, cond, self.paths[self.stage])
        t = self._timesteps(settings.batch, g)
        with torch.no_grad():
            z = self._noisy(noise, torch.randn(shape, generator=g).to(model.device), t, cond)
        return distillation.lcm_loss(model.schedule, model.predict, guided, z, t, cond)

    def _teacher(self, prompts: list[str]) -> tuple[Cond, Guided]:
        cond = self.teacher.encode_prompts(prompts)
        draw = replace(self.draw, guidance=1.0) if self.stage else self.draw
        uncond = sampling.unconditional(self.teacher, len(prompts), draw)
        return cond, sampling.text_guidance(self.teacher, self.teacher.prepare(cond), uncond, draw)

    def _timesteps(self, B: int, g: torch.Generator) -> Tensor:
        """(B,) of the consistency model's grid, spread evenly."""
        grid, T = distillation.LCM_STEPS, self.model.schedule.T
        k = ((torch.arange(B) + torch.rand(B, generator=g)) * (grid / B)).long().clamp(max=grid - 1)
        return ((k + 1) * (T // grid) - 1).to(self.model.device)

    def _noisy(self, noise: Tensor, fresh: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """z at t as the LCM sampler comes there: noise at the last timestep, else the student's image of it, noised anew."""
        schedule, last = self.model.schedule, torch.full_like(t, self.model.schedule.T - 1)
        z0 = distillation.consistency(schedule, self.model.predict, noise, last, cond)
        return torch.where((t == last).view(-1, 1, 1, 1), noise, schedule.add_noise(z0, fresh, t))

    def promote(self, run_folder: Path) -> None:
        """The student as it is after its stage becomes the teacher of the next; the folder keeps it, so that a run resumes."""
        self.stage += 1
        path = run_folder / TEACHERS / f"{self.stage}.safetensors"
        now = {key: value.detach().clone() for key, value in methods.state(self.model, self.recipe).items()}
        if path.exists():
            methods.restore(self.model, self.recipe, checkpoint.load_state(path)[0]["trained"])
        else:
            path.parent.mkdir(exist_ok=True)
            checkpoint.save_state(path, {"trained": now}, self.stage)
        unet = copy.deepcopy(self.model.unet).eval().requires_grad_(False).to(self.model.dtype)
        peft_layers.merge_adapter(unet)
        self.teacher.unet = unet
        self.teacher.uses_fast_unet = not fast_unet.why_not_fast(unet)
        methods.restore(self.model, self.recipe, now)


def teach(run: TrainingRun, start: int, *, trackers: list, screen: Terminal) -> None:
    """Steps `start` to the last one. Interrupted where a signal stops it, which is saved."""
    lesson, train = run.data, run.recipe.train
    updates = run.recipe.distill.updates
    rates = replace(run.recipe, train=replace(train, steps=updates))
    for _ in range(start // updates - (start == train.steps)):
        lesson.promote(run.folder)
    log, clock = loop.begin_log(run, start, trackers=trackers, screen=screen), Clock(train.checkpoint_minutes)
    with stop_signals() as stopped, screen.progress("distilling", train.steps, done=start, unit="steps") as advance:
        for step in range(start, train.steps):
            if step and step % updates == 0 and step != start:
                lesson.promote(run.folder)
            with step_fits(run):
                log.add(step + 1, learn(run.engine, lesson, step, scale=lr_factor(rates, step % updates)))
            advance(note=log.line)
            if (step + 1) % updates == 0 or clock.is_due() or stopped:
                log.flush()
                save(run, step + 1, screen)
                clock.reset()
            if stopped and step + 1 < train.steps:
                raise Interrupted(f"stopped at step {step + 1} of {train.steps}; the same command goes on from there")


def learn(engine: Engine, lesson: Lesson, step: int, *, scale: float) -> dict[str, Tensor]:
    """One update -> what a run logs of it."""
    model = engine.model
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        loss = lesson.loss(step)
    engine.scaler.scale(loss).backward()
    value = loss.detach().float()
    return engine.step_by_gradients(torch.stack([value, value, torch.zeros_like(value)]), scale=scale)
