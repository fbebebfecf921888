"""The count of memory and work: what fake tensors say is what real ones do, and what a process takes."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bases, memory
from personalize.common.checkpoint import load_state, save_state
from personalize.common.recipe import load_recipe
from personalize.common.recipe_sections import METHODS
from personalize.data.photos import load_photos
from personalize.data.subjects import Subject
from personalize.models import load_model
from personalize.training.memory import fake_networks
from personalize.training.memory.counter import RUNTIME, Counted, Counter, MemoryEstimate, counting
from personalize.training.memory.rehearsal import Rehearsal, rehearse

ROOT = Path(__file__).parents[2]
EXTRA = {"textual-inversion": ["token=<zqv>"], "custom-diffusion": ["token=<zqv>"]}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Else the warnings that these imports log are kept by pytest, with the frames and networks of who imported them."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401


def case(base, photos, *settings, device="cpu", dtype="float32"):
    """Recipe and subject of a run on four photos."""
    texts = [f"base={base}", "class_word=dog", "token=zqv", f"device={device}", f"dtype={dtype}", "prior.count=0", *settings]
    recipe = load_recipe(None, texts)
    return recipe, [Subject(recipe.token[0], "dog", load_photos(photos, min_size=32)[0][:4])]


def really(recipe, known) -> MemoryEstimate:
    """`rehearse` with real weights and real numbers."""
    counted, rehearsal = {}, Rehearsal(recipe, known)
    with Counter(recipe.device) as counter:
        for name, run in rehearsal.phases().items():
            counter.label = "weights" if name in ("load", "attach") else "activations"
            run(counter)
            if name == "load":  # the files' own storages, which torch does not make
                counter.see(p for m in (*rehearsal.model.networks.values(), rehearsal.model.vae) for p in m.parameters())
            gc.collect()
            counted[name] = counter.lap()
    return MemoryEstimate(recipe.device, counted)


def test_a_storage_is_counted_once_while_it_lives():
    with Counter() as counter:
        x = torch.zeros(1000)
        views = x.view(10, 100), x[5:], x.t()
        assert counter.now.total() == 4000
        y = x + 1
        del x
        assert counter.now.total() == 8000, "a view keeps its storage alive"
        del views
        assert counter.now.total() == 4000
        y.add_(1)
        counted = counter.lap()
    assert (counted.peak, counted.end) == (8000, 4000)


def test_the_parts_of_a_step_are_told_apart():
    with counting() as counter:
        layer = nn.Linear(100, 100, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        counter.watch(optimizer)
        counter.label = "activations"
        for _ in range(2):
            layer(torch.zeros(50, 100)).square().sum().backward()
            counter.lap()
            optimizer.step()
            counted = counter.lap()
            optimizer.zero_grad(set_to_none=True)
    assert counted.parts["weights"] == counted.parts["gradients"] == 40_000
    assert counted.parts["optimizer"] == 80_004, "two moments and the count of steps"


def test_a_kept_view_of_a_convolution_needs_its_kernels_copies():
    with counting() as counter:
        x, w = torch.zeros(1, 8, 16, 16), torch.zeros(4, 8, 3, 3)
        torch.conv2d(x, w, padding=1)
        counted = counter.lap()
    assert counted.peak == 2 * (x.nbytes + w.nbytes) + 4 * 16 * 16 * 4


def test_flops_are_torchs_own_and_attention_on_the_cpu_is_among_them():
    def run():
        q = torch.zeros(2, 4, 64, 16, requires_grad=True)
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        a = nn.functional.conv2d(torch.zeros(1, 8, 16, 16), torch.zeros(4, 8, 3, 3, requires_grad=True))
        (a.flatten(2) @ torch.zeros(196, 3)).sum().backward()

    with FlopCounterMode(display=False) as torchs:
        run()
    with counting() as counter:
        run()
    one = 2 * 2 * 4 * 64 * 64 * 16  # a product of attention: 2 forward, 5 backward
    assert counter.lap().work.flops == torchs.get_total_flops() + 7 * one


def test_numbers_that_are_asked_for_let_a_step_go_on():
    with counting():
        assert bool(torch.zeros(3).isfinite().all()) and int(torch.ones(3, dtype=torch.long).sum()) == 1
        assert torch.zeros(()).item() == 0.0, "no infinite gradient was found"


def test_a_fake_network_changes_its_type_and_what_it_takes():
    with counting() as counter:
        layer = nn.Linear(100, 100)
        kept = layer.weight
        layer.to(torch.bfloat16)
        assert layer.weight is kept and kept.dtype == torch.bfloat16
        assert counter.now.total() == 2 * 10_100


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ["train.text_encoder=true", "train.gradient_checkpointing=true", "train.batch=2", "train.accumulate=2"],
            marks=pytest.mark.slow,
        ),
        [
            "train.methods=[textual-inversion,lora]", "token=<zqv>", "train.ema=0.9", "train.gradient_checkpointing=true",
            "train.quantize=8bit",
        ],
        pytest.param(["train.methods=lora", "train.ema=0.9", "train.quantize=8bit"], marks=pytest.mark.slow),
        pytest.param(
            ["train.methods=textual-inversion", "token=<zqv>", "train.gradient_checkpointing=true"], marks=pytest.mark.slow
        ),
        ["train.methods=lora", "train.gradient_checkpointing=true", "train.offload=true"],
        pytest.param(["train.methods=lora", "train.quantize=4bit"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_fakes_take_is_what_real_tensors_take(tiny_sd, photos, settings):
    run = case(tiny_sd, photos, *settings)
    fake, real = rehearse(*run), really(*run)
    # torch cannot count bitsandbytes' 4-bit product, which is the one of 8 bits.
    counted = rehearse(*case(tiny_sd, photos, *settings[:-1], "train.quantize=8bit")) if "4bit" in settings[-1] else real
    for name in ("first", "step"):
        a, b = fake.phases[name], real.phases[name]
        for part in (a.parts | b.parts).keys() - {"weights"}:
            assert a.parts.get(part) == b.parts.get(part), (name, part)
        # bitsandbytes keeps tables beside its 4-bit weights, which are many beside so few
        assert a.peak == pytest.approx(b.peak, rel=0.02 if "4bit" in settings[-1] else 1e-3), name
        assert a.work.flops == counted.phases[name].work.flops > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_rehearsed(tiny_sd, photos, method):
    counted = rehearse(*case(tiny_sd, photos, f"train.methods={method}", *EXTRA.get(method, [])))
    assert counted.phases["step"].work.flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["train.text_encoder=true"],
        ["train.accumulate=2", "train.batch=2"],
        ["train.optimizer=adamw8bit"],
        ["train.optimizer=adafactor"],
        ["train.optimizer=lion8bit"],
        ["train.ema=0.99"],
        ["dtype=bfloat16"],
        ["photos.crop=random", "photos.flip=true"],
        ["prior.count=5"],
        ["prior.count=5", "prior.kind=predictions"],
        ["train.sample_every=10"],
        ["vae=tiled"],
        ["train.methods=lora", "train.quantize=8bit"],
        ["train.methods=lora", "train.quantize=4bit"],
    ],
    ids=" ".join,
)
def test_every_kind_of_run_can_be_rehearsed(tiny_sd, photos, settings):
    assert rehearse(*case(tiny_sd, photos, *settings)).peak > RUNTIME["cpu"]


def step(base, photos, *settings) -> Counted:
    return rehearse(*case(base, photos, *settings)).phases["step"]


def test_weights_of_a_mapped_file_take_memory_when_they_are_used():
    with counting() as counter:
        with counter.mapping():
            first, second = torch.zeros(1000), torch.zeros(1000)
        assert counter.now.total() == 0
        first.view(10, 100)
        assert counter.now.total() == 0, "a view reads nothing"
        first + 1
        assert counter.now.total() == 4000
        del second
        assert counter.lap().peak == 8000


@pytest.mark.slow
def test_what_saves_memory_is_seen_to_save_it(tiny_sd, photos):
    plain = step(tiny_sd, photos, "train.batch=4")
    again = step(tiny_sd, photos, "train.batch=4", "train.gradient_checkpointing=true")
    assert again.parts["activations"] < 0.8 * plain.parts["activations"] and again.work.flops > 1.1 * plain.work.flops
    parts = step(tiny_sd, photos, "train.batch=4", "train.accumulate=4")
    assert parts.parts["activations"] < 0.5 * plain.parts["activations"] and parts.work.flops == plain.work.flops
    assert step(tiny_sd, photos, "train.methods=lora").end < step(tiny_sd, photos).end / 2


@pytest.mark.slow
def test_blocks_that_wait_are_not_on_the_device_but_for_two(tiny_sdxl, photos):
    """On a CPU they are counted, under a name of their own; on a GPU only what is there."""
    settings = ["train.methods=lora", "train.gradient_checkpointing=true"]
    plain, apart = (step(tiny_sdxl, photos, *settings, f"train.offload={on}").parts for on in ("false", "true"))
    assert plain["weights"] == apart["weights"] + apart["waiting"] and apart["waiting"] > 0.8 * plain["weights"]
    model = load_model(str(tiny_sdxl), device="cpu", offload=True, say=lambda line: None)
    sizes = sorted(sum(p.nbytes for _, _, p in block) for block in model._offload.waiting)
    assert 0 <= apart["activations"] - plain["activations"] <= sum(sizes[-2:])


def test_each_quantized_layer_replaces_its_whole_one_in_memory(tiny_sd, photos):
    counted = rehearse(*case(tiny_sd, photos, "train.methods=lora", "train.quantize=8bit")).phases
    assert counted["attach"].peak <= counted["load"].end + 1e5, "not as much again as is quantized"


def test_saving_takes_no_more_than_one_tensor_on_the_device_and_a_rehearsal_moves_no_randomness(tiny_sd, photos):
    before = torch.get_rng_state()
    counted = rehearse(*case(tiny_sd, photos, "train.ema=0.9")).phases
    assert torch.equal(before, torch.get_rng_state())
    assert counted["save"].peak <= counted["step"].end + 2e5 and counted["save"].peak < counted["step"].peak


def test_a_checkpoint_is_written_tensor_by_tensor(tmp_path):
    """Weights in channels-last order would all be copied at once if the library wrote them."""
    weights = {str(k): torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last) for k in range(8)}
    with Counter() as counter:
        save_state(tmp_path / "state.safetensors", {"trained": weights}, 3)
    assert counter.lap().peak <= (len(weights) + 2) * weights["0"].nbytes  # the one that is written, and the next
    loaded, step = load_state(tmp_path / "state.safetensors")
    assert step == 3 and all(torch.equal(loaded["trained"][k], v) for k, v in weights.items())


def test_sampling_scoring_and_saving_are_phases(tiny_sd, photos):
    recipe, known = case(tiny_sd, photos, "choose.every=5", "train.sample_every=5", "draw.steps=2", "choose.count=1")
    counted = rehearse(recipe, known).phases
    assert list(counted) == ["load", "base", "attach", "cache", "first", "step", "save", "sample", "score"]
    encoders = 4 * (21_600_000 + 151_000_000)  # bytes of DINO ViT-S/16 and CLIP ViT-B/32, which stay
    assert encoders < counted["base"].end < 1.05 * encoders
    assert counted["sample"].end == pytest.approx(counted["step"].end, rel=1e-3), "the VAE and the text encoders are left there"


def test_an_outline_is_the_network_that_would_be_loaded(tiny_sd):
    from diffusers import UNet2DConditionModel

    with counting():
        fake = fake_networks.fake_network(UNet2DConditionModel, tiny_sd, "unet", torch.bfloat16)
        shapes = {k: (v.shape, v.dtype, v.requires_grad) for k, v in fake.named_parameters()}
    real = UNet2DConditionModel.from_pretrained(tiny_sd / "unet", torch_dtype=torch.bfloat16)
    assert shapes == {k: (v.shape, v.dtype, False) for k, v in real.named_parameters()}


def measured(base, *settings) -> int:
    """Peak bytes of a real run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "measure", str(base), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak of a process")
