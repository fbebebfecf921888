"""Every shipped recipe resolves, holds differences only, and says on its second line the command that uses it."""

import json
import os
import re
import shlex
import string
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import personalize
from personalize import methods
from personalize.cli import app
from personalize.commands import many
from personalize.commands.personalizer import Personalizer
from personalize.common import recipe as config
from personalize.common.recipe import flat_settings
from personalize.common.recipe_text import recipe_to_toml

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))


def names(path):
    return f"{path.parent.name}/{path.stem}"


def test_there_is_one_for_every_family():
    assert len(RECIPES) >= 20
    assert {path.parent.name for path in RECIPES} == {"toyland", "sd15", "sd21", "sdxl"}


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_a_recipe_runs_dry_by_the_command_in_its_header(path, monkeypatch):
    what, command = path.read_text().splitlines()[:2]
    assert what.startswith("# ") and command.startswith("# personalize train ")
    monkeypatch.chdir(FOLDER.parent)
    words = shlex.split(command.removeprefix("# personalize "))
    assert words[-1] == f"recipes/{names(path)}.toml"
    done = CliRunner().invoke(app.app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    recipe = personalize.resolve(path, ["class_word=dog"])
    assert done.stdout == recipe_to_toml(recipe, comments=True)
    methods.check_methods(recipe.train.methods, quantize=recipe.train.quantize)
    assert (recipe.base == "toyland") == (path.parent.name == "toyland")


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_a_recipe_holds_differences_only(path):
    """Each setting but the base and the methods changes what the recipe would be without it."""
    table = config.read_toml(path)
    methods = [f"train.methods={','.join(table['train']['methods'])}"] if "methods" in table["train"] else []
    start = personalize.resolve(None, [f"base={table.get('base', 'toyland')}", *methods])
    held, before = flat_settings(personalize.resolve(path)), flat_settings(start)
    keys = {f"{section}.{key}" for section, value in table.items() if isinstance(value, dict) for key in value}
    keys |= {key for key, value in table.items() if not isinstance(value, dict)}
    for key in keys - {"base", "train.methods"}:
        assert held[key] != before[key], f"{key} = {held[key]} is what it is anyway"


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_the_table_of_recipes_has_a_row_for_it(path):
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| {names(path)} |"))
    if path.parent.name != "toyland":
        figure = path.read_text().splitlines()[2].removeprefix("# ").partition(" (estimated")[0]
        assert row.split(" | ")[1] == figure and figure.endswith(" GB")


# --- many subjects on a cluster ---

CLUSTER = FOLDER / "cluster"


def many_command(text, **values):
    """The words after `personalize` of a shell text's command, with its variables filled in."""
    words = shlex.split(text[text.index("personalize many") :].replace("\\\n", " ").splitlines()[0])
    return [string.Template(word).substitute(values) for word in words[1:]]


def run_many(words, tmp_path, monkeypatch):
    """Runs it on a manifest of 16 rows, of which each worker has one -> the rows that were trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(FOLDER)
    rows = [{"id": f"r{k}", "photos": "x", "class": "dog"} for k in range(16)]
    (tmp_path / "subjects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = []
    monkeypatch.setattr(Personalizer, "open_base", lambda *a: None)
    monkeypatch.setattr(Personalizer, "__call__", lambda self, row: trained.append(row["id"]) or {
        "id": row["id"], "status": "done", "seconds": 1.0, "error": None})  # fmt: skip
    assert CliRunner().invoke(app.app, words).exit_code == 0
    return trained


def test_the_slurm_array_runs_a_shard_a_task_and_leaves_what_a_retry_cannot_mend(tmp_path, monkeypatch):
    text = (CLUSTER / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert options["array"] == "0-15" and "requeue" in options and options["signal"].startswith("TERM@")
    values = {"manifest": "subjects.jsonl", "recipe": "sd15/lora", "SLURM_ARRAY_TASK_ID": 3, "SLURM_ARRAY_TASK_COUNT": 16}
    words = many_command(text.replace('"recipes/$recipe.toml"', "recipes/${recipe}.toml"), **values)
    assert run_many(words, tmp_path, monkeypatch) == ["r3"] and "--retry-failed" in words


@pytest.mark.parametrize(("status", "calls"), [(0, 1), (2, 1), (3, 3), (1, 3), (130, 1)])
def test_the_slurm_array_tries_faults_and_failed_rows_again(tmp_path, status, calls):
    for name, body in (("srun", f"echo $* >> {tmp_path}/calls; exit {status}"), ("scontrol", f"echo $* > {tmp_path}/requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_JOB_ID": "7"}
    environment = os.environ | task | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", CLUSTER / "slurm.sh", "m.jsonl", "sd15/lora"], env=environment, check=False)
    assert done.returncode == status and len((tmp_path / "calls").read_text().splitlines()) == calls
    assert (tmp_path / "requeued").exists() == (status == 130)


def test_the_ray_job_asks_for_workers_with_a_gpu_each_and_trains_all_rows(tmp_path, monkeypatch):
    text, asked = (CLUSTER / "ray.sh").read_text(), {}
    assert subprocess.run(["bash", "-n", CLUSTER / "ray.sh"], check=False).returncode == 0
    assert "exec ray job submit -- personalize many" in text

    @contextmanager
    def engine(work, device, *, screen, **options):
        asked.update(options)
        yield many._Loop(work)

    monkeypatch.setattr(many, "ray_engine", engine)
    words = many_command(text, manifest="subjects.jsonl", recipe="sd15/lora", data=tmp_path)
    assert run_many(words, tmp_path, monkeypatch) == [f"r{k}" for k in range(16)] and "--retry-failed" in words
    assert asked == {"workers": 16, "cpus": 0, "gpus": 1.0}


def test_the_kubernetes_job_gives_an_index_up_on_status_2_alone(tmp_path, monkeypatch):
    import yaml

    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"], pod["restartPolicy"]) == (
        "batch/v1",
        "Job",
        "Indexed",
        "Never",
    )
    (container,) = pod["containers"]
    ignored, given_up = spec["podFailurePolicy"]["rules"]
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    on = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert given_up == {"action": "FailIndex", "onExitCodes": on} and spec["backoffLimitPerIndex"] >= 1
    words = many_command(container["args"][0], JOB_COMPLETION_INDEX=spec["completions"] - 1)
    assert run_many(words, tmp_path, monkeypatch) == ["r15"] and "--retry-failed" in words
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
