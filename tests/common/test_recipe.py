"""The recipe: strict reading, precedence, round trips."""

import ast
import json
import sys
from pathlib import Path

import pytest

from personalize.common import errors, files, image_size, prompts, recipe_sections, run_folder, settings, untrusted
from personalize.common import recipe as config
from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS, Recipe, flat_settings, load_recipe, recipe_from_dict, recipe_to_dict
from personalize.common.recipe_text import recipe_to_toml, settings_reference


def other_value(setting):
    """An allowed value that is not the default."""
    default = setting.default
    if setting.choices:
        other = next(choice for choice in setting.choices if choice != default and (choice,) != default)
        return (other,) if isinstance(default, tuple) else other
    if setting.kind is bool:
        return not default
    if setting.kind == settings.Edges:
        return "512x768"
    if setting.kind is int:
        return default + 3
    if setting.kind is float:
        return 0.1 + 0.2 if default != 0.1 + 0.2 else 0.7
    if setting.kind is str:
        return 'a "quoted" \\ {class}\n\ttab, # no comment \x7f é 狗'
    return (0.125, 0.1 + 0.2) if setting.kind == tuple[float, ...] else ("x, y", 'q"uote', "z")


def nested(values):
    table = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = value
    return table


@pytest.fixture
def changed():
    recipe = load_recipe(None, defaults=nested({key: other_value(setting) for key, setting in SETTINGS.items()}))
    assert not [key for key, value in flat_settings(recipe).items() if value == SETTINGS[key].default]
    return recipe


def refusal(*overrides):
    with pytest.raises(UserError) as error:
        load_recipe(None, overrides)
    return str(error.value)


@pytest.mark.parametrize("comments", [False, True])
def test_toml_of_a_recipe_with_every_field_changed_loads_as_the_same_recipe(changed, tmp_path, comments):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(changed, comments=comments), encoding="utf-8")
    assert load_recipe(path) == changed
    assert recipe_to_toml(load_recipe(path), comments=comments) == path.read_text(encoding="utf-8")


def test_every_setting_can_be_changed_by_override(changed):
    for key, value in flat_settings(changed).items():
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        assert flat_settings(load_recipe(None, [f"{key}={text}"], {"train": {"steps": 900}}))[key] == value


def test_a_recipe_survives_json(changed):
    assert json.loads(json.dumps(recipe_to_dict(changed))) == recipe_to_dict(changed)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(changed))), "manifest.json") == changed


def test_toml_of_differences_holds_exactly_the_differences():
    recipe = load_recipe(None, ["train.steps=400", "base=mine"])
    assert recipe_to_toml(recipe, Recipe()) == 'base = "mine"\n\n[train]\nsteps = 400\n'
    assert recipe_to_toml(Recipe(), Recipe()) == ""


def test_later_sources_win_setting_by_setting(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[train]\nsteps = 20\nlr = 1e-4\n")
    recipe = load_recipe(path, ["train.steps=30", "train.steps=40"], {"seed": 7, "train": {"steps": 10, "lr": 1, "batch": 4}})
    assert (recipe.train.steps, recipe.train.lr, recipe.train.batch, recipe.seed) == (40, 1e-4, 4, 7)
    assert recipe.train.methods == ("full",)


def test_every_setting_has_a_meaning_and_stands_in_the_reference():
    rows = [line for line in settings_reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(SETTINGS)
    for row, setting in zip(rows, SETTINGS.values(), strict=True):
        assert setting.doc and row.startswith(f"| `{setting.key}` |") and setting.doc in row
        assert row.count("|") == 4


def test_the_page_of_settings_is_current():
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_reference(), "python -m personalize.common.recipe_text > docs/settings.md"


def test_every_default_is_allowed():
    assert load_recipe(None, defaults=recipe_to_dict(Recipe())) == Recipe() == load_recipe(None)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stesp=3", "unknown setting 'train.stesp'; did you mean 'train.steps'?"),
        ("trian.steps=3", "unknown setting 'trian.steps'; did you mean 'train.steps'?"),
        ("class=dog", "unknown setting 'class'; did you mean 'class_word'?"),
        ("lr=3", "unknown setting 'lr'; did you mean 'train.lr' or 'embedding.lr' or 'distill.lr'?"),
        (
            "steps=3",
            "unknown setting 'steps'; did you mean 'prior.steps' or 'train.steps' or 'draw.steps' or 'choose.steps' or "
            "'distill.steps'?",
        ),
        ("qqqq=3", "unknown setting 'qqqq'"),
    ],
)
def test_a_typo_is_answered_with_the_setting_meant(override, message):
    assert refusal(override) == message


