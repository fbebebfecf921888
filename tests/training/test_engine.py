"""Every way to run a step is the plain way: clipped, captured, compiled; what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engine_cases import COMMON, FULL, LORA, StandIn, batch_of, engine_of, ran, same
from torch import nn

from personalize import methods
from personalize.common import distributed
from personalize.common.recipe import load_recipe
from personalize.training import compile, cuda_graph, preflight
from personalize.training.engine import why_not_captured
from personalize.training.optimizer import clipped_step, gradient_norm, make_optimizer, set_learning_rates
from personalize.training.split_weights import flat

CHECKPOINTING = "train.gradient_checkpointing=true"


@pytest.mark.parametrize(
    "more", [[FULL], [LORA], [FULL, "train.snr_gamma=5", "train.accumulate=2"], [LORA, CHECKPOINTING]], ids=" ".join
)
@pytest.mark.parametrize("extras", [False, True], ids=["", "target and mask"])
def test_captured_steps_are_eager_ones_bit_for_bit(tiny_sd, more, extras):
    graphs, engine = StandIn(), engine_of(tiny_sd, *more)
    eager = ran(engine_of(tiny_sd, *more), extras=extras)
    assert same(ran(engine, engine.captured_by(graphs), extras=extras), eager)
    assert (graphs.warmed, graphs.captured, graphs.replayed) == (cuda_graph.WARM, 1, 5 - cuda_graph.WARM)
    assert len({float(norm) for norm in eager[0][:, 3]}) == 5, "each step's numbers are its own"


def test_each_shape_of_a_batch_is_a_graph_of_its_own(tiny_sd):
    graphs, engine, plain = StandIn(), engine_of(tiny_sd, FULL), engine_of(tiny_sd, FULL)
    engine._run = engine.captured_by(graphs)
    for k, subjects in enumerate((2, 2, 2, 1, 2, 1, 2, 1, 1)):
        rows = [e.step(batch_of(e, k, subjects=subjects), scale=1.0) for e in (engine, plain)]
        assert rows[0] == rows[1]
    assert graphs.warmed == 2 * cuda_graph.WARM and graphs.captured == 2 and graphs.replayed == 3
    assert all(torch.equal(a, b) for a, b in zip(engine.params, plain.params, strict=True))


def test_a_step_that_cannot_be_captured_is_eager_with_a_word(tiny_sd):
    said = []
    engine = engine_of(tiny_sd, FULL, said=said)
    assert same(ran(engine, engine.captured_by(StandIn("no such thing\nat all"))), ran(engine_of(tiny_sd, FULL)))
    assert said == ["steps run eagerly: this one cannot be a CUDA graph (no such thing)"]


class Streams:
    """torch.cuda's streams and graphs without a GPU: only which stream is current, and captures that fail as `fails` says."""

    def __init__(self, monkeypatch, fails):
        self.fails, self.current, self.pools = fails, self.stream(), []
        stands_in = {
            "Stream": self.stream, "current_stream": lambda device=None: self.current, "set_stream": self.set_stream,
            "current_device": lambda: 0, "_get_device_index": lambda *arguments: 0, "synchronize": lambda: None,
            "empty_cache": lambda: None, "CUDAGraph": lambda: self, "graph_pool_handle": lambda: (0, 1),
        }  # fmt: skip
        for name, function in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, function)
        for name, function in {"_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": self.end_pool}.items():
            monkeypatch.setattr(torch._C, name, function, raising=False)

    def stream(self):
        return SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.current = stream

    def capture_begin(self, pool, **options):
        self.pools.append(pool)
        if self.fails == "begin":
            raise RuntimeError("no such thing\nat all")

    def capture_end(self):
        if self.fails != "inside":
            self.pools.clear()
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def end_pool(self, device, pool):
        if not self.pools:
            raise RuntimeError("not currently recording to mempool_id")
        self.pools.remove(pool)


@pytest.mark.parametrize(
    "fails, why", [("begin", "no such thing"), ("inside", "not this one"), ("end", "operation failed due")]
)
def test_a_capture_that_fails_leaves_the_stream_as_it_was_and_steps_run_eagerly(tiny_sd, monkeypatch, fails, why):
    plain, said = ran(engine_of(tiny_sd, FULL)), []
    engine, cuda = engine_of(tiny_sd, FULL, said=said), Streams(monkeypatch, fails)
    main, captures = cuda.current, []
    graphs, update = cuda_graph.CudaGraphs(), engine.update

    def step(batch):
        captures.append(bool(cuda.pools))
        if cuda.pools and fails == "inside":
            raise RuntimeError("not this one")
        return update(batch) if not cuda.pools else torch.zeros(4)  # a capture computes nothing

    engine.update = step
    assert same(ran(engine, engine.captured_by(graphs)), plain)
    assert cuda.current is main and not cuda.pools, "the next allocation would belong to a capture that is over"
    assert len(said) == 1 and said[0].startswith(f"steps run eagerly: this one cannot be a CUDA graph ({why}")
    assert captures.count(True) == (0 if fails == "begin" else 1) and captures.count(False) == 5


