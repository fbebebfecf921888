"""`make gpu`, rehearsed without one: each part measures, one that fails is recorded, and the same command goes on."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bases, gpu, gpu_parts, jobs
from benchmarks.gpu_parts import Setup, all_parts

SIZES = {  # parameters of the releases
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return Setup("cpu", "tiny", tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def script(tmp_path) -> Path:
    """A peer that fails."""
    path = tmp_path / "train_dreambooth.py"
    path.write_text("import sys\nsys.exit('ImportError: no such thing (/home/me/x.py)')")
    return path


def measured(setup: Setup, name: str) -> dict:
    values = {}
    for more in all_parts(setup)[name]():
        values |= more
    return values


PARTS = ["tests/test_devices", "step/sd15/lora/eager", "draw/sd21"]


def make_gpu(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`make` for three parts, of which the last finds a broken base."""
    broken = folder / "work" / "bases" / "tiny-sd21" / "model_index.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{}")
    command = [
        "make",
        "--no-print-directory",
        "gpu",
        f"VENV={sys.prefix}",
        "DEVICE=cpu",
        "SIZE=tiny",
        f"OUT={folder}",
        f"WORK={folder / 'work'}",
    ]
    command += [f"PARTS={' '.join(PARTS)}", *words]
    return subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, timeout=600)


def check_what_it_left(folder: Path) -> None:
    (file,) = folder.glob("*-cpu-tiny.json")
    parts = json.loads(file.read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["done", "done", "failed"], parts
    assert "collected" in parts["tests/test_devices_gpu"]["values"]["outcome"]
    assert parts["step/sd15/lora/eager"]["values"]["ms"] > 0
    assert "UserError" in parts["draw/sd21"]["error"]
    page = file.with_suffix(".md").read_text()
    assert "| sd15/lora/eager |" in page and "UserError" in page and str(folder) not in page


def test_one_command_measures_records_what_fails_and_makes_a_page(tmp_path, monkeypatch, capfd):
    """The command that `make` would start, and its parts, in this process."""
    command = shlex.split(make_gpu(tmp_path, "--dry-run").stdout.replace("\\\n", ""))
    assert command[:3] == [f"{sys.prefix}/bin/python3", "-m", "benchmarks.gpu"]

    def run_part(setup, part, seconds):
        gpu.do_part(setup, part)
        found = json.loads((setup.work / "part.json").read_text())
        entry = {"status": "failed" if found["error"] else "done", "seconds": 1.0, "values": found["values"]}
        return entry | ({"error": jobs.without_paths(found["error"])} if found["error"] else {})

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert "2 done, 1 failed, 0 left" in capfd.readouterr().out and ended.value.code == 1
    check_what_it_left(tmp_path)


@pytest.mark.slow
def test_so_it_is_with_a_process_for_each_part(tmp_path):
    done = make_gpu(tmp_path)
    assert "2 done, 1 failed, 0 left" in done.stdout and done.returncode != 0, done.stderr[-3000:]
    check_what_it_left(tmp_path)


@pytest.mark.slow
def test_images_memory_and_a_peer_are_measured(setup, script):
    """In this process: one of its own each would take the suite half a minute."""
    drawn = measured(setup, "draw/sd15")
    assert drawn["images"] == 2 and drawn["s"] > 0 and drawn["sampler"]
    if sys.platform == "linux":
        found = measured(setup, "memory/sd15/textual-inversion")
        assert found["plan, GB"] > 0 and found["phases"].keys() >= {"load", "cache", "first", "step", "save"}
    with pytest.raises(jobs.Failed, match="exit status 1: ImportError: no such thing$"):
        measured(dataclasses.replace(setup, peers=(script,)), "peer/train_dreambooth.py/full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["step/sd21/full/graph", "draw/sdxl", "memory/sdxl/lora-8gb", "recipe/sd15/full", "recipe/sdxl/pivotal",
     "recipe/toyland/lora", "processes/sd15", "peer/pipeline/drawing", "peer/pipeline/picture"],
)  # fmt: skip
def test_every_kind_of_part_ends_well(setup, part):
    entry = gpu.run_part(setup, part, gpu.MOST)
    assert entry["status"] == "done" and entry["values"], entry


def test_parts_are_those_that_were_asked_for(setup, script):
    names = list(all_parts(setup))
    recipes = {path.relative_to(gpu_parts.RECIPES).with_suffix("").as_posix() for path in gpu_parts.RECIPES.rglob("*.toml")}
    for kind in ("memory", "recipe"):
        assert {name.removeprefix(f"{kind}/") for name in names if name.startswith(f"{kind}/")} == recipes
    assert {name.split("/")[0] for name in names} == gpu_parts.TITLES.keys()
    on_gpu = all_parts(Setup("cuda", "full", setup.work, (script,)))
    steps = {f"{kind}/{method}/{how}" for kind in gpu_parts.TINY for method in ("full", "lora") for how in gpu_parts.ENGINES}
    assert {name.removeprefix("step/") for name in on_gpu if name.startswith("step/")} == steps
    assert {"peer/train_dreambooth.py/gate", "peer/train_dreambooth.py/full"} <= on_gpu.keys()
    assert gpu.chosen(names, []) == names
    assert gpu.chosen(names, ["draw", "step/sd15/full"]) == ["step/sd15/full/eager", "step/sd15/full/graph"] + [
        f"draw/{kind}" for kind in gpu_parts.TINY
    ]
    with pytest.raises(SystemExit, match="--part stepp: no part's name begins so"):
        gpu.chosen(names, ["step", "stepp"])


