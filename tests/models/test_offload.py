"""Blocks of a U-Net that wait in the host's memory: the same bits, each fetched in time, two at a time."""

import weakref

import pytest
import torch
from engine_cases import FULL, LORA, batch_of, engine_of, ran, same

from personalize import methods, models
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.generation import sampling
from personalize.models import fast_unet, offload

AGAIN, OFFLOAD = "train.gradient_checkpointing=true", "train.offload=true"
CONV = [LORA, "lora.conv=true"]  # an adapter in the first block too, so that gradients pass through all of them


class Watched(offload.Directly):
    """Copies that hold nothing but NaN until they are used. fetched: numbers of blocks; most: that were alive at once."""

    def __init__(self, model):
        self.offload = model._offload
        self.offload.transfers = self
        self.fetched, self.most, self.alive, self.waits = [], 0, {}, 0

    def fetch(self, waiting, device):
        number = next((k for k, p in enumerate(self.offload.waiting) if p and p[0][2] is waiting[0]), None)
        copies = offload._copies(waiting, device)
        self.fetched.append(number)
        self.alive[len(self.fetched)] = len(copies)
        for copy in copies:
            weakref.finalize(copy.untyped_storage(), self.freed, len(self.fetched))
            copy.data.fill_(torch.nan)
        self.most = max(self.most, sum(count > 0 for count in self.alive.values()))
        return offload.Fetched(copies, waiting)

    def use(self, fetched):
        for copy, p in zip(fetched.copies, fetched.arrived, strict=True):
            copy.data.copy_(p)

    def freed(self, number):
        self.alive[number] -= 1

    def wait(self, mark):
        self.waits += 1


@pytest.mark.parametrize(
    "base, more",
    [
        ("tiny_sd", [LORA, "train.accumulate=2"]),
        ("tiny_sdxl", [LORA, "lora.dora=true", "lora.conv=true"]),
        pytest.param("tiny_sdxl", ["train.methods=boft"], marks=pytest.mark.slow),
        ("tiny_sdxl", ["train.methods=custom-diffusion", "token=<zqv>"]),
    ],
)
def test_steps_and_images_are_bit_for_bit_those_without(request, base, more):
    results, images = [], []
    for where in (OFFLOAD, "train.offload=false"):
        engine = engine_of(request.getfixturevalue(base), *more, AGAIN, where)
        results.append(ran(engine, steps=3))
        generators = sampling.image_generators(0, range(2))
        images.append(sampling.sample_latents(engine.model, ["a dog"] * 2, generators, SamplingConfig(steps=2)))
        results.append(ran(engine, steps=2))  # the block that was fetched last for an image may be a step's first
    assert same(results[0], results[2]) and same(results[1], results[3]) and torch.equal(*images)


def test_each_block_is_fetched_ahead_once_forward_and_once_backward_and_two_are_there_at_most(tiny_sdxl):
    engine, plain = engine_of(tiny_sdxl, *CONV, AGAIN, OFFLOAD), engine_of(tiny_sdxl, *CONV, AGAIN)
    seen = Watched(engine.model)
    last = len(seen.offload.waiting) - 1
    batch = batch_of(engine, 0)
    assert torch.equal(engine.step(batch, scale=1.0)["loss"], plain.step(batch, scale=1.0)["loss"])
    assert not any(seen.alive.values()), "nothing stays after a step"
    assert seen.fetched == [*range(last + 1), *range(last, -1, -1)]
    assert seen.most == 2 and seen.waits == 2 * (last + 1)


@pytest.mark.parametrize("method", ["lora", "custom-diffusion"])
def test_all_matrices_wait_but_those_that_train(tiny_sdxl, method):
    engine = engine_of(tiny_sdxl, f"train.methods={method}", "token=<zqv>", AGAIN, OFFLOAD)
    waits, blocks = {id(p) for p in engine.model.waiting}, fast_unet.blocks_of(engine.model.unet)
    for name, p in engine.model.unet.named_parameters():
        inside = any(p is q for block in blocks for q in block.parameters())
        assert (id(p) in waits) == (inside and p.ndim > 1 and not p.requires_grad), name
    assert len(waits) > 20


def test_a_block_that_fails_leaves_the_network_whole_and_the_next_pass_right(tiny_sdxl, monkeypatch):
    model = models.load_model(str(tiny_sdxl), device="cpu", offload=True, say=lambda line: None)
    before = {name: p for name, p in model.unet.named_parameters()}
    z, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([1, 900]), model.encode_prompts(["a dog", "a cat"])
    with torch.no_grad():
        right = model.predict(z, t, cond)
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(fast_unet, "_transform", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
            model.predict(z, t, cond)
        assert all(p is before[name] for name, p in model.unet.named_parameters())
        assert torch.equal(model.predict(z, t, cond), right)


@pytest.mark.parametrize(
    "more, why",
    [
        ([FULL], "full trains every block"),
        ([LORA, "train.quantize=4bit"], "quantized weights"),
        ([LORA, "train.engine=graph"], "train.engine=graph keeps the addresses"),
        ([LORA, "train.engine=compiled"], "train.engine=compiled keeps the addresses"),
        ([LORA, "train.gradient_checkpointing=false"], "each block would stay until its gradient is computed"),
    ],
)
def test_what_cannot_wait_is_refused_by_name(more, why):
    with pytest.raises(UserError, match=r"train\.offload = true is not possible: " + why):
        methods.check_offload(load_recipe(None, [AGAIN, OFFLOAD, *more]))
    methods.check_offload(load_recipe(None, [LORA, AGAIN, OFFLOAD]))


def test_a_u_net_of_other_blocks_is_refused(tiny_sd, monkeypatch):
    monkeypatch.setattr(fast_unet, "why_not_fast", lambda unet: "act_fn is 'gelu'")
    with pytest.raises(UserError, match="act_fn is 'gelu'"):
        models.load_model(str(tiny_sd), device="cpu", offload=True, say=lambda line: None)
