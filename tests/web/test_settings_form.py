"""The form has every setting, says what differs, and gives back what was written in it."""

import pytest

pytest.importorskip("gradio")

import gradio as gr

from personalize.common.errors import UserError
from personalize.common.recipe import SETTINGS, flat_settings, load_recipe
from personalize.web import settings_form
from personalize.web.workspace import Workspace

HEAD = ("toyland", "lora", "")


def untouched():
    start = settings_form.defaults(*HEAD)
    return {key: settings_form.shown(start[key]) for key in settings_form.KEYS}


def test_every_setting_has_a_field_with_its_meaning():
    with gr.Blocks():
        fields = settings_form.fields()
    assert set(fields) | set(settings_form.ELSEWHERE) == set(SETTINGS)
    assert all(field.info == SETTINGS[key].doc and field.label for key, field in fields.items())


def test_an_untouched_form_changes_nothing():
    assert settings_form.changes(untouched(), settings_form.defaults(*HEAD)) == {}


def test_what_is_written_is_what_a_recipe_gets(tmp_path):
    written = {"train.lr": "3e-5", "train.steps": "7", "photos.flip": True, "lora.targets": "to_q, to_v",
               "draw.size": "512x768", "train.prompt": "a \"{token}\", it's", "draw.sampler": "ddim",
               "token": "sks"}  # fmt: skip
    texts = settings_form.settings_of(Workspace(tmp_path), untouched() | written, HEAD, ())
    got = flat_settings(load_recipe(None, texts))
    assert got["train.lr"] == 3e-5 and got["train.steps"] == 7 and got["photos.flip"] is True and got["token"] == ("sks",)
    assert got["lora.targets"] == ("to_q", "to_v") and got["draw.size"] == "512x768" and got["draw.sampler"] == "ddim"
    assert got["train.prompt"] == written["train.prompt"] and got["train.methods"] == ("lora",)
    assert len(texts) == len(written) + 2


@pytest.mark.parametrize(
    "wrong", [{"train.steps": "many"}, {"train.steps": "-1"}, {"draw.sampler": "none"}, {"base_vae": "/etc"}]
)
def test_what_a_setting_cannot_be_is_refused(tmp_path, wrong):
    with pytest.raises(UserError):
        settings_form.settings_of(Workspace(tmp_path), untouched() | wrong, HEAD, ())


def test_only_recipes_of_the_list_are_read():
    assert "toyland/lora.toml" in settings_form.recipes()
    with pytest.raises(UserError, match="no recipe"):
        settings_form.recipe_path("../pyproject.toml")
