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
