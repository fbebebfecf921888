"""Every shipped recipe resolves, holds differences only, and says on its second line the command that uses it."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import personalize
from personalize import methods
from personalize.cli import app
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
