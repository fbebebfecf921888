"""A run in two processes, started as users start it, is the run of one process."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import personalize
from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.files import read_jsonl
from personalize.common.run_folder import read_manifest

MORE = [
    "device=cpu",
    "token=zqv",
    "photos.min_size=16",
    "train.steps=3",
    "train.batch=3",
    "train.prior_batch=2",
    "prior.count=4",
    "prior.steps=2",
    "train.lr=1e-3",
    "train.ema=0.5",
]


def launcher():
    """The start of a command line for two processes. `--cpu --num_processes 2` would start one without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return [*launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", str(port), "-m", "personalize"]  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tiny_sd, photos, tmp_path):
    settings = [f"base={tiny_sd}", *MORE]
    places = {"runs": tmp_path / "1" / "runs", "priors": tmp_path / "1" / "priors"}
    one = personalize.train(photos, class_word="dog", settings=settings, **places).folder
    done = subprocess.run(
        [*launcher(), "train", str(photos), "--class", "dog", *(f"--set={text}" for text in settings)], cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / done.stdout.strip()
    assert "in 2 processes" in done.stderr
    weights = [load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors") for run in (one, two)]
    base = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    moved, apart = (torch.cat([(w[name] - weights[0][name]).flatten() for name in base]) for w in (base, weights[1]))
    assert moved.abs().max() > 1e-3
    # AdamW's first steps are the gradient's sign: where a gradient is almost nothing, rounding decides.
    assert apart.norm() < 1e-3 * moved.norm() and apart.abs().max() < 1e-4
    losses = [[row["loss"] for row in read_jsonl(run / "log.jsonl")] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert read_manifest(one)["identity"] == read_manifest(two)["identity"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="names of threads are read from /proc")
def test_a_broadcast_is_a_barrier_and_the_threads_of_a_group_end_with_it(tmp_path):
    code = """if True:
        import pathlib, sys, time, torch
        from personalize.common import distributed
        with distributed.process_group(torch.device("cpu")):
            import torch.distributed.nn.functional  # as torch's compiler does, for an optimizer
            assert distributed.broadcast_from_rank0(distributed.rank()) == 0
            if distributed.rank() == 1:  # what the last process has written, the first one finds after a broadcast
                time.sleep(0.3)
                pathlib.Path(sys.argv[1]).write_text("all of it")
            distributed.broadcast_from_rank0(None)
            assert pathlib.Path(sys.argv[1]).read_text() == "all of it"
            assert distributed.any_rank(distributed.rank() == 1) and not distributed.any_rank(False)
        names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in names if "gloo" in name], names
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    both = [subprocess.Popen(command, env={**where, "RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"]
    said = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said


@pytest.mark.parametrize("cards, backends", [(["a", "b"], ["gloo", "nccl"]), (["a", "a"], ["gloo"])])
def test_processes_use_nccl_where_each_has_a_gpu_of_its_own(monkeypatch, cards, backends):
    began, reduced, group = [], [], object()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    torch_own = distributed.distributed
    monkeypatch.setattr(torch_own, "init_process_group", lambda backend, timeout: began.append(backend))
    monkeypatch.setattr(torch_own, "new_group", lambda backend, timeout: began.append(backend) or group)
    monkeypatch.setattr(torch_own, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch_own, "all_gather_object", lambda out, card: out.__setitem__(slice(None), cards))
    monkeypatch.setattr(torch_own, "all_reduce", lambda values, group=None: reduced.append(group))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"{device}"))
    with distributed.process_group(torch.device("cuda", 1)):
        distributed.sum_over_ranks(torch.ones(1))
        distributed.any_rank(True)
    assert began == backends and reduced == [group if "nccl" in backends else None, None]


@pytest.mark.parametrize("count, world", [(1, 1), (5, 2), (1, 2), (7, 3), (2, 4)])
def test_every_row_has_one_owner(monkeypatch, count, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    owned = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        owned += range(count)[distributed.local_rows(count)]
    assert owned == list(range(count))


def test_deepspeed_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed.*--use_fsdp"), distributed.process_group(torch.device("cpu")):
        pass


def test_a_gradient_that_no_process_has_stays_missing(monkeypatch):
    """Weight decay would move what nothing reads; a gradient that another process has is zero here."""
    ours, theirs, nobodys = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    ours.grad = torch.ones(2)

    def all_reduce(tensor, **options):  # with a process that has a gradient of the second alone
        if tensor.dtype == torch.uint8:
            tensor |= torch.tensor([0, 1, 0], dtype=torch.uint8)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    distributed.sum_gradients([ours, theirs, nobodys])
    assert ours.grad.tolist() == [1, 1] and theirs.grad.tolist() == [0, 0] and nobodys.grad is None
