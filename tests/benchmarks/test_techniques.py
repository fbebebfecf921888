"""Techniques of the league are recipes that exist, and what they change of a step is what their papers say."""

import pytest
import torch

import personalize
from benchmarks import techniques
from personalize import methods, models
from personalize.common.recipe import load_recipe


@pytest.mark.parametrize("name", techniques.TECHNIQUES)
def test_every_technique_is_a_recipe(name):
    recipe = personalize.resolve(settings=[*techniques.TECHNIQUES[name].settings, "class_word=dog"])
    methods.check_methods(recipe.train.methods, text_encoder=recipe.train.text_encoder, lora=recipe.lora)
    assert recipe.train.batch + (recipe.train.prior_batch or 0) >= 4  # images of a step, as the reference has


@pytest.mark.parametrize(
    ("density", "mean"),
    [(techniques.high, 2 / 3), (techniques.low, 1 / 3), (techniques.logit_normal, 0.5), (techniques.mode, 0.5)],
)
def test_densities_of_the_timestep_are_within_it_and_lean_as_they_say(density, mean):
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    value = density(u)
    assert value.min() >= 0 and value.max() <= 1 and value.mean().item() == pytest.approx(mean, abs=0.01)
    assert techniques.stratified(u[:4]).sort().values.tolist() == techniques.stratified(u[:4]).tolist()


def test_fewer_ranks_act_the_noisier_the_image(tiny_sd):
    recipe = load_recipe(None, ["train.methods=lora", "lora.rank=4", "class_word=dog", "token=zqv"])
    model = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)
    with techniques.masked_rank():
        methods.attach(model, recipe)
        ranks = []
        layer = next(m for name, m in model.unet.named_modules() if name.endswith("lora_A.default"))
        layer.register_forward_hook(lambda module, inputs, out: ranks.append((out.flatten(1, -2) != 0).any(1).sum(1).tolist()))
        cond = model.encode_prompts(["a dog"] * 3)
        model.predict(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), cond)
    assert ranks == [[4, 2, 1]]
