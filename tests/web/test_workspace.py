"""What the page may read and write: its workspace, and nothing else by whatever name."""

import os

import pytest

from personalize.common.errors import UserError
from personalize.web.workspace import Workspace


@pytest.fixture
def space(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "manifest.json").write_text('{"status": "finished"}')
    return Workspace(tmp_path / "work")


@pytest.mark.parametrize("name", ["../../secret", "..", ".", "", "/etc", "a/../..", "link", "\0"])
def test_no_name_of_a_run_or_a_subject_leads_out(space, tmp_path, name):
    (space.runs_folder / "link").symlink_to(tmp_path / "secret")
    for find in (space.run, space.subject):
        with pytest.raises(UserError):
            find(name)


@pytest.mark.parametrize("text", ["/models/sd", " ~/sd", "../x", "a/../../b", "hf:/etc", "C:\\x", "\\\\host\\x", "in/out"])
def test_no_setting_is_a_path_outside(space, tmp_path, text):
    (space.root / "in").mkdir()
    os.symlink(tmp_path / "secret", space.root / "in" / "out")
    with pytest.raises(UserError, match="this workspace"):
        space.require_plain(text)


def test_hub_ids_prompts_and_bases_of_the_command_line_are_allowed(space):
    for text in ("owner/name", "a {token} dog, 3/4 view... / black\\white", "/models/sd", "", "in here/model"):
        assert space.require_plain(text, ("/models/sd",)) == text


def test_a_subject_keeps_its_class_word_whatever_that_is(space):
    name = space.new_subject("My <b>Dog</b>", 'do"g\\\n')
    assert (name, space.class_word(name)) == ("my-b-dog-b", 'do"g\\')
