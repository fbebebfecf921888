"""What personalize.core.guidance promises."""

import pytest
import torch

from personalize.core.guidance import GUIDANCE, cfg
from personalize.core.rng import generator

B, SHAPE = 2, (2, 3, 4, 4)
Z = torch.randn(SHAPE, generator=generator(0, "z"), dtype=torch.float64)
COND = {"text": torch.tensor([[1.0], [2.0]]), "pooled": torch.tensor([[0.1], [0.2]])}
UNCOND = {"text": torch.tensor([[-1.0], [0.5]]), "pooled": torch.zeros(2, 1)}


class Recorder:
    """A network with a known answer that remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, cond):
        self.calls.append((z.shape, t.tolist(), cond["text"].flatten().tolist()))
        text, pooled = (cond[key].double().reshape(-1, 1, 1, 1) for key in ("text", "pooled"))
        z, t = (torch.cat([x] * (len(text) // len(x))) for x in (z, t))
        return torch.sin(z * text) + pooled * t.reshape(-1, 1, 1, 1)


def out(scale, t=10, **options):
    return cfg(Recorder(), COND, UNCOND, scale, **options)(Z, t)


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_is_affine_in_its_scale(name):
    at = [GUIDANCE[name](Recorder(), COND, UNCOND, scale)(Z, 10) for scale in (0.0, 1.0, 3.0, 7.5)]
    for scale, value in zip((3.0, 7.5), at[2:], strict=True):
        torch.testing.assert_close(value, at[0] + scale * (at[1] - at[0]))


@pytest.mark.parametrize("name", GUIDANCE)
def test_scale_one_asks_for_the_conditional_rows_once(name):
    net = Recorder()
    guided = GUIDANCE[name](net, COND, None, 1.0)
    assert torch.equal(guided(Z, 10), Recorder()(Z, torch.tensor([10, 10]), COND))
    assert net.calls == [(SHAPE, [10, 10], [1.0, 2.0])]


def test_scale_zero_asks_for_the_unconditional_rows_once():
    net = Recorder()
    cfg(net, COND, UNCOND, 0.0)(Z, 10)
    assert net.calls == [(SHAPE, [10, 10], [-1.0, 0.5])]


def test_both_halves_are_one_call_for_the_same_z_and_t():
    net = Recorder()
    cfg(net, COND, UNCOND, 5.0)(Z, torch.tensor(10))
    assert net.calls == [(SHAPE, [10, 10], [-1.0, 0.5, 1.0, 2.0])]


def test_guidance_leaves_rows_to_themselves():
    row = slice(1, 2)
    alone = cfg(Recorder(), {k: v[row] for k, v in COND.items()}, {k: v[row] for k, v in UNCOND.items()}, 4.0)
    torch.testing.assert_close(alone(Z[row], 10), out(4.0)[row])


def test_rescale_is_that_of_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    expected = rescale_noise_cfg(out(7.5), out(1.0), guidance_rescale=0.7)
    torch.testing.assert_close(out(7.5, rescale=0.7), expected)


def test_full_rescale_has_the_spread_of_the_conditional_output():
    spread = [value.flatten(1).std(1) for value in (out(7.5, rescale=1.0), out(1.0), out(7.5))]
    torch.testing.assert_close(spread[0], spread[1])
    assert (spread[2] > 1.1 * spread[1]).all()


@pytest.mark.parametrize(("t", "inside"), [(9, False), (10, True), (20, True), (21, False)])
def test_outside_its_interval_guidance_is_off(t, inside):
    expected = out(4.0, t) if inside else out(1.0, t)
    assert torch.equal(out(4.0, t, interval=(10, 20)), expected)


def test_half_precision_outputs_are_combined_in_float32():
    def halves(z, t, cond):
        return Recorder()(z, t, cond).bfloat16()

    assert cfg(halves, COND, UNCOND, 3.0)(Z, 10).dtype == torch.float32
    assert cfg(halves, COND, UNCOND, 1.0)(Z, 10).dtype == torch.float32


def test_prompts_of_different_kinds_are_refused():
    with pytest.raises(AssertionError):
        cfg(Recorder(), COND, {"text": UNCOND["text"]}, 2.0)
