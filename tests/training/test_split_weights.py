"""Weights as bfloat16 and the bits it lacks: exact, trained as float32 ones are, and whole wherever they are kept."""

import shutil
import struct

import pytest
import torch
from engine_cases import StandIn, batch_of, engine_of, ran
from safetensors.torch import load_file
from screens import RecordingScreen

import personalize
from personalize import methods, models
from personalize.common import checkpoint, run_folder
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe
from personalize.core import bf16_split
from personalize.training import load_run, split_weights
from personalize.training.engine import Engine
from personalize.training.optimizer import clipped_step, gradient_norm, make_optimizer

SPLIT = ["train.methods=full", "train.masters=split"]
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -1e-45]
PATTERNS = [0x00008000, 0x80008000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0xBF808000, 0x7F7F8000, 0x007FFFFF, 0x80000001]


def test_every_number_comes_back_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2_000_000,), generator=g, dtype=torch.int64).to(torch.int32)
    known = [struct.unpack("<i", struct.pack("<I", pattern))[0] for pattern in PATTERNS]
    x = torch.cat([torch.tensor(SPECIAL), torch.tensor(known, dtype=torch.int32).view(torch.float32), bits.view(torch.float32)])
    high, low = bf16_split.split(x)
    back, real = bf16_split.join(high, low), ~x.isnan()
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16 and real.sum() > 1_900_000
    assert torch.equal(back[real].view(torch.int32), x[real].view(torch.int32))
    assert back[~real].isnan().all() and high[~real].isnan().all()
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[real & ~tie], x[real & ~tie].bfloat16())


def pair(shapes, apart):
    """The same weights in halves, chunked, and whole in float32; and optimizers of them."""
    g = torch.Generator().manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    whole[0].data = whole[0].data.contiguous(memory_format=torch.channels_last)
    halved = [torch.nn.Parameter(p.detach().bfloat16()) for p in whole]
    for p, q in zip(halved, whole, strict=True):
        bf16_split.add_low_half(p)
        bf16_split.set_master_weight(p, q.detach())
    groups = [{"params": halved[:3], "lr": 1e-2}, {"params": halved[3:], "lr": 1e-3}]
    return whole, halved, split_weights.SplitWeights(groups, small_apart=apart)


SHAPES = [(64, 32, 3, 3), (40,), (300, 70), (90, 80), (7,), (5000,)]


@pytest.mark.parametrize("chunk", [1 << 23, 10_000])
def test_masters_in_halves_are_float32_masters_bit_for_bit(monkeypatch, chunk):
    monkeypatch.setattr(split_weights, "CHUNK", chunk)
    settings = load_recipe(None, ["train.weight_decay=0.1"]).train
    whole, halved, kept = pair(SHAPES, apart=False)
    optimizer = make_optimizer(kept.groups, settings)
    plain = make_optimizer([{"params": whole[:3], "lr": 1e-2}, {"params": whole[3:], "lr": 1e-3}], settings)
    scaler, g = torch.amp.GradScaler("cpu", enabled=False), torch.Generator().manual_seed(1)
    for step in range(6):
        for p, q in zip(halved, whole, strict=True):
            p.grad = torch.randn(p.shape, generator=g).bfloat16()
            q.grad = torch.empty_like(q).copy_(p.grad)  # as autograd lays it out: the fused kernel reads memory in its order
        norm = gradient_norm(halved)
        torch.testing.assert_close(norm, gradient_norm(whole))
        limit = 0.0 if step < 2 else 1.0
        clipped_step(plain, scaler, norm=norm, limit=limit)
        for _ in kept.open_chunks():
            clipped_step(optimizer, scaler, norm=norm, limit=limit)
        for p, q in zip(halved, whole, strict=True):
            assert torch.equal(bf16_split.master_weight(p), q.detach()) and p.grad is None
            assert float((p.detach().float() - q.detach()).abs().max()) <= float(q.detach().abs().max()) / 256
    assert {c.master.numel() for c in kept.chunks} == {0}


@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit"])
def test_eight_bit_state_trains_them_as_it_trains_float32_ones(kind):
    settings = load_recipe(None, [f"train.optimizer={kind}"]).train
    whole, halved, kept = pair(SHAPES, apart=True)
    before = [p.detach().clone() for p in whole]
    optimizer = make_optimizer(kept.groups, settings)
    plain = make_optimizer([{"params": whole[:3], "lr": 1e-2}, {"params": whole[3:], "lr": 1e-3}], settings)
    scaler, g = torch.amp.GradScaler("cpu", enabled=False), torch.Generator().manual_seed(1)
    for _ in range(4):
        for p, q in zip(halved, whole, strict=True):
            p.grad = torch.randn(p.shape, generator=g).bfloat16()
            q.grad = torch.empty_like(q).copy_(p.grad)
        clipped_step(plain, scaler, norm=gradient_norm(whole), limit=0)
        for _ in kept.open_chunks():
            clipped_step(optimizer, scaler, norm=gradient_norm(halved), limit=0)
    for p, q, old in zip(halved, whole, before, strict=True):
        assert (bf16_split.master_weight(p) - q).norm() < 0.1 * (q - old).norm()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_run_in_halves_follows_the_run_in_float32(tiny_sd, kind):
    more = [f"train.optimizer={kind}", "train.lr=1e-4"]
    split, whole = (engine_of(tiny_sd, *way, *more, dtype="bfloat16") for way in (SPLIT, SPLIT[:1]))
    rows, truth = ran(split, steps=6), ran(whole, steps=6)
    torch.testing.assert_close(rows[0], truth[0], rtol=0.03, atol=3e-3)
    assert all(p.dtype == torch.bfloat16 for p in split.params)
    start = engine_of(tiny_sd, *SPLIT, dtype="bfloat16")
    ours, theirs = (torch.cat([bf16_split.master_weight(p).detach().flatten() for p in e.params]) for e in (split, whole))
    old = torch.cat([p.detach().float().flatten() for p in start.params])
    assert (ours - theirs).norm() < 0.2 * (theirs - old).norm()
    assert (ours != old).float().mean() > 0.9, "steps far smaller than bfloat16's spacing are not lost"


