"""The terminal: what it prints where, with which exit status, and how soon."""

import json
import os
import subprocess
import sys

import pytest

import personalize
from personalize import methods, models
from personalize.cli import app
from personalize.cli.options import Method
from personalize.common.errors import Interrupted, UserError
from personalize.common.recipe import SETTINGS, load_recipe
from personalize.common.recipe_text import recipe_to_toml
from personalize.core.samplers import SAMPLERS
from personalize.generation.diffusers_samplers import DIFFUSERS

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "rich.progress")


def python(*words, cwd, **variables):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=os.environ | variables)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--class", "dog", "--dry-run"]])
def test_help_and_a_dry_run_wait_for_no_heavy_library(tmp_path, words):
    code = f"""if True:
        import sys
        from personalize.cli.app import app
        sys.argv = {["personalize", *words]!r}
        try: app()
        except SystemExit as stop: assert not stop.code, stop.code
        print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stderr.strip() == "[]", done.stderr
    assert done.stdout


def test_importing_the_package_imports_nothing_heavy_of_it(tmp_path):
    """Only what OpenMP must be told before torch is imported."""
    code = "import sys, personalize; print([m for m in sys.modules if m.startswith(('personalize.', 'torch'))])"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "['personalize.common', 'personalize.common.openmp']"


def test_an_error_is_one_line_on_stderr_with_status_2(tmp_path):
    done = python("-m", "personalize", "train", "photos", "--class", "dog", "--set", "train.stesp=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown setting 'train.stesp'; did you mean 'train.steps'?\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "which photos? Give a folder of 3 to 5, as in: personalize train photos/ --class dog"),
        (["train", "photos", "--class", "dog", "--base", "toylnad"], "did you mean 'toyland'"),
        (["train", "p", "--class", "dog", "--set", "train.steps"], "has no '='"),
        (["train", "p", "--class", "dog", "--recipe", "no.toml"], "cannot read the recipe no.toml"),
        (["train", "p", "--class", "dog", "--lr", "-1"], "train.lr = -1.0 in --set is not allowed; expected at least 0"),
        (["prior", "dog", "--dtype", "half"], "expected one of auto, float32, bfloat16, float16"),
        (["generate"], "what to draw? Give a prompt"),
        (["generate", "a dog"], "Make one: personalize train PHOTOS --class WORD"),
        (["generate", "a dog", "--run", "runs/none"], "runs/none is not a folder that personalize made"),
        (["generate", "--prompts", "none.txt"], "cannot read the prompts file none.txt"),
        (["evaluate"], "Make one: personalize train PHOTOS --class WORD"),
        (["evaluate", "runs/none"], "runs/none is not a folder that personalize made"),
        (["train", "p", "--method", "lore"], "lore"),
    ],
)
def test_what_a_user_can_cause_is_said_with_status_2_and_no_traceback(terminal, words, said):
    status, out, err = terminal(*words)
    assert (status, out) == (2, "")
    assert said in " ".join(err.split()) and "Traceback" not in err


def test_train_without_photos_or_class_names_the_remedy(terminal, monkeypatch, model, photos):
    monkeypatch.setattr(models, "load_model", lambda base, **options: model)
    status, out, err = terminal("train", "no-such-folder", "--class", "dog")
    assert (status, out) == (2, "") and "no-such-folder" in err
    status, out, err = terminal("train", photos)
    assert (status, out) == (2, "") and "Give its class, as in: personalize train PHOTOS --class dog" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--class", "dog"],
        ["--class", "dog", "--base", "owner/name", "--lr", "0.00001", "--steps", "7", "--method", "lora", "--seed", "0"],
        ["--set", "draw.negative=a, b #c", "--set", 'train.prompt=a "{token}" {class}', "--set", "evaluate.prompts=[]"],
    ],
)
def test_a_dry_run_prints_a_recipe_that_reads_back_as_itself(terminal, tmp_path, words):
    status, out, err = terminal("train", *words, "--dry-run")
    assert (status, err) == (0, "")
    (tmp_path / "recipe.toml").write_text(out)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe_to_toml(recipe, comments=True) == out
    assert personalize.resolve(tmp_path / "recipe.toml") == recipe
    assert terminal("train", "--recipe", "recipe.toml", "--dry-run")[1] == out


def test_options_are_short_names_of_settings(terminal, tmp_path):
    words = ["--class", "cat", "--steps", "7", "--lr", "1e-5", "--method", "lora", "--token", "qxv", "--seed", "0"]
    _, out, _ = terminal("train", *words, "--base", "o/n", "--device", "cpu", "--dtype", "float32", "--dry-run")
    (tmp_path / "r.toml").write_text(out)
    recipe = load_recipe(tmp_path / "r.toml")
    assert (recipe.class_word, recipe.train.steps, recipe.train.lr, recipe.train.methods) == (
        ("cat",), 7, 1e-5, ("lora",),
    )  # fmt: skip
    named = (recipe.token, recipe.seed, recipe.base, recipe.device, recipe.dtype)
    assert named == (("qxv",), 0, "o/n", "cpu", "float32")


def test_toylands_own_defaults_give_way_to_a_file_and_a_file_to_an_option(tmp_path):
    plain = load_recipe(None)
    assert personalize.resolve().train.lr != plain.train.lr and personalize.resolve().base == plain.base == "toyland"
    (tmp_path / "r.toml").write_text("[train]\nsteps = 11\nlr = 0.5\n")
    recipe = personalize.resolve(tmp_path / "r.toml", ["train.lr=0.25"])
    assert (recipe.train.steps, recipe.train.lr) == (11, 0.25)
    assert personalize.resolve(None, ["base=o/n"]) == load_recipe(None, ["base=o/n"]), "toyland's defaults are for toyland only"


def test_json_is_one_object_on_stdout_and_nothing_else(terminal, monkeypatch, model, tiny_sd, tmp_path):
    monkeypatch.setattr(models, "load_model", lambda base, **options: model)
    (tmp_path / "list.txt").write_text("# mine\na cat in the snow\n\na red hat\n")
    common = ("--base", tiny_sd, "--steps", "2", "--count", "1", "--out", "out")
    status, out, err = terminal("generate", "a dog", "--prompts", "list.txt", *common, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and out.count("\n") == 1
    assert found["grid"] == "out/grid.png" and len(found["files"]) == 3
    assert all((tmp_path / file).exists() for file in found["files"])
    assert [file.removeprefix("out/")[:5] for file in found["files"]] == ["a-dog", "a-cat", "a-red"]


def test_nothing_of_the_libraries_is_on_the_screen(tiny_sd, tmp_path):
    """No bars of transformers, no warnings of diffusers or bitsandbytes: stderr holds our lines, stdout the result."""
    words = [
        "generate",
        "a dog",
        "--base",
        str(tiny_sd),
        "--steps",
        "2",
        "--count",
        "1",
        "--sampler",
        "euler",
        "--device",
        "cpu",
    ]
    code = f"import sys; sys.argv = {['personalize', *words]!r}\nimport personalize.cli.app as cli\n"
    done = python("-c", code + "cli.main()", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "images/grid.png\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("drawing: 1 images in"), done.stderr


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("no such thing. Do that."), 2, "error: no such thing. Do that.\n"),
        (Interrupted("stopped at step 3 of 9"), 130, "stopped at step 3 of 9\n"),
        (KeyboardInterrupt(), 130, "stopped; every file that was written is whole, and the same command can be run again\n"),
    ],
)
def test_a_stop_has_the_status_of_its_kind(terminal, monkeypatch, raised, status, said):
    def fails(*args, **options):
        raise raised

    monkeypatch.setattr("personalize.commands.generate.generate", fails)
    assert terminal("generate", "a dog") == (status, "", said)


def test_the_options_name_what_the_tables_hold():
    assert {method.value for method in Method} == set(methods.METHODS)
    assert sorted(SETTINGS["draw.sampler"].choices) == sorted([*SAMPLERS, *DIFFUSERS])


SHORT = {"prior": {"count": "prior.count"}, "train": {"steps": "train.steps", "lr": "train.lr", "init_from": "train.init_from"}}
SHORT["generate"] = {name: f"draw.{name}" for name in ("count", "steps", "guidance", "negative", "sampler", "size")}


@pytest.mark.parametrize("command", SHORT)
def test_an_option_that_stands_for_a_setting_has_its_meaning_and_choices(command):
    params = {p.name: p for p in app.typer.main.get_command(app.app).commands[command].params}
    for name, key in SHORT[command].items():
        assert params[name].help.lower().startswith(SETTINGS[key].doc.lower()), name
        assert all(choice in params[name].help for choice in SETTINGS[key].choices), name