def test_values_of_a_step_are_not_those_of_the_next(tiny_sd):
    engine = engine_of(tiny_sd, FULL)
    engine._run = engine.captured_by(StandIn())
    kept = [engine.step(batch_of(engine, k), scale=1.0)["loss"] for k in range(6)]
    assert len({float(loss) for loss in kept}) == 6, "a log reads them ten steps later"


@pytest.mark.parametrize(
    "more, why",
    [
        ([], ""),
        (["train.accumulate=2", "photos.crop=random", "train.ema=0.9"], ""),
        (["train.optimizer=adamw8bit"], "8-bit AdamW"),
        (["train.gradient_checkpointing=true"], ""),
        (["train.gradient_checkpointing=true", "dropout"], "gradient checkpointing with dropout"),
        (["train.text_encoder=true"], "text is encoded at each step"),
        ([LORA, "train.quantize=8bit"], "a quantized base"),
        (["float16"], "float16 loss scaling"),
        (["two"], "several processes"),
    ],
)
def test_what_cannot_be_one_cuda_graph_is_said(tiny_sd, monkeypatch, more, why):
    if "two" in more:
        monkeypatch.setenv("WORLD_SIZE", "2")
    engine = engine_of(tiny_sd, *(text for text in more if "=" in text), dtype="bfloat16")
    assert why_not_captured(engine.model, engine.recipe, engine.groups) == "the device is cpu"
    engine.model.device = torch.device("cuda")
    for module in engine.model.unet.modules():
        if isinstance(module, nn.Dropout) and "dropout" in more:
            module.p = 0.1
    engine.model.dtype = torch.float16 if "float16" in more else torch.bfloat16
    found = why_not_captured(engine.model, engine.recipe, engine.groups)
    assert found.startswith(why) if why else found == ""


def test_a_graph_on_the_cpu_is_an_eager_step_with_a_word(tiny_sd):
    said = []
    assert same(ran(engine_of(tiny_sd, LORA, "train.engine=graph", said=said)), ran(engine_of(tiny_sd, LORA)))
    assert said == ["steps run eagerly, not as a CUDA graph: the device is cpu"]
    engine_of(tiny_sd, LORA, said=(auto := []))
    assert auto == []


def test_compiled_steps_are_eager_ones_to_rounding_and_say_when_they_pay(tiny_sd, monkeypatch):
    monkeypatch.setattr(compile, "BACKEND", "eager")
    said, steps = [], compile.EAGER + compile.WARM + compile.TIMED
    ours = ran(engine_of(tiny_sd, FULL, "train.engine=compiled", said=said), steps=steps)
    plain = ran(engine_of(tiny_sd, FULL), steps=steps)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=1e-5)
    apart = max(float((a - b).abs().max()) for a, b in zip(ours[1], plain[1], strict=True))
    assert apart < 1e-3  # Adam's first steps are signs: where a gradient is almost nothing, rounding decides
    assert len(said) == 1 and said[0].startswith("compiled in ") and " s: " in said[0]


def test_a_compiler_that_fails_leaves_eager_steps(tiny_sd, monkeypatch):
    def fails(*arguments, **named):
        raise NotImplementedError("not for this network")

    monkeypatch.setattr(compile, "BACKEND", fails)
    said = []
    assert same(ran(engine_of(tiny_sd, LORA, "train.engine=compiled", said=said)), ran(engine_of(tiny_sd, LORA)))
    assert len(said) == 1 and said[0].startswith("steps run eagerly: the compiler failed (")


@pytest.mark.parametrize(
    "seconds, words",
    [
        (
            [9, 0.03, 8, 0.2, 0.02, 0.02, 0.02],
            "compiled in 8.2 s: 30.0 ms a step became 20.0, which pays after 816 steps of 1000",
        ),
        ([9, 0.03, 18, 0.2, 0.02, 0.02, 0.02], "pays after 1816 steps of 1000; train.engine=eager is faster here"),
        ([9, 0.03, 8, 0.2, 0.04, 0.04, 0.04], "30.0 ms a step became 40.0, which never pays: train.engine=eager"),
    ],
)
def test_the_break_even_is_cost_over_gain(seconds, words):
    compiling = compile.CompiledStep.__new__(compile.CompiledStep)
    compiling.seconds, compiling.steps = seconds, 1000
    assert words in compiling.words()


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((70, 60), (5,), (64, 9, 9))]


