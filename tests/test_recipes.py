"""Every shipped recipe loads, and says on its second line the command that uses it."""

from pathlib import Path

import pytest

from personalize import api

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_resolves_and_names_its_command(path):
    recipe = api.resolve(path)
    assert recipe.train.methods == (path.stem,)
    assert (recipe.base == "toyland") == (path.parent.name == "toyland")
    command = path.read_text().splitlines()[1]
    assert command.startswith("# personalize train ") and command.endswith(f"--recipe recipes/{path.parent.name}/{path.name}")
