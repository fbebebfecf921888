"""`train --profile`: what it finds adds up, and the run does not know of it."""

import gzip
import hashlib
import json
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import personalize
from personalize.cli import app
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.common.terminal import Terminal
from personalize.training import compile, profiler
from personalize.training.profile_page import Profile, Row, kind_of, operators, page, words
from personalize.training.profiler import (
    BACKWARD,
    BATCH,
    FORWARD,
    LOSS,
    PARTS,
    REST,
    STEP,
    TEXTS,
    UPDATE,
    WHOLE,
    Mark,
    split,
    windows,
)

COMMON = ["class_word=dog", "device=cpu", "prior.count=0", "train.methods=lora", "train.lr=1e-2", "train.steps=9"]
RUN = ["checkpoints/step-000009/state.safetensors", "log.jsonl", "manifest.json", "model/pytorch_lora_weights.safetensors"]
RUN += ["photos.png", "recipe.toml"]


class Screen(Terminal):
    """Keeps what is said, and stops the process after a step."""

    def __init__(self, stops_after=0):
        super().__init__(quiet=True)
        self.lines, self.stops_after = [], stops_after

    def say(self, line):
        self.lines.append(line)

    @contextmanager
    def progress(self, what, total, *, done=0, unit=""):
        step = done

        def advance(n=1, note=""):
            nonlocal step
            step += n
            if step == self.stops_after:
                os.kill(os.getpid(), signal.SIGTERM)

        yield advance


@pytest.fixture
def train(tiny_sd, photos, tmp_path):
    """Trains into a folder -> the run's folder, what was said."""

    def call(runs, *more, profile, screen=None):
        screen, settings = screen or Screen(), [f"base={tiny_sd}", *COMMON, *more]
        result = personalize.train(photos, settings=settings, runs=tmp_path / runs, profile=profile, screen=screen)
        return result.folder, screen.lines

    return call


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bits(folder):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder) if name.endswith("safetensors")]


@pytest.mark.parametrize(
    "more",
    [[], ["train.methods=full", "train.text_encoder=true", "train.accumulate=2", "train.batch=2", "train.ema=0.9"]],
    ids=["lora", "full, text encoder, parts, average"],
)
def test_a_run_is_the_same_bit_for_bit_with_and_without_a_profile(train, more):
    plain, _ = train("plain", *more, profile=False)
    profiled, _ = train("profiled", *more, profile=True)
    assert bits(plain) == bits(profiled) and len(bits(plain)) >= 2
    names = ("loss", "subject", "prior", "norm", "lr")
    rows = [
        [[row[name] for name in names] for row in run_folder.read_jsonl(folder / "log.jsonl")] for folder in (plain, profiled)
    ]
    assert rows[0] == rows[1]
    assert run_folder.read_manifest(plain)["identity"] == run_folder.read_manifest(profiled)["identity"]


def test_a_profile_is_a_page_and_a_trace_in_the_run_and_the_same_command_without_it_finds_the_run(train):
    folder, said = train("runs", profile=True)
    assert files(folder) == sorted([*RUN, "profile/profile.md", "profile/trace.json"])
    text = (folder / "profile" / "profile.md").read_text()
    for part in (BATCH, FORWARD, LOSS, BACKWARD, UPDATE, REST, "convolution", "matrix products", "attention", "normalization"):
        assert f"\n| {part} | " in text
    assert WHOLE not in text and "GFLOP" in text and "float32 on cpu, 1 threads" in text
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"personalize: forward", "personalize: backward", "personalize: step", "aten::convolution_backward"} <= names
    first = next(i for i, line in enumerate(said) if line.startswith("where the "))
    assert [line.split("  ")[1] for line in said[first + 1 :]] == [BATCH, FORWARD, LOSS, BACKWARD, UPDATE, REST]
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for profile, tail in ((False, 0), (True, 1)):
        again, said = train("runs", profile=profile)
        assert again == folder and {name: (folder / name).read_bytes() for name in files(folder)} == before
        assert said[-1 - tail] == f"this run is finished: {folder}"
    assert said[-1].startswith("nothing was trained, so nothing was profiled")