def entry(status: str = "done", **values) -> dict:
    return {"status": status, "seconds": 1.0, "values": values} | ({"error": "it broke"} if status != "done" else {})


def test_it_goes_on_where_it_stopped(setup, tmp_path, monkeypatch):
    asked, ends = [], {"a": "done", "b": "failed", "c": "stopped"}
    monkeypatch.setattr(gpu, "run_part", lambda setup, part, seconds: asked.append(part) or entry(ends[part]))
    file, results = tmp_path / "new" / "x.json", {"card": "c", "date": "d", "machine": "m", "libraries": "l", "parts": {}}

    def call(*, again=False, seconds=100.0) -> tuple[int, list[str]]:
        asked.clear()
        left = gpu.measure(setup, ["a", "b", "c"], results, file, until=time.monotonic() + seconds, again=again)
        return left, list(asked)

    assert call(seconds=gpu.LEAST - 1) == (3, [])
    assert call() == (1, ["a", "b", "c"]) and json.loads(file.read_text()) == results
    assert results["parts"]["c"]["status"] == "stopped", "the call's time was over, not the part's"
    assert call() == (0, ["c"])
    assert results["parts"]["c"]["status"] == "failed", "with the whole time for itself"
    assert call() == (0, [])
    ends["b"] = "done"
    assert call(again=True)[1] == ["b", "c"] and results["parts"]["b"]["status"] == "done"


def test_what_was_measured_before_an_error_is_kept(setup, monkeypatch):
    def breaks(_):
        yield {"ms": 3.0}
        raise torch.OutOfMemoryError("CUDA out of memory in /lib/x.py\nand more")

    monkeypatch.setattr(gpu, "all_parts", lambda setup: {"step/x": lambda: breaks(setup)})
    gpu.do_part(setup, "step/x")
    found = json.loads((setup.work / "part.json").read_text())
    assert found["values"] == {"ms": 3.0} and found["ended"]
    assert found["error"] == "OutOfMemoryError: CUDA out of memory in /lib/x.py"


@pytest.mark.slow
def test_a_part_that_takes_too_long_ends_with_all_that_it_started(setup, tmp_path, monkeypatch):
    started = tmp_path / "started"
    child = f"import subprocess, time\np = subprocess.Popen(['sleep', '60'])\nopen({str(started)!r}, 'w').write(str(p.pid))\n"
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{sys.executable}\n{child}time.sleep(60)")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    found = gpu.run_part(setup, "step/x", 3.0)
    assert found["status"] == "stopped" and found["error"] == "stopped after 3 s" and found["values"] == {}
    time.sleep(0.2)
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_page_has_a_table_for_each_kind_and_the_lines_of_peers():
    parts = {
        "step/sd15/lora/graph": entry(ms=12.3456),
        "step/sdxl/full/eager": entry("failed"),
        "peer/x.py/full": entry(passed=True, lines=["### x.py", "| a |"]),
    }
    page = list(gpu.page({"card": "C", "date": "D", "machine": "m", "libraries": "l", "parts": parts}))
    assert page[0] == "# C, D" and "| | ms | error |" in page
    assert "| sd15/lora/graph | 12.35 |  |" in page and "| sdxl/full/eager |  | it broke |" in page
    assert page[-2:] == ["x.py", "| a |"]


@pytest.mark.parametrize("kind", gpu_parts.TINY)
def test_a_random_base_opens_as_a_pipeline(setup, kind):
    """As the peers open it: its index names each part."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(setup.base(kind))
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {k for k, v in pipeline.components.items() if v}
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")


@pytest.mark.parametrize(("kind", "part"), SIZES, ids="/".join)
def test_a_random_base_has_the_releases_size(kind, part):
    from personalize.toyland.pretraining import networks

    with torch.device("meta"):
        network = bases.network(kind, part, networks.tokenizer(["a dog"] * 2))
    assert sum(p.numel() for p in network.parameters()) == SIZES[kind, part]


def test_a_scripts_name_must_be_known(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_options(["--peer", str(tmp_path / "train_flux.py")])
    assert "train_flux.py is no file, or none of train_dreambooth.py" in capsys.readouterr().err


def test_a_part_finds_the_package_and_no_card_where_none_was_asked_for(setup, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    found = gpu.environment(setup)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(jobs.ROOT), "mine"] and found["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in gpu.environment(Setup("cuda", "full", setup.work)).keys() - os.environ.keys()
