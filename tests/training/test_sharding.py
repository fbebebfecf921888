"""FSDP: a run in two processes, each with its share of the U-Net, is the run of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import personalize
from personalize.common.errors import UserError
from personalize.common.files import read_json, read_jsonl, write_json
from personalize.common.recipe import load_recipe
from personalize.training import sharding

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
UNET = "model/unet/diffusion_pytorch_model.safetensors"
EYES = Path(personalize.__file__).parent / "toyland/weights/encoders"
SETTINGS = [
    "device=cpu", "token=zqv", "photos.min_size=16", "train.steps=4", "train.batch=2", "prior.count=4", "prior.steps=2",
    "draw.steps=2", "train.lr=1e-3", "train.clip=0.5", "train.ema=0.5", "train.accumulate=2", "train.text_encoder=true",
    "train.checkpoint_every=2", "train.sample_every=2", "choose.every=2", "choose.count=1", "choose.class_count=1",
    "choose.steps=2", "choose.strengths=[1.5]", f"evaluate.dino={EYES}/identity", f"evaluate.clip={EYES}/clip",
]  # fmt: skip


def start(folder, photos, settings, *, fsdp):
    """The command as users give it -> (the run's folder, what it said)."""
    launch = [sys.executable]
    if fsdp:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [*launch, "-m", "personalize", "train", str(photos), "--class", "dog", *(f"--set={text}" for text in settings)],
        cwd=folder, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.strip(), done.stderr


def files(run):
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def as_after_step_2(run, folder):
    """A copy of a finished run, stopped after its second step."""
    shutil.copytree(run.parent.parent, folder)
    copy = folder / run.parent.name / run.name
    write_json(copy / "manifest.json", read_json(copy / "manifest.json") | {"status": "running"})
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step-000004")


@pytest.mark.slow
def test_shares_of_the_weights_give_the_weights_and_files_of_one_process_and_either_goes_on_from_the_other(
    tiny_sd, photos, tmp_path
):
    settings = [f"base={tiny_sd}", *SETTINGS]
    one, _ = start(tmp_path / "one", photos, settings, fsdp=False)
    two, said = start(tmp_path / "two", photos, settings, fsdp=True)
    assert "in 2 processes, each with its share of the weights" in said
    as_after_step_2(one, tmp_path / "one_two")
    as_after_step_2(two, tmp_path / "two_one")
    changed, said = start(tmp_path / "one_two", photos, settings, fsdp=True)
    assert "after step 2" in said and "its share" in said
    back, said = start(tmp_path / "two_one", photos, settings, fsdp=False)
    assert "after step 2" in said
    base, weights = load_file(tiny_sd / "unet/diffusion_pytorch_model.safetensors"), load_file(one / UNET)
    moved = torch.cat([(base[name] - weights[name]).flatten() for name in weights])
    assert moved.abs().max() > 1e-3
    rows = {run: list(read_jsonl(run / "log.jsonl")) for run in (one, two, changed, back)}
    for run in (two, changed, back):
        assert files(run) == files(one)
        assert read_json(run / "model/unet/config.json") == read_json(one / "model/unet/config.json")
        other = load_file(run / UNET)
        apart = torch.cat([(other[name] - weights[name]).flatten() for name in weights])
        # as for processes that share nothing; measured were 3e-5 and 3e-5
        assert apart.norm() < 1e-3 * moved.norm() and apart.abs().max() < 1e-4
        for name in ("loss", "norm"):
            assert [row[name] for row in rows[run]] == pytest.approx([row[name] for row in rows[one]], rel=1e-4)
    states = [load_file(run / "checkpoints/step-000004/state.safetensors") for run in (one, two)]
    layout = [{key: (value.shape, value.dtype) for key, value in state.items()} for state in states]
    assert layout[0] == layout[1]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="names of threads are read from /proc")
def test_each_process_has_half_of_the_weights_and_states_and_no_thread_of_the_group_outlives_it(tiny_sd, photos, tmp_path):
    code = """if True:
        import json, pathlib, sys, personalize
        from personalize.common.distributed import local_shards
        from personalize.training import engine
        step = engine.Engine.step
        def counted(self, batch, *, scale):
            values = step(self, batch, scale=scale)
            states = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            print(json.dumps([sum(p.numel() for p in part) for tensors in (self.params, states)
                              for part in (tensors, local_shards(tensors))]))
            return values
        engine.Engine.step = counted
        settings, (photos, runs, priors) = json.loads(sys.argv[1]), sys.argv[2:]
        personalize.train(photos, class_word="dog", settings=settings, runs=runs, priors=priors)
        names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in names if "gloo" in name], names
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {**os.environ, **FSDP, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    settings = [f"base={tiny_sd}", *SETTINGS[:4], "train.steps=1", "train.batch=2", "prior.count=0", "choose.every=0"]
    command = [sys.executable, "-c", code, json.dumps(settings), str(photos), str(tmp_path / "runs"), str(tmp_path / "priors")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**where, "RANK": rank}, **pipes) for rank in "01"]
    outputs = [each.communicate(timeout=600) for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    for whole, share, states, share_of_states in (json.loads(out.splitlines()[0]) for out, _ in outputs):
        assert share == pytest.approx(whole / 2, rel=0.02) and states == 2 * whole and share_of_states == 2 * share


@pytest.mark.parametrize(
    "setting, variables, dtype, words",
    [
        ("train.steps=2", {"FSDP_VERSION": "1"}, torch.float32, "--fsdp_version 2"),
        ("train.steps=2", {"FSDP_OFFLOAD_PARAMS": "true"}, torch.float32, "fsdp_offload_params"),
        ("train.steps=2", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, torch.float32, "train.gradient_checkpointing=true"),
        ("train.methods=lora", {}, torch.float32, "lora trains few weights"),
        ("train.optimizer=adamw8bit", {}, torch.float32, "8-bit AdamW.*train.optimizer=adamw"),
        ("train.masters=split", {}, torch.bfloat16, "train.masters=float32"),
        ("train.engine=compiled", {}, torch.float32, "train.engine=eager"),
        ("train.steps=2", {}, torch.float16, "dtype=bfloat16"),
        ("train.prior_batch=2", {}, torch.float32, "the 3 images of a step are not shared evenly by 2 processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_a_reason(monkeypatch, setting, variables, dtype, words):
    for name, value in {**FSDP, "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(None, ["train.batch=1", "prior.count=4", setting])
    with pytest.raises(UserError, match=f"FSDP is not possible.*{words}.*--multi_gpu"):
        sharding.check(recipe, torch.device("cpu"), dtype)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    sharding.check(recipe, torch.device("cpu"), dtype)


def test_processes_that_share_a_gpu_are_not_sharded(monkeypatch):
    for name, value in {**FSDP, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="FSDP needs a CUDA GPU for each process"):
        sharding.check(load_recipe(None, ["train.batch=2"]), torch.device("cuda", 0), torch.float32)