def test_a_compiled_step_has_its_parts_too(train, monkeypatch):
    monkeypatch.setattr(compile, "BACKEND", "eager")
    folder, said = train("runs", "train.engine=compiled", "train.steps=32", profile=True)
    first = next(i for i, line in enumerate(said) if line.startswith("where the "))
    assert [line.split("  ")[1] for line in said[first + 1 :]] == [BATCH, FORWARD, BACKWARD, UPDATE, REST]


def test_a_large_trace_is_compressed_and_takes_the_place_of_an_older_one(train, monkeypatch):
    with pytest.raises(Interrupted):
        train("runs", profile=True, screen=Screen(stops_after=1))
    monkeypatch.setattr(profiler, "LARGE", 1000)
    folder, said = train("runs", profile=True)
    assert any("going on with" in line for line in said)
    assert [name for name in files(folder) if "profile" in name] == ["profile/profile.md", "profile/trace.json.gz"]
    assert json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]


@pytest.mark.parametrize("after", [2, 3, 5], ids=["warming up", "tracing", "clocking"])
def test_a_stop_in_any_window_leaves_no_mark_and_no_profile(train, after):
    backward = torch.autograd.backward
    with pytest.raises(Interrupted, match=f"stopped at step {after} of 9"):
        train("cut", profile=True, screen=Screen(stops_after=after))
    assert torch.autograd.backward is backward
    whole, _ = train("whole", profile=False)
    folder, _ = train("cut", profile=True)
    assert bits(folder)[-1] == bits(whole)[-1]
    profiled = (folder / "profile").exists()
    assert profiled == (9 - after >= profiler.LEAST)


def test_a_rest_too_short_to_profile_is_said(train):
    with pytest.raises(Interrupted):
        train("runs", profile=False, screen=Screen(stops_after=7))
    folder, said = train("runs", profile=True)
    assert "not profiled: 2 steps are left, and it takes 4 at least" in said and not (folder / "profile").exists()


def test_too_few_steps_are_refused_before_a_class_picture_is_drawn(tiny_sd, photos, tmp_path):
    settings = [*COMMON, f"base={tiny_sd}", "prior.count=2", "train.steps=3"]
    with pytest.raises(UserError, match="train.steps = 3 is too few to profile, which takes 4 at least"):
        personalize.train(photos, settings=settings, runs=tmp_path / "runs", priors=tmp_path / "priors", profile=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [False, True])
def test_the_option_reaches_the_run_and_is_no_setting(monkeypatch, asked):
    seen, result = {}, SimpleNamespace(folder="f", steps=1, seconds=1)
    monkeypatch.setattr("personalize.commands.train.train", lambda photos, **options: seen.update(options) or result)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr("sys.argv", ["personalize", "train", "photos", "--class", "dog", *["--profile"] * asked])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code and seen["profile"] is asked
    assert not any("profile" in text for text in seen["settings"])


@pytest.mark.parametrize(("steps", "expected"), [(4, (1, 1, 1)), (9, (2, 2, 2)), (32, (7, 5, 8)), (800, (7, 5, 8))])
def test_of_many_steps_the_eighth_to_the_twelfth_are_traced_and_some_are_always_left_alone(steps, expected):
    assert windows(steps) == expected and sum(windows(steps)) < steps


