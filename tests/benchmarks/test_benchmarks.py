"""The comparison with other programs adds up, asks both sides for the same work, and says no where it must."""

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import arm, ceiling, compare, demands, drawing, gate, jobs
from benchmarks.phases import PHASES, phases, ratio, table
from personalize.cli import import_command
from personalize.common.recipe import load_recipe
from personalize.core import schedule
from personalize.data.crops import draw_crops, image_tensor
from personalize.data.photos import load_photos

STEPS = 4


def finished_run(
    *, launch=100.0, draws=((103.0, 110.0), (110.0, 123.0)), first=0.5, step=0.1, steps=24, save=2.0
) -> jobs.FinishedRun:
    """Class images from 3 s to 23 s, steps from 24 s on; the first step is slower."""
    start = (draws[-1][1] if draws else launch + 3) + 1
    ends = [start + first + step * k for k in range(steps)]
    events = {"begin": [start], "step": ends, "draw": [list(d) for d in draws], "peak": 2_000_000_000}
    return jobs.FinishedRun(launch, ends[-1] + save, events)


@pytest.fixture
def job(tiny_sd, tmp_path) -> jobs.Job:
    (tmp_path / "photos").mkdir()
    return jobs.Job(str(tiny_sd), tiny_sd, tmp_path / "photos", 32, lr=1e-4, sampler="pndm")


def test_phases_of_a_run_add_up_to_its_wall_time():
    found = phases(finished_run())
    assert found["start and load"] == pytest.approx(3) and found["prior"] == pytest.approx(20)
    assert found["second load, cache"] == pytest.approx(1) and found["capture, compile"] == pytest.approx(0.4)
    assert found["step, median"] == pytest.approx(100) and found["step, p95"] == pytest.approx(100)
    steps = found["capture, compile"] + 24 * found["step, mean"] / 1e3
    rest = sum(found[k] for k in ("start and load", "prior", "second load, cache", "save"))
    assert rest + steps == pytest.approx(found["cold job"]) and found["peak memory"] == 2


def test_what_did_not_happen_is_not_measured_and_too_few_steps_are_refused():
    found = phases(finished_run(draws=()))
    assert found["prior"] is None and found["second load, cache"] is None and found["start and load"] == pytest.approx(4)
    with pytest.raises(ValueError, match="6 steps"):
        phases(finished_run(steps=6))


def test_a_ratio_is_of_medians_and_its_range_is_of_rounds():
    found = ratio([10, 12, 30], [5, 4, 6])
    assert (found.value, found.low, found.high) == (12 / 5, 2, 5) and str(found) == "2.40× (2.00–5.00)"
    assert ratio([None, None], [1, 2]) is None and ratio([1.0], [0.0]) is None


def test_the_table_has_every_phase_and_both_ratios():
    rounds = [phases(finished_run()), phases(finished_run(step=0.2))]
    lines = table(
        {"script.py": rounds, "ours": [phases(finished_run(step=0.05))] * 2, "own": [phases(finished_run(draws=()))] * 2}
    )
    assert len(lines) == 2 + len(PHASES) and all(line.count("|") == 7 for line in lines)
    (median,) = [line for line in lines if line.startswith("| step, median, ms")]
    assert "| 150.0 | 50.0 | 100.0 | 3.00× (2.00–4.00) |" in median
    assert next(line for line in lines if line.startswith("| prior")).endswith("| 20.00 | 20.00 |  | 1.00× (1.00–1.00) |  |")


