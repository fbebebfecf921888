"""What personalize.core.distillation promises: a student's goal is exact, and consistency models are the released ones."""

import pytest
import torch

from personalize.core import distillation, guidance, samplers
from personalize.core import schedule as S

V = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction", spacing="trailing")
SCHEDULES = {
    "v, zero SNR": V,
    "z0": S.from_betas(S.scaled_linear(1000), "sample", spacing="trailing"),
    "epsilon, as SD": S.from_betas(S.scaled_linear(1000), "epsilon", spacing="trailing", final_alpha_one=False),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher(z, t):
    """Some network's guided output, which depends on all that it is given."""
    return torch.tanh(z.roll(1, -1) + 0.3 * z) * (1 + float(t) / 1000)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 2), (2, 1)])
def test_one_step_of_a_student_with_its_goal_lands_where_two_steps_of_the_teacher_land(name, before, after):
    schedule, z = SCHEDULES[name], noise(3, 4, 4, 4)
    (stage,) = distillation.student_paths(schedule, before, after)
    assert [times[0] for times in stage] == schedule.timesteps(after, "trailing").tolist()
    for times in stage:
        landed = distillation.teacher_lands(schedule, teacher, z, times)
        goal = distillation.distillation_target(schedule, z, landed, times[0], times[-1])
        torch.testing.assert_close(distillation.ddim_step(schedule, z, goal, times[0], times[-1]), landed, rtol=0, atol=1e-9)
        z = landed


def test_a_student_may_learn_more_steps_at_once():
    (stage,) = distillation.student_paths(V, 8, 2, at_once=4)
    assert stage == [[999, 874, 749, 624, 499], [499, 374, 249, 124, -1]]
    z = noise(2, 4, 4, 4)
    goal = distillation.distillation_target(V, z, distillation.teacher_lands(V, teacher, z, stage[0]), 999, 499)
    landed = distillation.ddim_step(V, z, goal, 999, 499)
    torch.testing.assert_close(landed, distillation.teacher_lands(V, teacher, z, [999, 874, 749, 624, 499]), rtol=0, atol=1e-9)