def test_parts_add_up_to_the_step_and_what_is_not_marked_lies_between_marks():
    marks = [Mark(BATCH, 1, 3), Mark(TEXTS, 5, 6), Mark(FORWARD, 6, 10), Mark(BACKWARD, 11, 20)]
    marks += [Mark(FORWARD, 22, 26), Mark(BACKWARD, 28, 36), Mark(STEP, 4, 40)]
    drawn = [Mark(FORWARD, 42, 49)]  # pictures between two steps
    parts = split(marks + drawn, 0, 50)
    assert list(parts) == list(PARTS) and sum(parts.values()) == 50
    assert parts == {BATCH: 2, FORWARD: 9, LOSS: 3, BACKWARD: 17, UPDATE: 4, WHOLE: 0, REST: 15}
    unmarked = split([Mark(BATCH, 1, 3), Mark(TEXTS, 5, 6), Mark(BACKWARD, 11, 20), Mark(STEP, 4, 40)], 0, 50)
    assert unmarked == dict.fromkeys(PARTS, 0) | {BATCH: 2, FORWARD: 6, BACKWARD: 9, UPDATE: 20, REST: 13}
    replayed = split([Mark(BATCH, 1, 3), Mark(STEP, 4, 40)], 0, 50)
    assert replayed == dict.fromkeys(PARTS, 0) | {BATCH: 2, WHOLE: 36, REST: 12}


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "convolution": [
            "aten::mkldnn_convolution", "ConvolutionBackward0", "aten::_slow_conv2d_forward",
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
            "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>",
        ],
        "matrix products": [
            "aten::mm", "aten::addmm", "aten::baddbmm", "AddmmBackward0", "aten::linear", "nvjet_tst_128x256_64x4_2x1_v_bz_TNT",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>",
        ],
        "attention": [
            "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention", "fmha_cutlassF_bf16",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
        ],
        "normalization": [
            "aten::native_group_norm", "NativeLayerNormBackward0", "RowwiseMomentsCUDAKernel", "_group_norm_silu",
        ],
        "clip and optimizer": [
            "aten::_fused_adamw_", "aten::_foreach_norm", "aten::linalg_vector_norm", "multi_tensor_apply_kernel",
            "torch::autograd::AccumulateGrad",
        ],
        "copies and views": [
            "aten::copy_", "Memcpy HtoD (Pageable -> Device)", "aten::t", "aten::to", "aten::cat", "aten::view",
            "aten::upsample_nearest2d", "aten::upsample_bilinear2d", "TBackward0",
        ],
        "element-wise": [
            "aten::silu", "aten::gelu_backward", "aten::add_", "aten::tanh", "aten::mean",
            "void at::native::vectorized_elementwise_kernel<4>",
        ],
        "other": ["cudaGraphLaunch", "aten::item"],
    }.items(),
)  # fmt: skip
def test_operators_and_kernels_have_a_kind_in_words(kind, names):
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def event(name, us, *, parent=None, device="CPU", annotation=False):
    """As torch's profiler has them."""
    return SimpleNamespace(
        name=name, self_cpu_time_total=us, time_range=SimpleNamespace(elapsed_us=lambda: us), cpu_parent=parent,
        device_type=SimpleNamespace(name=device), is_user_annotation=annotation,
    )  # fmt: skip


def test_an_operator_that_calls_its_own_kind_is_one_call_and_annotations_are_none():
    step = event("personalize: step", 500, annotation=True)
    outer = event("aten::conv2d", 10, parent=step)
    inner = event("aten::mkldnn_convolution", 90, parent=outer)
    copy = event("aten::copy_", 20, parent=inner)
    kernel = event("void cutlass::Kernel2", 900, device="CUDA")
    shadow = event("personalize: step", 999, device="CUDA")
    events = [step, outer, inner, copy, kernel, shadow]
    rows = operators(events, 2, on_gpu=False)
    assert rows == [
        Row("convolution", pytest.approx(50e-6), 0.5, "aten::mkldnn_convolution"),
        Row("copies and views", pytest.approx(10e-6), 0.5, "aten::copy_"),
    ]
    assert operators(events, 2, on_gpu=True) == [Row("matrix products", pytest.approx(450e-6), 0.5, "void cutlass::Kernel2")]


def test_the_page_says_how_much_of_the_step_and_of_the_machine_each_thing_is():
    found = Profile(
        0.020, {FORWARD: 0.005, BACKWARD: 0.015}, 0.040, [Row("convolution", 0.030, 7, "aten::conv2d")],
        windows=windows(40), free=24, flops=4 * 10**12, ceiling=8e14, on_gpu=True,
    )  # fmt: skip
    text = page(found, "About.", "trace.json")
    for line in (
        "**20.0 ms a step**, the median of 24 steps that nothing measured.",
        "Forward and backward are 4 TFLOP: 200 TFLOP/s, 25% of the 800 TFLOP/s of a large matrix product here.",
        "| backward | 15.00 | 75.0% |",
        "| convolution | 30.00 | 75.0% | 7 | `aten::conv2d` |",
        "| no kernel running | 10.00 | 25.0% | | |",
    ):
        assert line in text.splitlines()
    assert words(found, "profile.md")[1] == "  forward                    5.0 ms   25%"