def test_a_typo_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[train]\nstesp = 3\n")
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert str(error.value) == f"unknown setting 'train.stesp' in {path}; did you mean 'train.steps'?"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.steps=many", "a whole number"),
        ("train.steps=2.5", "a whole number"),
        ("train.batch=true", "a whole number"),
        ("train.steps=0", "at least 1"),
        ("train.lr=-1e-4", "at least 0"),
        ("train.lr=nan", "a number"),
        ("train.lr=inf", "a number"),
        ("train.ema=1.0", "at most 0.999999"),
        ("train.lr=[1]", "a number"),
        ("photos.flip=True", "true or false"),
        ("photos.flip=1", "true or false"),
        ("train.lr_schedule=cosin", "one of constant, cosine, linear, cosine-restarts, polynomial"),
        ("train.trackers=[1, 2]", "a list of texts"),
        ("draw.interval=[0.5, 2]", "at most 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected_and_meant(override, expected):
    key = override.partition("=")[0]
    message = refusal(override)
    assert message.startswith(f"{key} = ") and f"expected {expected} (" in message
    assert SETTINGS[key].doc in message


@pytest.mark.parametrize("override", ["draw.interval=[0.8, 0.2]", "draw.interval=0.5"])
def test_a_guidance_interval_is_a_low_and_a_high(override):
    assert refusal(override).startswith("draw.interval = ")


def test_a_warmup_longer_than_the_run_is_refused():
    assert "train.warmup = 500 is more than train.steps = 400" in refusal("train.warmup=500", "train.steps=400")


def test_a_text_in_place_of_a_list_in_a_file_is_a_list_of_one(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('class_word = "dog"\n[train]\nmethods = "lora"\n')
    recipe = load_recipe(path)
    assert (recipe.class_word, recipe.train.methods) == (("dog",), ("lora",))


@pytest.mark.parametrize(
    "override, value",
    [
        ("train.lr=1", 1.0),
        ("base=123", "123"),
        ("base=true", "true"),
        ("base= sks ", "sks"),
        ("token=123", ("123",)),
        ("token=true", ("true",)),
        ("token=sks, zwx", ("sks", "zwx")),
        ("draw.negative=", ""),
        ("prior.prompt=a photo of a {class} = good", "a photo of a {class} = good"),
        ("train.methods=lora", ("lora",)),
        ("train.methods=textual-inversion, lora", ("textual-inversion", "lora")),
        ("train.methods=[lora,full]", ("lora", "full")),
        ('evaluate.prompts="a {class}, red"', ("a {class}, red",)),
        ("draw.interval=0.1,1", (0.1, 1.0)),
        ("train.trackers=[]", ()),
    ],
)
def test_an_override_reads_as(override, value):
    got = flat_settings(load_recipe(None, [override]))[override.partition("=")[0]]
    assert got == value and type(got) is type(value)


def test_an_override_without_a_value_or_of_a_section_is_explained():
    assert "has no '='" in refusal("train.steps")
    assert "is a section" in refusal("train=4")


def test_a_recipe_file_at_fault_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"missing\.toml"):
        load_recipe(tmp_path / "missing.toml")
    path = tmp_path / "my.toml"
    path.write_text("seed = 1\nbase = toyland\n")
    with pytest.raises(UserError, match=r"my\.toml is not TOML.*line 2"):
        load_recipe(path)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(AttributeError):
        Recipe().train.steps = 3


@pytest.mark.parametrize(
    "module", [config, errors, files, image_size, prompts, recipe_sections, run_folder, settings, untrusted]
)
def test_the_lowest_modules_import_the_standard_library_each_other_and_filelock_only(module):
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.module.startswith("personalize") else node.module.split(".")[0])
    own = ("errors", "files", "image_size", "optimizers", "recipe_sections", "settings", "untrusted")
    allowed = {f"personalize.common.{name}" for name in own} | {"filelock"}
    assert names and names <= set(sys.stdlib_module_names) | allowed


def test_every_whole_number_has_a_most():
    numbers = [s for s in config.SETTINGS.values() if s.kind is int]
    assert len(numbers) > 20 and all(s.most is not None for s in numbers)
    for text in (
        "seed=99999999999999999999999",
        "train.batch=1000000000",
        "draw.count=1000000000",
        f"train.steps={'1' * 6000}",
    ):
        with pytest.raises(UserError, match=text.partition("=")[0]):
            config.load_recipe(None, [text])


@pytest.mark.parametrize(
    "text, size",
    [("512", 512), ("512x768", "512x768"), ('"512x768"', "512x768"), ("512 X 512", 512), ("96×64", "96x64"), ("0", 0)],
)
def test_a_size_is_an_edge_or_a_width_and_a_height_and_a_square_always_its_edge(tmp_path, text, size):
    assert load_recipe(None, [f"draw.size={text}"]).draw.size == size
    stored = recipe_to_dict(load_recipe(None, [f"draw.size={text}"]))
    assert stored["draw"]["size"] == size and recipe_from_dict(stored, "a manifest").draw.size == size
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_to_toml(load_recipe(None, [f"draw.size={text}"])))
    assert load_recipe(file).draw.size == size
    assert load_recipe(None).draw.size == 0