@pytest.mark.parametrize("script", gate.SCRIPTS)
def test_both_sides_are_asked_for_the_same_work(job, script, tmp_path):
    """Read by the importer that users have, the peer's command is our own recipe."""
    theirs = import_command.recipe_from(shlex.join(["python", *jobs.theirs(job, tmp_path / script, tmp_path)]))
    mine = jobs.ours(job, jobs.METHODS[script], tmp_path)
    flags = dict(zip(mine[2:], mine[3:]))
    settings = [mine[k + 1] for k, word in enumerate(mine) if word == "--set"]
    ours = load_recipe(None, [*settings, f"train.methods={flags['--method']}", f"base={job.base}"])
    read = load_recipe(None, theirs.settings)
    assert ours.train == dataclasses.replace(read.train, checkpoint_every=0, checkpoint_minutes=0)  # theirs is past the last
    assert read.train.checkpoint_every > job.steps and ours.lora == read.lora and ours.seed == read.seed
    assert ours.prior == dataclasses.replace(read.prior, prompt=ours.prior.prompt) and ours.base == read.base
    assert (read.token, read.class_word) == ((jobs.TOKEN,), (jobs.CLASS,)) and read.photos.size == job.size
    assert [line.partition(":")[0] for line in theirs.unknown] == ["--class_data_dir"]


def test_a_script_that_is_not_known_is_refused(job, tmp_path):
    with pytest.raises(ValueError, match="train_flux.py"):
        jobs.theirs(job, tmp_path / "train_flux.py", tmp_path)


def test_bars_are_met_or_missed_and_what_was_not_measured_is_said():
    bars = (demands.Demand("step, ratio", 1.3, 1.8), demands.Demand("step", 22, 15, False, "ms"))
    lines, met = demands.judge(bars, {"step, ratio": 1.3, "step": 22}, whole=True)
    assert met and all("met" in line for line in lines)
    lines, met = demands.judge(bars, {"step, ratio": 1.29}, whole=False)
    assert not met and "MISSED (bar 1.3, aim 1.8)" in lines[0] and "not measured" in lines[1]
    assert demands.judge(bars, {"step": 9}, whole=False)[1] and not demands.judge(bars, {"step": 9}, whole=True)[1]


def test_every_demand_of_the_cpu_is_measured_by_some_part(job):
    side = [phases(finished_run())] * 2
    names = compare._measured({"theirs": side, "ours": side, "own": side}, "full", "cpu")
    names |= compare._measured({"theirs": side, "ours": side}, "lora", "cpu")
    names |= {"drawing 64 pictures, ratio": 1, "one picture cold, ratio": 1}
    assert {d.measure for d in demands.DEMANDS["cpu"]} <= names.keys()
    assert {d.measure for d in demands.DEMANDS["cuda"]} <= names.keys() | {"one picture, 50 steps"}


def test_the_work_of_a_step_is_counted_and_an_adapters_is_less(job):
    full, twice = (ceiling.work(dataclasses.replace(job, batch=n), "full") for n in (1, 2))
    assert 0 < ceiling.work(job, "lora") < full and twice == pytest.approx(2 * full, rel=0.02)


def trained(losses, *weights) -> gate.TrainingResult:
    return gate.TrainingResult(losses, {"w": torch.tensor(weights, dtype=torch.float64)})


def test_deviations_are_relative_to_the_loss_and_to_the_whole_change():
    start, exact = {"w": torch.zeros(2)}, trained([0.5, 0.25], 3, 4)
    assert gate.deviation(exact, exact, start) == gate.Deviation(0, 0)
    found = gate.deviation(trained([0.5, 0.26], 3, 4.5), exact, start)
    assert found.loss == pytest.approx(0.04) and found.weights == pytest.approx(0.1)
    assert gate.deviation(trained([0.5, math.nan], 3, 4), exact, start).loss == math.inf
    with pytest.raises(AssertionError):
        gate.deviation(gate.TrainingResult([0.5, 0.25], {"v": torch.zeros(2)}), exact, start)


def test_the_gate_lets_through_what_is_as_near_as_the_peer_and_nothing_further():
    peer = gate.Deviation(1e-3, 1e-2)
    assert gate.Deviation(1.4e-3, 1.4e-2).passes(peer) and gate.Deviation(0, 0).passes(peer)
    assert not gate.Deviation(1.6e-3, 0).passes(peer) and not gate.Deviation(0, 1.6e-2).passes(peer)
    assert gate.Deviation(9e-6, 9e-6).passes(gate.Deviation(0, 0)), "below the floor"
    assert not gate.Deviation(math.inf, math.inf).passes(peer)


