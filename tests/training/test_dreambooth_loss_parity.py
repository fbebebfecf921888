"""The engine's loss, gradients, clipping and learning rates against the same written plainly with diffusers and torch."""

import json
import math
import shutil

import pytest
import torch
from torch.nn.functional import mse_loss

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.core import rng
from personalize.data.batch import Batch
from personalize.generation import sampling
from personalize.training.engine import Engine, lr_factor

PROMPTS = ["a zqv dog", "a photo of a cat", "a dog", "a dog", "a dog"]
IS_PRIOR = torch.tensor([False, False, True, True, True])
WEIGHT = 0.7


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tiny_sd, tmp_path_factory):
    """tiny_sd as it is, and the same with v-prediction."""
    copy = tmp_path_factory.mktemp(request.param) / "base"
    shutil.copytree(tiny_sd, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": request.param}))
    return copy


def engine_of(folder, *more):
    texts = ["train.text_encoder=true", f"train.prior_weight={WEIGHT}", "train.clip=0", "class_word=dog", *more]
    recipe = load_recipe(None, texts)
    model = models.load_model(str(folder), device="cpu", dtype="float32", say=lambda line: None)
    return Engine(model, recipe, methods.attach(model, recipe))


def batch_of(engine, rows=slice(None)):
    """Two photos and three class images; t from almost clean to almost noise."""
    g = rng.generator(0, "test")
    z0, eps = (torch.randn(5, 4, 16, 16, generator=g)[rows] for _ in range(2))
    t = torch.tensor([10, 900, 300, 999, 0])[rows]
    prompts = PROMPTS[rows]
    return Batch(z0, eps, t, IS_PRIOR[rows], lambda part: sampling.encode_texts(engine.model, prompts[part]))


def ours(engine, batch=None):
    """loss, subject, prior; the gradient of every parameter by its name."""
    totals = engine.backward(batch or batch_of(engine))
    model = engine.model
    named = [*model.unet.named_parameters(prefix="unet"), *model.text_encoders["text_encoder"].named_parameters(prefix="text")]
    return totals, {name: p.grad.clone() for name, p in named if p.grad is not None}


def theirs(folder, batch, gamma=0.0):
    """The training step of diffusers' examples: two halves, each with its own mean, their sum with a weight."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_snr
    from transformers import CLIPTextModel, CLIPTokenizer

    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").train()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    noisy = scheduler.add_noise(batch.z0, batch.eps, batch.t)
    out = unet(noisy, batch.t, encoder_hidden_states=text_encoder(ids)[0]).sample
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(batch.z0, batch.eps, batch.t) if v else batch.eps
    losses = mse_loss(out, target, reduction="none").mean([1, 2, 3])
    if gamma:
        snr = compute_snr(scheduler, batch.t)
        losses = losses * snr.clamp(max=gamma) / (snr + 1 if v else snr)
    loss = losses[:2].mean() + WEIGHT * losses[2:].mean()
    loss.backward()
    named = [*unet.named_parameters(prefix="unet"), *text_encoder.named_parameters(prefix="text")]
    return torch.stack([loss, losses[:2].mean(), losses[2:].mean()]).detach(), {
        k: p.grad for k, p in named if p.grad is not None
    }


def assert_equal(one, other, tolerance=1e-5):
    assert torch.allclose(one[0], other[0], rtol=tolerance), (one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        size = other[1][name].norm()
        assert (one[1][name] - other[1][name]).norm() <= tolerance * size + 1e-7, name
    assert sum(g.norm() for g in other[1].values()) > 0.1


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_loss_and_gradients_are_those_of_plain_diffusers(folder, gamma):
    engine = engine_of(folder, f"train.snr_gamma={gamma}")
    assert_equal(ours(engine), theirs(folder, batch_of(engine), gamma), tolerance=1e-4)


def test_min_snr_changes_the_loss(tiny_sd):
    losses = [float(ours(engine_of(tiny_sd, f"train.snr_gamma={gamma}"))[0][0]) for gamma in (0.0, 5.0)]
    assert losses[1] < losses[0] - 0.1  # three of the five are almost clean


@pytest.mark.parametrize("parts", [2, 3, 5, 9])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(tiny_sd, parts):
    whole, split = (ours(engine_of(tiny_sd, f"train.accumulate={n}")) for n in (1, parts))
    assert_equal(split, whole, tolerance=1e-4)


def test_prior_weight_0_is_no_class_images(tiny_sd):
    weightless, without = engine_of(tiny_sd, "train.prior_weight=0"), engine_of(tiny_sd)
    one, other = ours(weightless), ours(without, batch_of(without, slice(0, 2)))
    assert one[0][2] > 0 and other[0][2] == 0
    one[0][2] = 0.0
    assert_equal(one, other, tolerance=1e-4)


def test_the_order_within_a_batch_does_not_matter(tiny_sd):
    engine, mixed = engine_of(tiny_sd), engine_of(tiny_sd)
    batch, turn = batch_of(mixed), [4, 1, 3, 0, 2]
    shuffled = Batch(
        batch.z0[turn], batch.eps[turn], batch.t[turn], batch.is_prior[turn],
        lambda part: sampling.encode_texts(mixed.model, [PROMPTS[i] for i in turn][part]),
    )  # fmt: skip
    assert_equal(ours(mixed, shuffled), ours(engine), tolerance=1e-4)


def test_one_joint_norm_clips_all_groups_after_accumulation(tiny_sd):
    plain = engine_of(tiny_sd)
    grads = ours(plain)[1]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    limit = norm / 3
    engine = engine_of(tiny_sd, f"train.clip={limit}", "train.accumulate=2")
    values = engine.step(batch_of(engine), scale=1.0)
    assert values["norm"].item() == pytest.approx(norm, rel=1e-4)
    state = engine.optimizer.state
    kept = math.sqrt(sum(float((state[p]["exp_avg"].double() / 0.1).square().sum()) for p in engine.params))
    assert kept == pytest.approx(limit, rel=1e-3)  # Adam's first mean is a tenth of the clipped gradient


def test_a_step_is_adamw_at_each_groups_own_rate(tiny_sd):
    engine = engine_of(tiny_sd, "train.lr=1e-3", "train.text_lr=1e-4", "train.weight_decay=0.1", "train.beta2=0.99")
    twin = engine_of(tiny_sd)
    groups = [{**g, "lr": lr} for g, lr in zip(twin.groups, (0.5e-3, 0.5e-4), strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.99), fused=False, foreach=False)
    for _ in range(2):
        engine.step(batch_of(engine), scale=0.5)
        twin.backward(batch_of(twin))
        optimizer.step()
        optimizer.zero_grad()
    before = engine_of(tiny_sd).params
    halves = [slice(0, len(engine.groups[0]["params"])), slice(len(engine.groups[0]["params"]), None)]
    for part in halves:
        old, mine, plain = (torch.cat([p.flatten() for p in params[part]]) for params in (before, engine.params, twin.params))
        assert (mine - plain).norm() <= 0.02 * (plain - old).norm()  # attention's key biases have no gradient but rounding


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_rate_rises_to_1_and_falls_as_its_schedule_says(schedule):
    recipe = load_recipe(None, ["train.steps=100", "train.warmup=10", f"train.lr_schedule={schedule}"])
    rates = [lr_factor(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    middle, end = {"constant": (1, 1), "cosine": (0.5, 0), "linear": (0.5, 0)}[schedule]
    assert rates[55] == pytest.approx(middle)
    assert rates[99] == pytest.approx(end, abs=1 / 89) and rates[99] > 0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_without_warm_up_the_first_step_has_the_whole_rate():
    for steps in (1, 7):
        for schedule in ("constant", "cosine", "linear"):
            recipe = load_recipe(None, [f"train.steps={steps}", f"train.lr_schedule={schedule}"])
            assert lr_factor(recipe, 0) == 1


def test_a_schedule_that_is_all_warm_up_ends_at_the_whole_rate():
    recipe = load_recipe(None, ["train.steps=4", "train.warmup=4", "train.lr_schedule=linear"])
    assert [lr_factor(recipe, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
