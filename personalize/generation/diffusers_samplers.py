"""diffusers' schedulers as further rows of SAMPLERS, with the call described in `core.samplers`.

B images, T training timesteps; noise, z, out (B,C,h,w). Each row visits the timesteps its own scheduler chooses from
spacing and offset: these may be fractional ("euler" with linspace) or come twice ("heun"). on_step counts evaluations.

"pndm" is as it is in diffusers: it steps by T // steps, and averages raw outputs, which for v mixes noise levels. Both
are exact for eps with leading spacing only.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Generator, Tensor

from personalize.common.errors import UserError
from personalize.core.guidance import Guided
from personalize.core.samplers import OnStep
from personalize.core.schedule import TINY_ABAR, Schedule


@dataclass(frozen=True)
class Row:
    """A scheduler class of diffusers, options beside those of the schedule, and what it can read."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    stochastic: bool = False
    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")


def adapt(
    guided: Guided,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    row: Row,
    generators: list[Generator] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    """Sample with the scheduler of `row`, as a diffusers pipeline does -> z0. UserError for what it cannot do."""
    scheduler = build(row, schedule, steps)
    try:
        scheduler.set_timesteps(steps, device=noise.device)
    except ValueError as error:
        raise UserError(f"{row.name} cannot take {steps} steps: {error}") from error
    if hasattr(scheduler, "set_begin_index"):
        # Else a timestep that comes twice ("karras", "heun") is taken for the second, or the picture for noise.
        scheduler.set_begin_index(first * scheduler.order)
    assert 0 <= first <= steps and (start is not None or first == 0), "noise levels are the scheduler's own: give `start`"
    assert not row.stochastic or (generators is not None and len(generators) == len(noise)), (
        "a stochastic sampler needs one generator per image"
    )
    noise_source = {"generator": generators} if row.stochastic else {}
    times = timesteps_from(scheduler, first)
    z = noise * scheduler.init_noise_sigma
    if start is not None:
        z = scheduler.add_noise(start, noise, times[:1]) if len(times) else start
    for i, t in enumerate(times):
        out = guided(scheduler.scale_model_input(z, t), t.item())
        z = scheduler.step(out, t, z, **noise_source).prev_sample
        if on_step is not None:
            on_step(i)
    return z


def timesteps_from(scheduler, first: int) -> Tensor:
    """The timesteps that are left when `first` steps are left out."""
    times = scheduler.timesteps
    if not hasattr(scheduler, "plms_timesteps"):
        return times[first * scheduler.order :]
    # PNDM begins by going to its second timestep twice, wherever that is; diffusers' img2img skips one of the two.
    once = torch.cat([times[:1], times[2:]])[first:]
    return torch.cat([once[:2], once[1:]])


def build(row: Row, schedule: Schedule, steps: int):
    """The diffusers scheduler of `row` over the abar of `schedule`, zero terminal SNR raised to TINY_ABAR."""
    import diffusers

    if schedule.prediction not in row.predictions:
        raise UserError(
            f"{row.name} cannot read {schedule.prediction!r} predictions, which this base makes. "
            "Use another sampler, such as ddim or dpm++2m."
        )
    scheduler_class = getattr(diffusers, row.name)
    abar = schedule.alphas_cumprod.cpu().clamp(min=TINY_ABAR)
    optional = {
        "set_alpha_to_one": schedule.final_alpha_one,
        "original_inference_steps": min(schedule.T, max(50, steps)),
    }
    known = inspect.signature(scheduler_class).parameters
    return scheduler_class(
        num_train_timesteps=schedule.T,
        trained_betas=(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])).tolist(),
        prediction_type=schedule.prediction,
        timestep_spacing=schedule.spacing,
        steps_offset=schedule.steps_offset,
        **{key: value for key, value in optional.items() if key in known},
        **row.options,
    )


_NOT_SAMPLE = ("epsilon", "v_prediction")
ROWS = {
    "euler": Row("EulerDiscreteScheduler"),
    "euler-a": Row("EulerAncestralDiscreteScheduler", stochastic=True, predictions=_NOT_SAMPLE),
    "heun": Row("HeunDiscreteScheduler", predictions=_NOT_SAMPLE),
    "unipc": Row("UniPCMultistepScheduler"),
    "pndm": Row("PNDMScheduler", {"skip_prk_steps": True}, predictions=_NOT_SAMPLE),
    "lcm": Row("LCMScheduler", stochastic=True),
    "dpm++2m-karras": Row("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
DIFFUSERS = {name: partial(adapt, row=row) for name, row in ROWS.items()}
