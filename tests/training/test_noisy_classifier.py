"""The classifier of noisy latents: what it learns of classes whose exact classifier is known, and its file."""

import pytest
import torch

from personalize.common.errors import UserError
from personalize.core import schedule as S
from personalize.core.rng import generator
from personalize.core.samplers import ddim
from personalize.core.steering import classified
from personalize.training import noisy_classifier as N

SCHEDULE = S.from_betas(S.rescale_zero_terminal_snr(S.scaled_linear(1000)), "v_prediction", spacing="trailing")
SIDES = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None, None].expand(4, 4, 4)  # one class has two channels high and two low
MEANS, SPREAD = (-0.5 * SIDES, 0.5 * SIDES), 0.5


def randn(*shape, k=0):
    return torch.randn(shape, generator=generator(0, "classifier", k))


def trained(steps=100, seed=0):
    groups = [(m.expand(1, 4, 4, 4), torch.full((1, 4, 4, 4), SPREAD)) for m in MEANS]
    return N.train_classifier(groups, SCHEDULE, rows=(16, 16), seed=seed, advance=lambda: None, steps=steps, width=16)


@pytest.fixture(scope="module")
def network():
    return trained()


def unconditional(z, t):
    """The best network of both classes."""
    alpha, sigma = SCHEDULE.level(t)
    logits = torch.stack([-(z - alpha * m).square().sum((1, 2, 3)) for m in MEANS], -1) / (
        2 * (alpha**2 * SPREAD**2 + sigma**2)
    )
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    share = logits.softmax(-1)
    z0 = sum(share[:, k, None, None, None] * (m + gain * (z - alpha * m)) for k, m in enumerate(MEANS))
    return SCHEDULE.from_z0(z, z0, t)


def test_it_tells_the_classes_apart_from_noisy_latents_and_less_so_with_more_noise(network):
    right = []
    for t in (0, 500, 999):
        z_t = SCHEDULE.add_noise(MEANS[1] + SPREAD * randn(200, 4, 4, 4, k=7), randn(200, 4, 4, 4, k=8), t)
        right.append(N.log_probability(network, z_t, t, 1).exp().mean().item())
    assert right[0] > 0.98 > right[1] > 0.8 > right[2] > 0.25, right


def test_guidance_by_it_draws_the_wanted_class_more_often(network):
    noise, gradient = randn(64, 4, 4, 4, k=3), N.class_gradient(network, 1)
    drawn = [ddim(classified(unconditional, SCHEDULE, gradient, s), noise, SCHEDULE, 8) for s in (0.0, 1.0, 4.0)]
    shares = [((z0 * SIDES).mean((1, 2, 3)) > 0).float().mean().item() for z0 in drawn]
    assert shares == sorted(shares) and shares[0] < 0.65 and shares[2] > 0.9, shares


def test_a_row_is_guided_the_same_alone_and_in_any_batch(network):
    z, gradient = randn(3, 4, 4, 4), N.class_gradient(network, 1)
    for i in range(3):
        torch.testing.assert_close(gradient(z[i : i + 1], 300), gradient(z, 300)[i : i + 1], rtol=0, atol=1e-6)


def test_each_row_may_want_a_class_of_its_own(network):
    z, wanted = randn(2, 4, 4, 4), torch.tensor([1, 0])
    both = N.class_gradient(network, wanted)(z, 300)
    torch.testing.assert_close(both[1:], N.class_gradient(network, 0)(z[1:], 300), rtol=0, atol=1e-6)


def test_training_is_a_function_of_its_seed_and_leaves_torchs_own_alone():
    state = torch.get_rng_state()
    one, same, other = (trained(steps=2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_any_size_of_latents_is_read(network):
    assert N.log_probability(network, randn(1, 4, 12, 8), 10, 0).shape == (1,)


def test_its_file_is_read_by_its_key_alone(network, tmp_path):
    file, device = tmp_path / "like.safetensors", torch.device("cpu")
    assert N.load_classifier(file, "a", device) is None
    N.save_classifier(file, network, "a")
    assert N.load_classifier(file, "b", device) is None
    again = N.load_classifier(file, "a", device)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in network.state_dict().items())


def test_a_damaged_file_is_named_with_its_remedy(tmp_path):
    file = tmp_path / "like.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"like.safetensors is no classifier of --like .*Delete it, and it is trained again"):
        N.load_classifier(file, "a", torch.device("cpu"))
