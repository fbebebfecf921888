"""A tiny base that the commands of a file read once."""

import pytest

from personalize import models


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture
def read_once(model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda base, **options: model)
