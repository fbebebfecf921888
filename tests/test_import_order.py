"""Who may import whom: every import points down the layers of docs' architecture, also those inside functions."""

import ast
import sys
from pathlib import Path

import pytest

import personalize
from personalize.models import MODELS

ROOT = Path(personalize.__file__).parent
LAYERS = [
    {"errors"},
    {"settings", "files"},
    {"config", "rundir", "prompts", "terminal"},
    {"core", "heap", "kernels"},
    {"formats"},
    {"checkpoint", "models", "toyland", "lettering", "sheet", "importing", "intervals", "protocols", "markup", "verdict"},
    {"decoding", "crops", "photos", "exam", "doctor", "photosheet", "choosing", "summary", "figures", "reporttext", "report"},
    {"profilepage"},
    {"methods", "metrics"},
    {"latent", "tokens", "subjects", "processes", "graph", "compiled", "masters", "optimizers"},
    {"engine", "trained", "gallery"},
    {"redraw", "modelcard"},
    {"bundle", "hub"},
    {"trainset", "priorset", "scoring"},
    {"plan", "footprint", "watching"},
    {"outline"},
    {"estimate", "pace"},
    {"runlog"},
    {"keeping"},
    {"profiling"},
    {"commands"},
    {"api", "cli_options"},
    {"cli_tools"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
LIGHT = dict.fromkeys(("cli", "cli_options", "cli_tools"), {"typer"}) | dict.fromkeys(
    ("errors", "config", "prompts", "rundir", "settings", "files", "terminal"), set()
)
FILES = sorted(ROOT.rglob("*.py"))


def unit(path):
    """The row of LAYERS that a file belongs to: its package, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


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
    """(unit, whole name) of every import of this package."""
    for name in imported(path, **where):
        if name.startswith("personalize."):
            yield name.split(".")[1], name


def foreign(path):
    names = {name.partition(".")[0] for name in imported(path, top_level=True)}
    return names - set(sys.stdlib_module_names) - {"personalize"}


def test_every_module_has_its_layer():
    assert len(FILES) > 30 and {unit(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = unit(path)
    wrong = [name for other, name in own(path) if other != mine and RANK[other] > RANK[mine]]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which stand above it"


def test_modules_of_one_layer_do_not_import_each_other_in_circles():
    edges = {(unit(path), other) for path in FILES for other, _ in own(path) if RANK[other] == RANK[unit(path)]}
    assert not [(a, b) for a, b in edges if a != b and (b, a) in edges]


def test_commands_never_import_each_other():
    for path in (ROOT / "commands").glob("*.py"):
        assert not [name for other, name in own(path) if other == "commands"], path


def test_the_core_imports_torch_and_errors_only():
    for path in (ROOT / "core").glob("*.py"):
        assert foreign(path) <= {"torch"}, path
        assert {other for other, _ in own(path)} <= {"core", "errors"}, path


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_the_standard_library_only(name):
    """What `--help` and an error message need must not wait for torch."""
    path = ROOT / f"{name}.py"
    assert foreign(path) <= LIGHT[name]
    assert {other for other, _ in own(path, top_level=True)} <= set(LIGHT)


def test_methods_metrics_and_the_loop_know_no_model_family():
    """Outside models/ nobody names one: the door is LatentModel. Toyland makes the networks of its base itself."""
    families = {f"personalize.models.{name}" for name in set(MODELS.values())}
    for path in FILES:
        if unit(path) != "models":
            assert not [name for _, name in own(path) if any(name.startswith(family) for family in families)], path
