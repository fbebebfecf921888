"""Pages escape what they are given, and a value that a template lacks is an error."""

import jinja2
import pytest

from personalize.common import html


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """A folder of templates that are found beside the package's own."""
    loaders = [html._environment().loader, jinja2.FileSystemLoader(tmp_path)]
    monkeypatch.setattr(html._environment(), "loader", jinja2.ChoiceLoader(loaders))
    return tmp_path


def test_every_value_is_escaped_and_a_missing_one_is_an_error(templates):
    blocks = "{% block title %}{{ name }}{% endblock %}{% block main %}<p>{{ name }}</p>{% endblock %}"
    (templates / "a.html.j2").write_text('{% extends "common/page.html.j2" %}' + blocks)
    page = html.render("a.html.j2", name="<i>&")
    assert "<title>&lt;i&gt;&amp;</title>" in page and "<p>&lt;i&gt;&amp;</p>" in page and "--paper: #fdfdfc" in page
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        html.render("a.html.j2")