FULL_SIZE = {
    "LoRA": ["train.methods=lora"],
    "LoRA, checkpointing": ["train.methods=lora", "train.gradient_checkpointing=true"],
    "LoRA, checkpointing, offload": ["train.methods=lora", "train.gradient_checkpointing=true", "train.offload=true"],
    "full, 8-bit AdamW, checkpointing": ["train.optimizer=adamw8bit", "train.gradient_checkpointing=true"],
}


@pytest.mark.slow
@linux
@pytest.mark.parametrize("settings", [[], ["train.methods=lora"]], ids=["full and text encoder", "LoRA"])
def test_toyland_takes_what_was_estimated_within_20_percent(settings):
    estimated = rehearse(*memory.case("toyland", settings)).peak
    assert estimated == pytest.approx(measured("toyland", *settings), rel=0.2)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """Stable Diffusion 1.5 of random weights, 4.3 GB."""
    return bases.base("sd15", tmp_path_factory.mktemp("bases"))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("settings", FULL_SIZE.values(), ids=FULL_SIZE.keys())
def test_stable_diffusion_takes_what_was_estimated_within_20_percent(sd15, settings):
    assert rehearse(*memory.case(sd15, settings)).peak == pytest.approx(measured(sd15, *settings), rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", FULL_SIZE.values(), ids=FULL_SIZE.keys())
def test_a_gpu_takes_what_was_estimated_within_20_percent(sd15, settings, dtype):
    settings = [*settings, "device=cuda", f"dtype={dtype}"]
    assert rehearse(*memory.case(sd15, settings)).peak == pytest.approx(measured(sd15, *settings), rel=0.2)
