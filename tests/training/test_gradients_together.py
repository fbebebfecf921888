"""Several subjects in one batch: each trains as it would alone, and is a run of its own."""

import pytest
import torch

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.core import rng
from personalize.data.batch import Batch
from personalize.generation import sampling
from personalize.methods.stacked_lora import Stack
from personalize.training import together
from personalize.training.engine import Engine, lr_factor

STEPS = 5
LORA = ["train.methods=lora", "lora.rank=3", "lora.alpha=7.5"]
ALL = [*LORA, "lora.conv=true", "train.text_encoder=true", "train.text_lr=2e-3", "lora.rslora=true"]
WORDS = ["train.methods=textual-inversion", "embedding.vectors=2"]
PIVOTAL = ["train.methods=textual-inversion,lora", "embedding.vectors=2", "train.gradient_checkpointing=true"]
PARTS = [*ALL, "train.accumulate=2"]
CASES = [("tiny_sd", PARTS, 4), ("tiny_sdxl", LORA, 4)]
SLOW = [("tiny_sd", [*ALL, "train.gradient_checkpointing=true"], 3), ("tiny_sd", WORDS, 3), ("tiny_sd", PIVOTAL, 2)]
SLOW += [("tiny_sd", LORA, 4), ("tiny_sdxl", PARTS, 4), ("tiny_sdxl", PIVOTAL, 4), ("tiny_sdxl", WORDS, 2)]


def recipe_of(k, more):
    """Another seed, rate, clipping, schedule and weight of class images for each subject; learned words of one name."""
    word = "<zqv>" if "textual" in more[0] else "zqv"
    own = [
        f"seed={k // 2}",
        f"train.lr={1e-3 * (k + 1)}",
        f"train.clip={0.01 + 0.5 * (k % 2)}",
        f"train.snr_gamma={5 * (k % 2)}",
    ]
    own += [
        f"train.lr_schedule={'linear' if k else 'cosine'}",
        f"train.prior_weight={0.3 * k}",
        f"train.weight_decay={0.1 * k}",
    ]
    return load_recipe(None, ["class_word=dog", f"token={word}", "train.steps=8", *own, *more])


def load(folder):
    return models.load_model(str(folder), device="cpu", dtype="float32", say=lambda line: None)


def attach(model, recipe):
    torch.manual_seed(recipe.seed)
    return Engine(model, recipe, methods.attach(model, recipe))


def batch_of(model, k, step, *, text_trains):
    """Of subject k two photos, of two prompts or of one, and two class images."""
    g, word = rng.generator(10 * k + step, "test"), next(iter(model.learned_words), "zqv")
    prompts = [f"a {word} dog", f"a photo of a {word}" if k % 2 else f"a {word} dog", "a dog", "a dog"]
    z0, eps = (torch.randn(4, 4, 16, 16, generator=g) for _ in range(2))
    sizes = model.size_conditions([(40 + k, 64)] * 4, [(0, k)] * 4, (32, 32))
    said = {} if text_trains else {key: v.detach() for key, v in model.encode_prompts(prompts).items()}

    def cond(rows):
        texts = sampling.encode_texts(model, prompts[rows]) if text_trains else {key: v[rows] for key, v in said.items()}
        return texts | {key: v[rows] for key, v in sizes.items()}

    own = {"prompts": (lambda rows: prompts[rows]) if text_trains else None, "beside": sizes}
    return Batch(z0, eps, torch.randint(0, 1000, (4,), generator=g), torch.arange(4) >= 2, cond, **own)


def gradients(engine):
    """By the number of the parameter; the last layer of an SDXL text encoder has none."""
    return {i: p.grad.clone() for i, p in enumerate(engine.params) if p.grad is not None}


def alone(folder, k, more):
    """The gradients at the first step, losses and norms of each step, and the weights after them."""
    model = load(folder)
    engine = attach(model, recipe_of(k, more))
    text_trains = any(group["name"] != "unet" for group in engine.groups)
    engine.backward(batch_of(model, k, 0, text_trains=text_trains))
    grads = gradients(engine)
    engine.clear()
    rows = [
        engine.step(batch_of(model, k, s, text_trains=text_trains), scale=lr_factor(engine.recipe, s)) for s in range(STEPS)
    ]
    return grads, rows, [p.detach() for p in engine.params], methods.state(model, engine.recipe)


@pytest.mark.parametrize("base, more, n", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_subjects_in_one_batch_have_the_gradients_and_weights_of_runs_of_their_own(request, base, more, n):
    folder = request.getfixturevalue(base)
    wanted, model = [alone(folder, k, more) for k in range(n)], load(folder)
    stack, subjects, engines = Stack(model), [], []
    for k in range(n):
        with stack.attaching() as attached:
            engines.append(attach(model, recipe_of(k, more)))
        subjects.append(attached)
    text_trains = any(group["name"] != "unet" for group in engines[0].groups)

    def batches(step):
        for k, subject in enumerate(subjects):
            with stack.alone(subject):
                yield batch_of(model, k, step, text_trains=text_trains)

    steps = [list(batches(step)) for step in range(STEPS)]
    with stack.together(subjects):
        together.backward(engines, steps[0])
        grads = [gradients(engine) for engine in engines]
        [engine.clear() for engine in engines]
        rows = [together.step(engines, each, [s] * n) for s, each in enumerate(steps)]
    for k, (own_grads, own_rows, weights, state) in enumerate(wanted):
        largest = max(float(g.abs().max()) for g in own_grads.values())
        assert grads[k].keys() == own_grads.keys() and largest > 0
        assert max(float((grads[k][i] - g).abs().max()) for i, g in own_grads.items()) < 2e-5 * largest
        for s in range(STEPS):
            assert all(torch.isclose(rows[s][k][name], own_rows[s][name], rtol=1e-3) for name in own_rows[s])
        moved = [(a.detach() - b).norm() / b.norm() for a, b in zip(engines[k].params, weights, strict=True)]
        assert max(moved) < 2e-3, max(moved)
        with stack.alone(subjects[k]):
            assert {name: v.shape for name, v in methods.state(model, engines[k].recipe).items()} == {
                name: v.shape for name, v in state.items()
            }
    stack.leave()
    assert not [n for n, m in model.unet.named_modules() if hasattr(m, "base_layer")] and not model.learned_words
