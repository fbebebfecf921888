"""On a real card: captured and compiled steps are eager ones, nothing waits for the device, the kernels are torch's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, SHAPES, compare

from personalize import methods, models
from personalize.common.recipe import load_recipe
from personalize.data import training_set
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.models.kernels import group_norm
from personalize.training import cuda_graph
from personalize.training.engine import Engine, lr_factor

pytestmark = pytest.mark.gpu
PHOTOS = Path(__file__).parents[2] / "data_examples" / "dog"
COMMON = ["class_word=dog", "train.steps=20", "train.lr=1e-3", "train.warmup=4", "train.lr_schedule=linear", "train.batch=2"]


def prepared(folder, *more, dtype="float32"):
    model = models.load_model(str(folder), device="cuda", dtype=dtype, say=lambda line: None)
    recipe, said = load_recipe(None, [*COMMON, *more]), []
    known = [Subject("zqv", "dog", load_photos(PHOTOS, min_size=32)[0][:4])]
    torch.manual_seed(0)
    groups = methods.attach(model, recipe)
    data = training_set.build_training_set(model, recipe, known, priors={"dog": torch.randn(5, 4, 16, 16)}, text_trains=False)
    return data, Engine(model, recipe, groups, say=said.append), said


def ran(folder, *more, dtype="float32", steps=10):
    data, engine, said = prepared(folder, *more, dtype=dtype)
    rows = [engine.step(data.at(k), scale=lr_factor(engine.recipe, k)) for k in range(steps)]
    losses = torch.stack([torch.stack(list(row.values())) for row in rows]).cpu()
    return losses, torch.cat([p.detach().flatten() for p in engine.params]).cpu(), said


FULL, LORA = ["train.methods=full"], ["train.methods=lora"]


@pytest.mark.parametrize("more", [FULL, LORA, [*LORA, "train.gradient_checkpointing=true"]], ids=" ".join)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("how", ["graph", "compiled"])
def test_every_engine_gives_the_eager_losses(tiny_sd, more, dtype, tolerance, how):
    eager, ours = (ran(tiny_sd, *more, f"train.engine={e}", dtype=dtype) for e in ("eager", how))
    torch.testing.assert_close(ours[0], eager[0], rtol=tolerance, atol=tolerance / 10)
    assert (ours[1] - eager[1]).norm() < tolerance * eager[1].norm()
    assert not ours[2] if how == "graph" else ours[2][0].startswith("compiled in"), ours[2]


def test_steps_are_eager_unless_a_graph_is_asked_for(tiny_sd):
    _, engine, said = prepared(tiny_sd)
    assert engine._run == engine.update and not said
    _, engine, said = prepared(tiny_sd, "train.engine=graph")
    assert engine._run != engine.update and not said


def test_a_capture_that_fails_leaves_a_card_that_works(tiny_sd):
    """Reading a number back is not possible in a capture. The next allocation must not belong to the one that failed."""
    eager = ran(tiny_sd, "train.methods=lora")
    data, engine, said = prepared(tiny_sd, "train.methods=lora", "train.engine=graph")
    update, own, rows = engine.update, torch.cuda.current_stream(), []

    def waits(batch):
        out = update(batch)
        float(out.sum())
        return out

    engine.update = waits
    for step in range(10):
        rows.append(torch.stack(list(engine.step(data.at(step), scale=lr_factor(engine.recipe, step)).values())))
        assert torch.cuda.current_stream() == own
        torch.cuda.empty_cache()
    assert len(said) == 1 and said[0].startswith("steps run eagerly: this one cannot be a CUDA graph (")
    torch.testing.assert_close(torch.stack(rows).cpu(), eager[0], rtol=1e-3, atol=1e-4)
    assert len(torch.zeros(1000).pin_memory().cuda()) == 1000


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_no_step_waits_for_the_device(tiny_sd, how):
    data, engine, said = prepared(tiny_sd, f"train.engine={how}")
    for step in range(cuda_graph.WARM + 2):
        engine.step(data.at(step), scale=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(cuda_graph.WARM + 2, cuda_graph.WARM + 5):
            engine.step(data.at(step), scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not said


def test_memory_does_not_grow_with_steps(tiny_sd):
    data, engine, _ = prepared(tiny_sd)
    for step in range(8):
        engine.step(data.at(step), scale=1.0)
    before = torch.cuda.memory_allocated()
    for step in range(8, 18):
        engine.step(data.at(step), scale=1.0)
    assert torch.cuda.memory_allocated() <= before + 4096


def test_8_bit_adamw_leaves_weights_channels_last(tiny_sd):
    pytest.importorskip("bitsandbytes")
    data, engine, _ = prepared(tiny_sd, "train.methods=full", "train.optimizer=adamw8bit")
    strides, before = [p.stride() for p in engine.params], [p.detach().clone() for p in engine.params]
    assert any(not p.is_contiguous() for p in engine.params)
    engine.step(data.at(0), scale=1.0)
    assert strides == [p.stride() for p in engine.params]
    assert sum(not torch.equal(p, b) for p, b in zip(engine.params, before, strict=True)) > len(before) // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", ""])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 320, 64, 64, 32), (1, 2560, 8, 8, 32)], ids=str)
def test_the_kernel_is_torchs_operators_to_rounding(shape, dtype, silu):
    pytest.importorskip("triton")

    def fused(x, groups, weight, bias, eps, silu):
        assert group_norm.why_not_fused(x.cuda(), groups) == ""
        return group_norm.group_norm_silu(x.cuda(), groups, weight.cuda(), bias.cuda(), eps, silu=silu).cpu()

    compare(fused, shape, dtype, silu)


def test_without_a_c_compiler_a_base_draws_all_the_same(tiny_sd, tmp_path):
    """As in a slim image. Triton finds nothing in its cache, and no compiler."""
    pytest.importorskip("triton")
    code = f"""if True:
        import torch
        from personalize import models
        from personalize.generation import sampling
        said = []
        model = models.load_model({str(tiny_sd)!r}, device="cuda:0", say=said.append)
        z, t = torch.randn(2, 4, 16, 16, device=model.device), torch.ones(2, device=model.device)
        with torch.no_grad():
            assert model.predict(z, t, sampling.encode_texts(model, ["a dog"] * 2)).isfinite().all()
        print(*said, sep="\\n")
    """
    where = {**os.environ, "CC": str(tmp_path / "no_compiler"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "group norms run as torch's own operators, which are slower: Triton failed" in done.stdout


@pytest.mark.parametrize("more", [[], ["lora.conv=true"]], ids=["linear", "convolutions"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha", "boft"])
def test_a_fresh_adapter_is_the_identity_in_bfloat16(tiny_sd, kind, more):
    from personalize.generation import sampling

    def predicted(model):
        z, t = torch.ones(2, 4, 16, 16, device="cuda"), torch.tensor([10, 700], device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model.predict(z, t, sampling.encode_texts(model, ["a dog"] * 2)).float()

    model = models.load_model(str(tiny_sd), device="cuda", dtype="bfloat16", say=lambda line: None)
    bare = predicted(model)
    methods.attach(model, load_recipe(None, [*COMMON, f"train.methods={kind}", *more]))
    assert (predicted(model) - bare).norm() < 2e-3 * bare.norm()