def test_what_is_kept_and_restored_is_whole(tiny_sd, tmp_path):
    engine = engine_of(tiny_sd, *SPLIT, dtype="bfloat16")
    ran(engine, steps=2)
    kept = {k: v.clone() for k, v in methods.state(engine.model, engine.recipe).items()}
    assert {v.dtype for v in kept.values()} == {torch.float32}
    assert any(not torch.equal(v, v.bfloat16().float()) for v in kept.values())
    other = engine_of(tiny_sd, *SPLIT, dtype="bfloat16")
    methods.restore(other.model, other.recipe, kept)
    for a, b in zip(engine.params, other.params, strict=True):
        assert torch.equal(a, b) and torch.equal(a.low, b.low)
    methods.save(engine.model, tmp_path, engine.recipe)
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[k], kept[f"full:unet.{k}"]) for k in saved) and len(saved) == len(kept)
    assert not any(hasattr(p, bf16_split.LOW) for p in engine.params)


def test_steps_in_halves_resume_bit_for_bit_and_can_be_captured(tiny_sd):
    once, captured = (engine_of(tiny_sd, *SPLIT, dtype="bfloat16") for _ in range(2))
    captured._run = captured.captured_by(StandIn())
    for step in range(6):
        if step == 3:
            again = engine_of(tiny_sd, *SPLIT, dtype="bfloat16")
            methods.restore(again.model, again.recipe, methods.state(once.model, once.recipe))
            tensors = checkpoint.optimizer_tensors(once.optimizer)
            checkpoint.restore_optimizer(again.optimizer, {k: v.clone() for k, v in tensors.items()})
        for engine in (once, captured, *([again] if step >= 3 else [])):
            engine.step(batch_of(engine, step), scale=0.5)
    for a, b, c in zip(once.params, again.params, captured.params, strict=True):
        assert torch.equal(bf16_split.master_weight(a), bf16_split.master_weight(b)) and torch.equal(
            bf16_split.master_weight(a), bf16_split.master_weight(c)
        )


@pytest.mark.parametrize(
    "more, dtype, why",
    [
        ([], torch.float32, "computes in float32; give dtype=bfloat16"),
        (["train.methods=lora"], torch.bfloat16, "lora trains few weights"),
        (["train.ema=0.9"], torch.bfloat16, "EMA needs whole weights"),
        (["train.accumulate=2"], torch.bfloat16, "the parts of a batch would add up in bfloat16"),
    ],
)
def test_where_halves_cannot_be_a_reason_is_given(more, dtype, why):
    recipe = load_recipe(None, ["train.masters=split", *more])
    with pytest.raises(UserError, match=why):
        methods.check_split_weights(recipe, dtype)
    methods.check_split_weights(load_recipe(None, ["train.masters=split"]), torch.bfloat16)
    methods.check_split_weights(load_recipe(None, more), dtype)


def test_a_checkpoint_of_halves_opens_in_a_float32_model(tiny_sd):
    engine = engine_of(tiny_sd, *SPLIT, dtype="bfloat16")
    ran(engine, steps=1)
    model = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)
    other = Engine(model, engine.recipe, methods.attach(model, engine.recipe))
    methods.restore(model, engine.recipe, methods.state(engine.model, engine.recipe))
    assert all(torch.equal(bf16_split.master_weight(a), b) for a, b in zip(engine.params, other.params, strict=True))


def test_a_whole_run_in_halves_leaves_float32_files_and_goes_on_from_a_checkpoint(tiny_sd, photos, tmp_path):
    settings = [*SPLIT, f"base={tiny_sd}", "device=cpu", "dtype=bfloat16", "class_word=dog", "token=zqv", "prior.count=0"]
    settings += ["train.lr=1e-4", "train.steps=3", "train.checkpoint_every=2", "train.engine=graph"]
    screen = RecordingScreen()

    def run(where):
        return personalize.train(photos, settings=settings, runs=where, screen=screen).folder

    folder = run(tmp_path / "once")
    assert "steps run eagerly, not as a CUDA graph: the device is cpu" in screen.lines
    saved = load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in saved.values()} == {torch.float32}
    assert sum(int((v != v.bfloat16().float()).sum()) for v in saved.values()) > 1000
    cut = tmp_path / "cut" / folder.name
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step-000003")
    run_folder.write_manifest(cut, run_folder.read_manifest(cut) | {"status": "interrupted"})
    assert run(tmp_path / "cut") == cut
    again = load_file(cut / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in saved.items())
    for at in ("", "last"):
        model = models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)
        load_run.load_run(model, folder, run_folder.read_manifest(folder), at=at)
        assert all(torch.equal(model.unet.state_dict()[k], v) for k, v in saved.items())
