"""Engines on a tiny base, batches that differ from step to step, and a stand-in for CUDA graphs that needs no GPU."""

import contextlib

import torch

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.core import rng
from personalize.data.batch import Batch
from personalize.generation import sampling
from personalize.training.engine import Engine, lr_factor

PROMPTS = ["a zqv dog", "a photo of a cat", "a dog", "a dog"]
COMMON = ["class_word=dog", "train.steps=8", "train.lr=1e-3", "train.warmup=2", "train.lr_schedule=cosine"]
COMMON += ["train.prior_weight=0.7", "train.clip=0.5"]
FULL, LORA = "train.methods=full", "train.methods=lora"


def engine_of(folder, *more, dtype="float32", said=None):
    recipe = load_recipe(None, [*COMMON, *more])
    offload = recipe.train.offload
    model = models.load_model(str(folder), device="cpu", dtype=dtype, offload=offload, say=lambda line: None)
    torch.manual_seed(0)
    groups = methods.attach(model, recipe)
    return Engine(model, recipe, groups, say=(said if said is not None else []).append)


def batch_of(engine, step, *, subjects=2, extras=False):
    """Photos and two class images, other ones at each step."""
    g = rng.generator(step, "test")
    n, texts = subjects + 2, sampling.encode_texts(engine.model, PROMPTS[:subjects] + PROMPTS[2:])
    texts = {name: value.detach() for name, value in texts.items()}
    z0, eps, target = (torch.randn(n, 4, 16, 16, generator=g) for _ in range(3))
    t, mask = torch.randint(0, 1000, (n,), generator=g), torch.rand(n, 1, 16, 16, generator=g)
    extra = {"target": target, "mask": mask} if extras else {}
    return Batch(z0, eps, t, torch.arange(n) >= subjects, lambda rows: {k: v[rows] for k, v in texts.items()}, **extra)


def ran(engine, run=None, steps=5, **shape):
    """Rows of loss, subject, prior, norm; then all weights."""
    if run is not None:
        engine._run = run
    rows = [
        torch.stack(list(engine.step(batch_of(engine, k, **shape), scale=lr_factor(engine.recipe, k)).values()))
        for k in range(steps)
    ]
    return torch.stack(rows), [p.detach().clone() for p in engine.params]


def same(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


class StandIn:
    """Captures by keeping the function, and replays by calling it."""

    def __init__(self, refuses=""):
        self.warmed, self.captured, self.replayed, self.refuses = 0, 0, 0, refuses

    @contextlib.contextmanager
    def warm(self):
        self.warmed += 1
        yield

    def capture(self, function):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.captured += 1

        def replay():
            self.replayed += 1
            function()

        return replay
