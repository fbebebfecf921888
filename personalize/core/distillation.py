"""Few-step students: progressive distillation (2202.00512) and latent consistency (2310.04378), as targets and losses.

B images; z, z0, out (B,C,h,w); t, s are timesteps, (B,) or one number, -1 for clean data; abar = alphas_cumprod[t],
alpha = sqrt(abar), sigma = sqrt(1 - abar). `predict` is the student, `guided` the teacher with its guidance.
"""

import torch
from torch import Tensor

from personalize.core.guidance import Cond, Guided, Predict
from personalize.core.schedule import Schedule

LCM_DATA, LCM_TIME = 0.5, 10.0  # sigma_data, and the factor of t: of the released LCMs and of their sampler, whatever the base
LCM_STEPS = 50  # of the grid of timesteps that a consistency model knows; the teacher makes one DDIM step of it
HUBER = 1e-3


def levels(schedule: Schedule, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma at t, each (B,1,...) or (1,1,...), where -1 is the end of DDIM: clean data, or abar[0] as the base says."""
    end = torch.ones(1, dtype=torch.float64) if schedule.final_alpha_one else schedule.alphas_cumprod[:1]
    abar = torch.cat([end, schedule.alphas_cumprod])[torch.as_tensor(t).cpu() + 1].reshape(-1, *(1,) * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return abar.sqrt().to(like.device, dtype), (1 - abar).sqrt().to(like.device, dtype)


def ddim_step(schedule: Schedule, z_t: Tensor, z0: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """z_t and what is taken for its z0 -> z_s (2010.02502, eq. 12 with eta 0). t is above zero noise."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t, z_t), levels(schedule, s, z_t)
    return alpha_s * z0 + sigma_s * ((z_t - alpha_t * z0) / sigma_t)


def distillation_target(schedule: Schedule, z_t: Tensor, z_s: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """The z0 by which one DDIM step from z_t at t lands exactly at z_s (Salimans & Ho 2202.00512, appendix G).

    z_s: where the teacher's two steps landed, or any number of them. Exact from t = T - 1 at zero terminal SNR too.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t, z_t), levels(schedule, s, z_t)
    kept = sigma_s / sigma_t
    return (z_s - kept * z_t) / (alpha_s - kept * alpha_t)


def z0_loss(schedule: Schedule, z0: Tensor, target: Tensor, t: Tensor | int) -> Tensor:
    """(B,): squared error of z0 times SNR + 1, the paper's second weight: for v prediction the plain loss of v."""
    _, sigma = levels(schedule, t, z0)
    return ((z0.float() - target.float()) / sigma.float()).square().flatten(1).mean(1)


def teacher_lands(schedule: Schedule, guided: Guided, z: Tensor, times: list[int]) -> Tensor:
    """z at times[0] -> z at times[-1], by a DDIM step of the teacher between each two."""
    for t, s in zip(times, times[1:], strict=False):
        z = ddim_step(schedule, z, schedule.to_z0(z, guided(z, t), t), t, s)
    return z


def student_paths(schedule: Schedule, teacher: int, student: int, *, at_once: int = 2) -> list[list[list[int]]]:
    """From `teacher` steps to `student`, by `at_once` times fewer each time, or by what is left: for each student its steps,
    and of each step the timesteps [from, ..., to] that its teacher stops at. Halving is the paper's.
    """
    stages = []
    while teacher > student:
        jump = min(at_once, teacher // student)
        assert teacher % jump == 0, (teacher, student, at_once)
        times = [*schedule.timesteps(teacher, "trailing").tolist(), -1]
        teacher //= jump
        stages.append([times[jump * k : jump * (k + 1) + 1] for k in range(teacher)])
    return stages


def path_loss(
    schedule: Schedule, predict: Predict, guided: Guided, z: Tensor, cond: Cond, path: list[list[int]]
) -> Tensor:  # fmt: skip
    """() of a student's whole path from noise z: how far each step is from where the teacher lands from there.

    path: for each step of the student the timesteps [from, ..., to] that the teacher stops at. The student goes its own way, on
    which it will draw, and no gradient goes along it.
    """
    total = 0.0
    for times in path:
        target = _target(schedule, guided, z, times)
        z0 = _student_z0(schedule, predict, z, cond, times)
        total = total + z0_loss(schedule, z0, target, times[0]).mean() / len(path)
        z = ddim_step(schedule, z, z0.detach(), times[0], times[-1])
    return total


@torch.no_grad()
def path_lessons(
    schedule: Schedule, predict: Predict, guided: Guided, z: Tensor, cond: Cond, path: list[list[int]]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The student's stops on its path from noise z, and the z0 that it has to answer at each: both (S,B,C,h,w), to be learned
    as often as one likes. `path` as in `path_loss`.
    """
    stops, targets = [], []
    for k, times in enumerate(path):
        stops.append(z)
        targets.append(_target(schedule, guided, z, times))
        if k + 1 < len(path):
            z = ddim_step(schedule, z, _student_z0(schedule, predict, z, cond, times), times[0], times[-1])
    return torch.stack(stops), torch.stack(targets)


def lessons_loss(
    schedule: Schedule, predict: Predict, stops: Tensor, targets: Tensor, cond: Cond, path: list[list[int]]
) -> Tensor:  # fmt: skip
    """() of what `path_lessons` gave: `path_loss` of the same student."""
    lessons = zip(stops, targets, path, strict=True)
    parts = [z0_loss(schedule, _student_z0(schedule, predict, z, cond, times), z0, times[0]) for z, z0, times in lessons]
    return torch.stack(parts).mean()


@torch.no_grad()
def _target(schedule: Schedule, guided: Guided, z: Tensor, times: list[int]) -> Tensor:
    return distillation_target(schedule, z, teacher_lands(schedule, guided, z, times), times[0], times[-1])


def _student_z0(schedule: Schedule, predict: Predict, z: Tensor, cond: Cond, times: list[int]) -> Tensor:
    return schedule.to_z0(z, predict(z, torch.full((len(z),), times[0], device=z.device), cond).to(z.dtype), times[0])


def lcm_boundary(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """t (B,) -> c_skip, c_out (B,1,...): 1 and 0 at t = 0, where a consistency function is the identity."""
    scaled = LCM_TIME * t.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(-1, *(1,) * (like.ndim - 1))
    squares = scaled.square() + LCM_DATA**2
    return LCM_DATA**2 / squares, scaled / squares.sqrt()


def consistency(schedule: Schedule, predict: Predict, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The consistency function f(z, t) -> z0 (2310.04378, eq. 9); t (B,), where -1 counts as 0."""
    t = t.clamp(min=0)
    skip, out = lcm_boundary(t, z)
    return skip * z + out * schedule.to_z0(z, predict(z, t, cond).to(z.dtype), t)


def lcm_loss(schedule: Schedule, predict: Predict, guided: Guided, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """() Huber loss of f(z, t) from f at the end of the teacher's DDIM step over T / 50 timesteps (2310.04378, eq. 14 and 16).

    The teacher's guidance c + w (c - u) is ours at the scale w + 1.
    """
    s = (t - schedule.T // LCM_STEPS).clamp(min=-1)
    with torch.no_grad():
        z_s = ddim_step(schedule, z, schedule.to_z0(z, guided(z, t), t), t, s)
        target = consistency(schedule, predict, z_s, s, cond)
    error = (consistency(schedule, predict, z, t, cond) - target).float()
    return ((error.square() + HUBER**2).sqrt() - HUBER).mean()