@pytest.mark.parametrize("zero", [False, True])
def test_the_references_noise_levels_are_the_papers(zero):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    betas = schedule.scaled_linear(1000)
    exact = schedule.from_betas(schedule.rescale_zero_terminal_snr(betas) if zero else betas, "v_prediction").alphas_cumprod
    torch.testing.assert_close(gate.abar(settings | {"rescale_betas_zero_snr": zero}), exact, rtol=1e-9, atol=1e-12)


def batches(job: jobs.Job) -> list:
    g = torch.Generator().manual_seed(0)
    shape = (2 * job.batch, 4, job.size // 2, job.size // 2)
    normal = [torch.randn(2, *shape, generator=g) for _ in range(STEPS)]
    return [(z0, eps, torch.randint(0, 1000, shape[:1], generator=g)) for z0, eps in normal]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_engine_trains_as_plain_torch_in_float64_does(job, method, tmp_path):
    """Ours against the reference; the same steps at twice the learning rate do not pass."""
    from diffusers import UNet2DConditionModel

    adapter = {}
    if method == "lora":
        from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

        unet = UNet2DConditionModel.from_pretrained(job.folder / "unet")
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(**gate.LORA, init_lora_weights="gaussian"), unet)
        adapter = {k: v.detach().clone() for k, v in get_peft_model_state_dict(unet).items()}
    steps = batches(job)
    start = adapter or gate.load_unet(job.folder)
    exact = gate.reference(job, steps, adapter)
    found = gate.ours(job, method, steps, adapter=adapter, out=tmp_path / "ours")
    apart = gate.deviation(found, exact, start)
    assert apart.loss < 1e-5 and apart.weights < 1e-2
    wrong = gate.ours(dataclasses.replace(job, lr=2 * job.lr), method, steps, adapter=adapter, out=tmp_path / "wrong")
    assert not gate.deviation(wrong, exact, start).passes(apart)


def verdict(weights: float) -> gate.Verdict:
    return gate.Verdict("full", gate.Deviation(1e-4, 1e-3), gate.Deviation(1e-4, weights))


def test_nothing_is_measured_where_the_gate_fails(job, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "run", lambda *_, **__: verdict(1.0))
    monkeypatch.setattr(jobs, "run", lambda *_, **__: pytest.fail("it was measured"))
    options = compare.parse_options(["--peer", "train_dreambooth.py"])
    good, lines = compare.compare(job, options, tmp_path)
    assert not good and "| full | | FAILED |" in lines


@pytest.mark.parametrize(("faster", "demand", "good"), [(2.0, True, True), (1.1, True, False), (1.1, False, True)])
def test_a_missed_bar_is_an_error_unless_nothing_is_demanded(job, tmp_path, monkeypatch, faster, demand, good):
    def run(command, work, **_):
        return (
            finished_run() if command[0] != "personalize" else finished_run(step=0.1 / faster, draws=((103, 103 + 4 / faster),))
        )

    monkeypatch.setattr(gate, "run", lambda *_, **__: verdict(1e-3))
    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(ceiling, "SECONDS", 0.01)
    flags = ["--peer", "train_dreambooth.py", "--only", "gate", "--only", "full", "--demand" if demand else "--no-demand"]
    found, lines = compare.compare(job, compare.parse_options(flags), tmp_path)
    assert found == good and "| full | | passed |" in lines
    assert any(line.startswith("- full step, ratio: ") and ("MISSED" in line) == (faster < 1.3) for line in lines)


def test_a_peer_that_does_not_run_is_said_with_its_own_words(job, tmp_path, monkeypatch):
    def run(command, work, **_):
        raise jobs.Failed("exit status 1: ImportError: no toml")

    monkeypatch.setattr(jobs, "run", run)
    kohya = compare.parse_options(["--peer", "train_db.py", "--only", "full"])
    job.photos.joinpath("a.png").write_bytes(b"")
    _, lines = compare.compare(job, kohya, tmp_path)
    assert "It does not run here: exit status 1: ImportError: no toml." in lines
    with pytest.raises(jobs.Failed):
        compare.compare(job, compare.parse_options(["--peer", "train_dreambooth.py", "--only", "full"]), tmp_path)


