"""Adapters on a base in 8 or 4 bits."""

import subprocess
import sys

import pytest
import torch
from method_cases import NOISE, QUANTIZED, attached, base, battery, drawn, learned, one_batch, predicted, read, saved

from personalize import methods
from personalize.common.errors import UserError
from personalize.methods.quantization import quantize

# relative error of the U-Net's output against the unquantized base, root mean square
BOUND = {"8bit": 0.01, "4bit": 0.08}


@pytest.mark.parametrize("how", BOUND)
def test_a_quantized_base_says_nearly_what_the_base_says(tiny_sd, how):
    model = base(tiny_sd)
    plain = predicted(model, ["a red hat", "a dog"])
    quantize(model.unet, how)
    swapped = [m for m in model.unet.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert len(swapped) == 40 and not any(p.requires_grad for m in swapped for p in m.parameters())
    for train in (False, True):
        model.unet.train(train)
        with torch.no_grad():
            now = model.predict(NOISE, torch.tensor([40, 700]), model.encode_prompts(["a red hat", "a dog"]))
        error = ((now - plain).square().mean() / plain.square().mean()).sqrt()
        assert 1e-4 < error < BOUND[how], error


@battery(QUANTIZED)
def test_drawing_between_steps_does_not_change_training_of_a_quantized_base(folder, case):
    """bitsandbytes repacks weights when it draws on some CPUs, and then gives no gradients."""
    model, recipe = base(folder), case.recipe()
    engine, batch = attached(model, recipe), one_batch(model, case)
    engine.step(batch, scale=1.0)
    drawn(model, case)
    model.unet.train()
    engine.step(batch, scale=1.0)
    kept = learned(folder, case).kept[2][0]
    assert all(torch.equal(v, kept[k]) for k, v in methods.state(model, recipe).items())


@battery([case for case in QUANTIZED if case.methods == ("lora",)])
def test_what_a_quantized_base_taught_works_on_the_plain_one(folder, case, tmp_path):
    recipe, plain = saved(folder, case, tmp_path), base(folder)
    methods.load(plain, tmp_path, recipe)
    bare = predicted(read(folder, "float32"), case.prompts()[:2])
    there, here = (predicted(m, case.prompts()[:2]) - bare for m in (learned(folder, case).model, plain))
    assert here.abs().max() > 0.01
    assert torch.nn.functional.cosine_similarity(there.flatten(), here.flatten(), dim=0) > 0.7


def test_without_bitsandbytes_the_error_says_how_to_get_it(tiny_sd, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        attached(base(tiny_sd), QUANTIZED[0].recipe())


PLAIN_THEN_QUANTIZED = """
import sys
from personalize import methods, models
from personalize.common.recipe import load_recipe
def adapted(*more):
    model = models.load_model(sys.argv[1], device="cpu", dtype="float32", say=lambda line: None)
    recipe = load_recipe(None, ["train.methods=lora", "class_word=dog", "token=zqv", *more])
    methods.attach(model, recipe)
    return {type(m).__name__ for m in model.unet.modules() if hasattr(m, "lora_A")}
assert adapted() == {"Linear"} and not {"bitsandbytes", "torch._inductor"} & sys.modules.keys()
assert "Linear8bitLt" in adapted("train.quantize=8bit"), "what PEFT did not find before is kept"
"""


@pytest.mark.slow
def test_an_adapter_imports_bitsandbytes_and_the_compiler_only_for_a_quantized_base(tiny_sd):
    subprocess.run([sys.executable, "-c", PLAIN_THEN_QUANTIZED, str(tiny_sd)], check=True)