def groups_of(params):
    return [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "lr": 3e-3}]


def give(params, step, size=1.0):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = size * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("half", [False, True], ids=["", "loss scaling"])
def test_the_clip_is_torchs_own(kind, half):
    train = load_recipe(None, [f"train.optimizer={kind}"]).train
    ours, plain = weights(), weights()
    optimizer, other = (make_optimizer(groups_of(params), train) for params in (ours, plain))
    scalers = [torch.amp.GradScaler("cpu", enabled=half, init_scale=8.0) for _ in range(2)]
    for step, size in enumerate((1e-3, 1.0, 50.0, float("inf") if half else 3.0, 0.1)):
        for params, one, scaler in ((ours, optimizer, scalers[0]), (plain, other, scalers[1])):
            scaler.scale(torch.ones(()))  # a scaler begins with the first loss
            give(params, step, size * (8.0 if half else 1.0))
            scaler.unscale_(one)
        set_learning_rates(optimizer, 0.5 + 0.1 * step)
        set_learning_rates(other, 0.5 + 0.1 * step)
        norm = gradient_norm(ours)
        clipped_step(optimizer, scalers[0], norm=norm, limit=2.0)
        expected = torch.nn.utils.clip_grad_norm_(plain, 2.0, foreach=True)
        scalers[1].step(other)
        scalers[1].update()
        torch.testing.assert_close(norm, expected, equal_nan=True)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 if kind == "adamw" else 1e-4)
    assert all(p.isfinite().all() for p in ours)


def test_a_clip_that_is_not_reached_changes_no_bit(tiny_sd):
    loose, none = (ran(engine_of(tiny_sd, FULL, f"train.clip={clip}")) for clip in (1e6, 0))
    assert same(loose, none)
    assert not same(ran(engine_of(tiny_sd, FULL)), none)


def test_rates_are_each_groups_own():
    train = load_recipe(None, []).train
    optimizer = make_optimizer(groups_of(weights()), train)
    assert set_learning_rates(optimizer, 0.25) == 0.25e-2
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.25e-2, 0.75e-3])


