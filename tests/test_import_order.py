"""Who may import whom: a folder imports only folders below it, also inside functions."""

import ast
import sys
from pathlib import Path

import pytest

import personalize
from personalize.models import MODELS

ROOT = Path(personalize.__file__).parent
ORDER = [
    {"common"},
    {"core"},
    {"formats"},
    {"models", "toyland"},
    {"methods"},
    {"generation"},
    {"data"},
    {"evaluation"},
    {"training"},
    {"commands"},
    {"cli", "web"},
    {"__main__.py", "__init__.py"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
CALLERS = {"workflows", "compare", "many", "many_ray", "personalizer", "together"}  # commands that call other commands
SHARED = {
    "session",
    "image_source",
    "photo_masks",
    "export",
    "told_photos",
    "evaluated_images",
    "embeddings",
}  # what commands stand on
LIGHT = {
    "cli/__init__", "cli/app", "cli/tools", "cli/options", "common/errors", "common/recipe", "common/recipe_sections",
    "common/prompts", "common/image_size", "common/optimizers", "common/run_folder", "common/settings", "common/files",
    "common/terminal", "common/untrusted",
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).parts[0]


def imported(path, *, top_level=False):
    """Dotted names a file imports, `from x import y` as x.y; at module level only, or everywhere."""
    tree = ast.parse(path.read_text())
    for node in ast.iter_child_nodes(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own(path, **where):
    """(room, whole name) of every import of this package; names of the public API belong to `__init__.py`."""
    for name in imported(path, **where):
        if name.startswith("personalize."):
            part = name.split(".")[1]
            yield part if part in RANK else "__init__.py", name


def foreign(path):
    names = {name.partition(".")[0] for name in imported(path, top_level=True)}
    return names - set(sys.stdlib_module_names) - {"personalize"}


def test_the_package_is_these_rooms():
    assert {path.name for path in ROOT.iterdir()} - {"__pycache__"} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = RANK[room(path)]
    wrong = [name for other, name in own(path) if other != room(path) and RANK[other] > mine]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which stand above it"


def test_rooms_of_one_row_do_not_import_each_other_in_circles():
    edges = {(room(path), other) for path in FILES for other, _ in own(path) if RANK[other] == RANK[room(path)]}
    assert not [(a, b) for a, b in edges if a != b and (b, a) in edges]


def test_commands_call_each_other_in_workflows_only():
    for path in (ROOT / "commands").glob("*.py"):
        others = {name.split(".")[2] for part, name in own(path) if part == "commands"} - {*SHARED, path.stem}
        assert path.stem in CALLERS or not others, (path, others)


def test_the_core_imports_torch_and_errors_only():
    for path in (ROOT / "core").glob("*.py"):
        assert foreign(path) <= {"torch"}, path
        assert all(name.startswith(("personalize.core.", "personalize.common.errors.")) for _, name in own(path)), path


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_the_standard_library_only(name):
    """What `--help` and an error message need must not wait for torch."""
    path = ROOT / f"{name}.py"
    assert foreign(path) <= ({"typer"} if name.startswith("cli/") else set())
    allowed = {"personalize." + other.replace("/", ".").removesuffix(".__init__") for other in LIGHT}
    assert all(any(f"{full}.".startswith(f"{door}.") for door in allowed) for _, full in own(path, top_level=True))


def test_methods_metrics_and_the_loop_know_no_model_family():
    """Outside models/ nobody names one: the door is LatentModel. Toyland makes the networks of its base itself."""
    families = {f"personalize.models.{name}" for name in set(MODELS.values())}
    for path in FILES:
        if room(path) != "models":
            assert not [name for _, name in own(path) if any(name.startswith(family) for family in families)], path