def test_the_goal_is_exact_in_float32_from_pure_noise():
    z = noise(2, 4, 8, 8).float()
    landed = distillation.teacher_lands(V, teacher, z, [999, 749, 499])
    goal = distillation.distillation_target(V, z, landed, 999, 499)
    torch.testing.assert_close(distillation.ddim_step(V, z, goal, 999, 499), landed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_in_a_row_are_the_ddim_sampler(name):
    schedule, z = SCHEDULES[name], noise(2, 4, 4, 4)
    times = [*schedule.timesteps(5).tolist(), -1]
    theirs = samplers.ddim(teacher, z, schedule, 5)
    torch.testing.assert_close(distillation.teacher_lands(schedule, teacher, z, times), theirs, rtol=0, atol=1e-12)


def test_the_loss_of_z0_is_the_plain_loss_of_v():
    t, z, z0, target = torch.tensor([999, 300, 20]), *(noise(3, 4, 4, 4, seed=k) for k in range(3))
    v = [V.from_z0(z, each, t) for each in (z0, target)]
    plain = (v[0] - v[1]).square().flatten(1).mean(1).float()
    torch.testing.assert_close(distillation.z0_loss(V, z0, target, t), plain, rtol=1e-5, atol=0)


def test_lessons_on_the_students_path_are_what_the_loss_of_its_path_is_of():
    point, z = noise(1, 4, 4, 4, seed=3), noise(2, 4, 4, 4)
    guided = lambda z, t: V.from_z0(z, point.expand_as(z), t)  # noqa: E731
    predict = lambda z, t, cond: 0.5 * z  # noqa: E731
    (path,) = distillation.student_paths(V, 8, 2, at_once=4)
    stops, targets = distillation.path_lessons(V, predict, guided, z, {}, path)
    assert stops.shape == targets.shape == (2, *z.shape) and torch.equal(stops[0], z)
    loss = distillation.lessons_loss(V, predict, stops, targets, {}, path)
    assert loss.item() == pytest.approx(distillation.path_loss(V, predict, guided, z, {}, path).item(), rel=1e-6)


def test_a_student_that_says_the_goal_has_no_loss_and_learns_on_its_own_path():
    """All data is one point: teacher and student know it. A student that errs is taught from where it errs to."""
    point, z, seen = noise(1, 4, 4, 4, seed=3), noise(2, 4, 4, 4), []
    guided = lambda z, t: V.from_z0(z, point.expand_as(z), t)  # noqa: E731
    (path,) = distillation.student_paths(V, 4, 2)

    def predict(z, t, cond):
        seen.append(z)
        return guided(z, t) + cond["error"]

    assert distillation.path_loss(V, predict, guided, z, {"error": 0.0}, path) < 1e-12
    error = torch.tensor(0.5, requires_grad=True, dtype=torch.float64)
    loss = distillation.path_loss(V, predict, guided, z, {"error": error}, path)
    assert loss.item() == pytest.approx(0.25, rel=1e-5)  # of v, at both steps
    assert not seen[3].requires_grad
    z0 = V.to_z0(z, guided(z, 999) + 0.5, 999)
    torch.testing.assert_close(seen[3], distillation.ddim_step(V, z, z0, 999, 499).detach())


def test_the_boundary_is_the_identity_at_0_and_that_of_diffusers_elsewhere():
    from diffusers import LCMScheduler

    t, z = torch.tensor([-1, 0, 19, 499, 999]), noise(5, 4, 4, 4)
    f = distillation.consistency(V, lambda z, t, cond: teacher(z, 1), z, t, {})
    assert f[:2].equal(z[:2])
    skip, out = distillation.lcm_boundary(t.clamp(min=0), z)
    theirs = [LCMScheduler().get_scalings_for_boundary_condition_discrete(k) for k in t.clamp(min=0).tolist()]
    torch.testing.assert_close(torch.stack([skip.flatten(), out.flatten()], 1), torch.tensor(theirs, dtype=torch.float64))


def test_a_consistent_student_has_no_loss_and_an_inconsistent_one_that_of_huber():
    point, t, z = noise(1, 4, 4, 4, seed=3), torch.tensor([19, 499, 999]), noise(3, 4, 4, 4)
    z[:2] = V.add_noise(point.expand(2, -1, -1, -1), z[:2], t[:2])
    guided = lambda z, t: V.from_z0(z, point.expand_as(z), t)  # noqa: E731
    exact = distillation.lcm_loss(V, lambda z, t, cond: guided(z, t), guided, z, t, {})
    assert exact < 1e-4  # c_skip is no exact 0 at 19
    drifts = lambda z, t, cond: V.from_z0(z, point + t.view(-1, 1, 1, 1) / 1000, t)  # noqa: E731
    loss = distillation.lcm_loss(V, drifts, guided, z[1:], t[1:], {})
    assert loss.item() == pytest.approx((0.02**2 + 1e-6) ** 0.5 - 1e-3, rel=1e-3)  # 20 timesteps apart


def test_lcms_w_is_our_scale_less_one():
    z, c, u, w = (noise(2, 4, 4, 4, seed=k) for k in range(4))
    answers = lambda z, t, cond: torch.cat([u, c])  # noqa: E731
    rows = {"text": noise(2, 1)}
    ours = guidance.cfg(answers, rows, rows, 1 + 7.5)(z, torch.tensor([19, 999]))
    torch.testing.assert_close(ours, c + 7.5 * (c - u))


def test_the_last_student_has_the_steps_that_were_asked_for_whatever_is_made_at_once():
    assert [len(path) for path in distillation.student_paths(V, 8, 1, at_once=4)] == [2, 1]
    assert [len(path) for path in distillation.student_paths(V, 8, 4, at_once=8)] == [4]
    (path,) = distillation.student_paths(V, 2, 1, at_once=4)
    assert path == [[*V.timesteps(2, "trailing").tolist(), -1]]