FAULTS = """
import resource, sys
import torch
from personalize.common import malloc
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert malloc.keep_freed_memory(10_000_000)
def step():
    rows = [torch.ones(300_000) for _ in range(12)]
    return sum(row.sum() for row in rows)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_freed_memory_that_is_kept_costs_no_page_faults_at_each_step():
    runs = {
        way: subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout
        for way in ("kept", "as it is")
    }
    kept, plain = (float(runs[way]) for way in ("kept", "as it is"))
    assert plain > 20 * max(kept, 1), runs  # a ratio: how many are left at all is the machine's


def test_a_large_base_keeps_no_freed_memory():
    from personalize.common import malloc

    assert not malloc.keep_freed_memory(10**9)


def test_a_restored_optimizer_has_the_layout_of_its_weights(tmp_path):
    """Weights with the channels last, as on a GPU: a fused step would read momenta of another order."""
    from personalize.common import checkpoint

    def stepped(steps, file=None):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4 * 3 * 9).view(4, 3, 3, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
        if file:
            parts, _ = checkpoint.load_state(file)
            p.data.copy_(parts["trained"]["p"])
            checkpoint.restore_optimizer(optimizer, parts["optimizer"])
        for step in steps:
            p.grad = torch.sin(torch.arange(p.numel()) * (step + 1.0)).view(p.shape).to(memory_format=torch.channels_last)
            optimizer.step()
        return p, optimizer

    whole, _ = stepped(range(4))
    p, optimizer = stepped(range(2))
    checkpoint.save_state(tmp_path / "state", {"trained": {"p": p}, "optimizer": checkpoint.optimizer_tensors(optimizer)}, 2)
    assert torch.equal(stepped(range(2, 4), tmp_path / "state")[0], whole)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_channels_last_weights_stay_so_and_are_those_of_the_same_numbers_in_a_row(kind):
    g = torch.Generator().manual_seed(0)
    settings = load_recipe(None, [f"train.optimizer={kind}", "train.weight_decay=0.1"]).train
    shapes = [(64, 32, 3, 3), (8, 4, 3, 3), (40,)]  # bitsandbytes keeps the state of the second in 32 bits
    last = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    for p in last[:2]:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    row = [nn.Parameter(flat(p).clone()) for p in last]
    optimizers = [make_optimizer([{"params": params, "lr": 1e-2}], settings) for params in (last, row)]
    for step in range(3):
        for p, q in zip(last, row, strict=True):
            grad = torch.randn(p.shape, generator=g)
            p.grad = grad if step == 1 else torch.empty_like(p).copy_(grad)  # of another layout, and of its own
            q.grad = flat(torch.empty_like(p).copy_(grad)).clone()
        if kind == "adamw" and step == 1:  # torch's fused kernel asks for the same layout, which autograd gives
            last[0].grad, last[1].grad = (torch.empty_like(p).copy_(p.grad) for p in last[:2])
        for optimizer in optimizers:
            set_learning_rates(optimizer, 1.0)
            optimizer.step()
    assert all(p.is_contiguous(memory_format=torch.channels_last) and p.shape == s for p, s in zip(last[:2], shapes))
    for p, q in zip(last, row, strict=True):
        assert torch.equal(flat(p), q) and p.grad.shape == p.shape


def test_a_process_without_rows_takes_a_float16_step_like_the_others(tiny_sd, monkeypatch):
    """Its scaler has scaled nothing, and would refuse to unscale the gradients that the others sent."""
    engine = engine_of(tiny_sd, FULL)
    engine.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    batch, before = batch_of(engine, 0), [p.detach().clone() for p in engine.params]
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "0")
    assert distributed.local_rows(len(batch.z0)) == slice(0, 0)

    def sum_gradients(params):
        for p in params:
            p.grad = torch.full_like(p, 8.0)

    monkeypatch.setattr(distributed, "sum_gradients", sum_gradients)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    engine.step(batch, scale=1.0)
    assert all(not torch.equal(p, b) for p, b in zip(engine.params, before, strict=True))
    assert engine.scaler.get_scale() == 8.0


@pytest.mark.parametrize(
    "library, dropout", [(False, 0.0), (True, 0.0), (True, 0.1)], ids=["own forward", "the library's", "dropout"]
)
def test_recomputed_blocks_keep_no_generators_state_unless_there_is_dropout(tiny_sd, monkeypatch, library, dropout):
    """Reading a CUDA generator's state fails in a capture. With dropout both passes must draw the same."""
    engine = engine_of(tiny_sd, FULL)
    engine.model.uses_fast_unet = not library
    for module in engine.model.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    read, own = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or own())
    gradients = {}
    for checkpointing in (False, True):
        recipe = load_recipe(None, [*COMMON, FULL, f"train.gradient_checkpointing={str(checkpointing).lower()}"])
        params = [p for group in methods.attach(engine.model, recipe) for p in group["params"]]
        torch.manual_seed(0)
        engine.backward(batch_of(engine, 0))
        gradients[checkpointing] = [p.grad.clone() for p in params]
        engine.clear()
    for plain, again in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    assert bool(read) == bool(dropout)


def told_in_order(monkeypatch):
    told, lines = [], iter(range(9))
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: told.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_000_000_000)
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, unet=nn.Linear(2, 2), inpaints=False)
    recipe = load_recipe(None, [LORA])
    data = SimpleNamespace(
        model=model, recipe=recipe, at=lambda step: next(lines), photos=[0], prompts=["a"], steps_per_batch=(1, 0), prior=None,
        largest_step=0,
        cut_mix=None,
    )  # fmt: skip
    engine = SimpleNamespace(backward=lambda batch: told.append("step"), clear=lambda: None, params=[torch.zeros(4)])
    return told, data, engine


def test_the_peak_of_a_measured_step_is_the_steps_own(monkeypatch):
    told, data, engine = told_in_order(monkeypatch)
    assert preflight.describe_run(data, engine)[-1].endswith("and 2.0 GB, by one measured step")
    assert told[:2] == ["reset_peak_memory_stats", "step"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the kernel's peak of a process")
def test_on_the_cpu_too_and_a_peak_that_cannot_be_reset_is_said(monkeypatch):
    _, data, engine = told_in_order(monkeypatch)
    data.model.device = torch.device("cpu")
    assert preflight.reset_peak(data.model.device)
    before = preflight.peak_bytes(data.model.device)
    large = torch.ones(50_000_000)
    del large
    assert preflight.describe_run(data, engine)[-1].endswith(" GB, by one measured step")
    freed = preflight.peak_bytes(data.model.device)
    assert freed < before + 50_000_000, "200 MB that are free again before the step are not the step's"
    monkeypatch.setattr(preflight.Path, "write_text", lambda path, text: (_ for _ in ()).throw(PermissionError(path)))
    last = preflight.describe_run(data, engine)[-1]
    assert " and at most " in last and last.endswith("process's peak so far, which cannot be reset here")
    large = torch.ones(50_000_000)
    assert preflight.peak_bytes(data.model.device) > freed + 100_000_000, "what a later step takes is told"
    assert len(large) == 50_000_000
