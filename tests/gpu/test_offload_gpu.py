"""On a real card: blocks that wait in the host's memory give the same bits, two are there at most, copied while it computes."""

import time

import pytest
import torch
from torch import nn

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.generation import sampling
from personalize.models.offload import Directly, Offload, SideStream
from personalize.training.engine import Engine

pytestmark = pytest.mark.gpu
WIDTH, BLOCKS, ROWS = 4096, 8, 4096


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_and_steps_are_those_without(tiny_sdxl, dtype):
    images, weights = [], []
    for offload in (False, True):
        texts = ["class_word=dog", "train.methods=lora", "train.lr=1e-3", "train.gradient_checkpointing=true"]
        recipe = load_recipe(None, [*texts, f"train.offload={str(offload).lower()}", "draw.steps=3"])
        model = models.load_model(str(tiny_sdxl), device="cuda", dtype=dtype, offload=offload, say=lambda line: None)
        torch.manual_seed(0)
        groups = methods.attach(model, recipe)
        assert all(p.is_cuda for group in groups for p in group["params"])
        assert all(p.is_pinned() for p in model.waiting) and bool(model.waiting) == offload
        engine = Engine(model, recipe, groups)
        generators = sampling.image_generators(0, range(2))
        images.append(sampling.sample_latents(model, ["a dog"] * 2, generators, recipe.draw))
        cond = {name: value.detach() for name, value in model.encode_prompts(["a dog", "a cat"]).items()}
        g = torch.Generator().manual_seed(0)
        z0 = torch.randn(2, 4, 16, 16, generator=g).cuda()
        for _ in range(3):
            loss = model.predict(z0, torch.tensor([10, 900], device="cuda"), cond).square().mean()
            loss.backward()
            engine.optimizer.step()
            engine.clear()
        weights.append(torch.cat([p.detach().flatten() for p in engine.params]))
    assert torch.equal(*images)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)  # attention's gradient may add up in another order


@pytest.fixture
def blocks():
    """Products of 34 MB matrices, repeated so that they take about as long as fetching one."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)).to(torch.bfloat16)
    layers.requires_grad_(False)
    return layers, Offload(layers, list(layers), torch.device("cuda", torch.cuda.current_device()))


def seconds(run):
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def times(layer, x, repeats):
    for _ in range(repeats):
        x = nn.functional.linear(x, layer.weight) / WIDTH**0.5
    return x


def test_copies_run_beside_the_computation(blocks):
    layers, offload = blocks
    assert isinstance(offload.transfers, SideStream)
    x, here = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16), nn.Linear(WIDTH, WIDTH, bias=False)
    here.to("cuda", torch.bfloat16)
    copying = seconds(lambda: [Directly().fetch([layer.weight], offload.device) for layer in layers])
    repeats = max(1, round(copying / BLOCKS / (seconds(lambda: times(here, x, 20)) / 20)))
    computing = BLOCKS * seconds(lambda: times(here, x, repeats))

    def both():
        for layer in layers:
            offload.call(times, layer, x, repeats)

    assert seconds(both) < 0.8 * (copying + computing), (copying, computing)


def test_two_blocks_are_there_at_most_however_far_the_host_is_ahead(blocks):
    layers, offload = blocks
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    offload.call(times, layers[0], x, 1)  # the libraries take their memory
    torch.cuda.synchronize()
    offload.fetched.clear()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for layer in layers:
            offload.call(times, layer, x, 30)
    block, products = 2 * WIDTH**2, 3 * x.nbytes
    assert torch.cuda.max_memory_allocated() - before < 2 * block + products + 2**21
