"""What personalize.core.losses promises."""

import pytest
import torch

from personalize.core import schedule as S
from personalize.core.losses import denoising_loss, dreambooth_loss, min_snr_weight, sharpened
from personalize.core.rng import generator

LOSS = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0])
PRIOR = torch.tensor([False, True, False, True, False])


def randn(*shape, k=0):
    return torch.randn(shape, generator=generator(0, "test", k), dtype=torch.float64)


def test_the_loss_of_an_image_is_its_mean_squared_error():
    out, target = randn(3, 2, 4, 4), randn(3, 2, 4, 4, k=1)
    expected = torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(out, target, strict=True)])
    torch.testing.assert_close(denoising_loss(out, target), expected.float())


def test_a_mask_leaves_out_what_it_covers():
    out, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, k=1)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    torch.testing.assert_close(denoising_loss(out, target, mask), denoising_loss(out[:, :, :2], target[:, :, :2]))


def test_a_mask_of_any_one_value_changes_nothing_and_an_empty_one_gives_zero():
    out, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, k=1)
    torch.testing.assert_close(denoising_loss(out, target, torch.full((2, 1, 4, 4), 0.3)), denoising_loss(out, target))
    assert (denoising_loss(out, target, torch.zeros(2, 1, 4, 4)) == 0).all()


def test_a_network_that_learns_from_a_sharpened_goal_comes_to_be_guided_by_the_weak_one():
    goals, weak, scale = randn(512, 1, 2, 2), randn(1, 1, 2, 2, k=1), 0.25
    out = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.SGD([out], lr=0.5)
    for _ in range(200):
        descent.zero_grad()
        denoising_loss(out.expand_as(goals), sharpened(goals, out, weak, scale)).mean().backward()
        descent.step()
    mean = goals.mean(0, keepdim=True)
    torch.testing.assert_close(out.detach(), mean + scale / (1 - scale) * (mean - weak), rtol=1e-4, atol=1e-5)
    assert torch.equal(sharpened(goals, out, weak, 0), goals)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_the_min_snr_weighted_loss_is_the_same_number_for_every_prediction(gamma):
    t = torch.tensor([1, 200, 600, 999])
    z0, eps, wrong = randn(4, 2, 3, 3), randn(4, 2, 3, 3, k=1), randn(4, 2, 3, 3, k=2)
    values = []
    for prediction in S.PREDICTIONS:
        schedule = S.from_betas(S.scaled_linear(1000), prediction)
        z_t = schedule.add_noise(z0, eps, t)
        alpha, sigma = schedule.coefficients(t, z0)
        eps_guess = (z_t - alpha * wrong) / sigma
        loss = denoising_loss(schedule.target(wrong, eps_guess, t), schedule.target(z0, eps, t))
        values.append(loss * min_snr_weight(schedule.snr(t), gamma, prediction))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(values[0], values[2], rtol=1e-4, atol=0)


def test_min_snr_weights_at_zero_snr_are_finite():
    weights = [min_snr_weight(torch.zeros(1), 5.0, prediction).item() for prediction in S.PREDICTIONS]
    assert weights == [1, 0, 0]


def test_the_loss_is_the_sum_of_two_means():
    loss, subject, prior = dreambooth_loss(LOSS, PRIOR, 0.5)
    assert (loss.item(), subject.item(), prior.item()) == (6.5, 5.0, 3.0)


def test_the_loss_does_not_change_when_the_batch_is_permuted():
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(dreambooth_loss(LOSS[order], PRIOR[order], 0.7), dreambooth_loss(LOSS, PRIOR, 0.7))


def test_more_class_images_of_the_same_loss_change_nothing():
    more = torch.cat([LOSS, LOSS[PRIOR]]), torch.cat([PRIOR, PRIOR[PRIOR]])
    torch.testing.assert_close(dreambooth_loss(*more, 1.0), dreambooth_loss(LOSS, PRIOR, 1.0))


def test_prior_weight_zero_equals_no_class_images():
    without = dreambooth_loss(LOSS[~PRIOR], PRIOR[~PRIOR], 1.0)
    assert dreambooth_loss(LOSS, PRIOR, 0.0)[0] == without[0]
    assert without[2] == 0


@pytest.mark.parametrize("kind", [True, False])
def test_a_batch_of_one_kind_has_a_finite_loss_and_gradient(kind):
    loss = LOSS.clone().requires_grad_()
    total = dreambooth_loss(loss, torch.full((5,), kind), 1.0)[0]
    total.backward()
    assert total == LOSS.mean()
    torch.testing.assert_close(loss.grad, torch.full((5,), 0.2))


def test_a_broken_class_image_does_not_hide_in_the_subject_mean():
    broken = torch.where(PRIOR, torch.nan, LOSS)
    loss, subject, prior = dreambooth_loss(broken, PRIOR, 1.0)
    assert subject == 5 and prior.isnan() and loss.isnan()


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(cut):
    parts = [dreambooth_loss(LOSS[rows], PRIOR[rows], 0.7, counts=(3, 2)) for rows in (slice(cut), slice(cut, None))]
    total = [sum(values) for values in zip(*parts, strict=True)]
    torch.testing.assert_close(total, list(dreambooth_loss(LOSS, PRIOR, 0.7)))