def test_the_command_ends_as_the_comparison_did_and_writes_between_the_marks(tmp_path, monkeypatch, capsys):
    page, script = tmp_path / "page.md", tmp_path / "train_dreambooth.py"
    page.write_text("before\n<!-- compare -->\nold\n<!-- /compare -->\nafter\n")
    script.write_text('check_min_version("0.40.0.dev0")')
    for good in (True, False):
        monkeypatch.setattr(compare, "compare", lambda *_, good=good: (good, ["the table"]))
        monkeypatch.setattr(sys, "argv", ["compare", "--peer", str(script), "--write", str(page)])
        with pytest.raises(SystemExit) as stop:
            compare.main()
        assert stop.value.code == (0 if good else 1)
    text = page.read_text()
    assert text.startswith("before\n<!-- compare -->\n- `python -m") and text.endswith("the table\n<!-- /compare -->\nafter\n")
    assert "old" not in text and str(tmp_path) not in text and "diffusers 0.40.0.dev0" in text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no place for tables"):
        compare.write(page, [])
    with pytest.raises(SystemExit):
        compare.parse_options(["--only", "gate"])


def test_photos_of_the_job_are_five_files_at_the_size_of_the_base(tiny_sd, tmp_path):
    found = compare.prepare_job(compare.parse_options(["--only", "drawing", "--base", str(tiny_sd)]), tmp_path)
    assert found.size == 32 and found.sampler == "pndm" and len(list(found.photos.iterdir())) == 5
    photos, _ = load_photos(found.photos, min_size=32)
    assert image_tensor(draw_crops(photos), 32).shape == (5, 3, 32, 32)


def test_a_module_is_wrapped_when_it_is_imported_and_not_before(tmp_path, monkeypatch):
    (tmp_path / "drawn_upon.py").write_text("def draw():\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    events = arm.Events()
    then = {"drawn_upon": lambda module: arm.wrap_function(module, "draw", events.around(span=events.draw))}
    monkeypatch.setattr(sys, "meta_path", [arm.ImportHook(then), *sys.meta_path])
    assert "drawn_upon" not in sys.modules
    import drawn_upon

    assert drawn_upon.draw() == 7 and len(events.draw) == 1 and events.draw[0][0] <= events.draw[0][1]


def test_a_script_runs_as_if_it_were_started_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nassert __name__ == '__main__'\nprint(sys.argv[1:], 'torch' in sys.modules)")
    (tmp_path / "beside.py").write_text("")
    command = [sys.executable, "-m", "benchmarks.arm", str(tmp_path / "events.json"), "--", str(script), "--steps", "3"]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['--steps', '3'] False\n"
    events = json.loads((tmp_path / "events.json").read_text())
    assert events.pop("peak") > 1e6 and events == {"begin": [], "step": [], "draw": []}


def test_a_program_that_fails_is_quoted_without_paths(tmp_path):
    broken = "import sys; sys.exit('ImportError: cannot import x from y (/some/lib/y.py)')"
    with pytest.raises(jobs.Failed, match="exit status 1: ImportError: cannot import x from y$"):
        jobs.spawn([sys.executable, "-c", broken], tmp_path / "log.txt")


def test_images_that_differ_by_one_of_255_are_48_db_apart():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert drawing.difference(a, a) == drawing.Difference(0, math.inf)
    found = drawing.difference(a, a + 1)
    assert found.mean == 1 and found.psnr == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize("name, said", [("train_dreambooth.py", "is not there"), ("mine.py", "its flags are not known")])
def test_a_peer_that_cannot_be_run_is_named_before_anything_runs(name, said):
    with pytest.raises(SystemExit, match=f"nowhere/{name} .*{said}|nowhere/{name} {said}"):
        compare.require_scripts([Path("nowhere") / name])
