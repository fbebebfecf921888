"""The base of a case."""

import pytest


@pytest.fixture
def folder(request, tiny_sd):
    """Tiny Stable Diffusion, or SDXL where the test's `case` says so."""
    return request.getfixturevalue("tiny_sdxl") if request.getfixturevalue("case").xl else tiny_sd
