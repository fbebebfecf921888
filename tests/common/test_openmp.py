"""OpenMP's threads stop spinning early, whichever way the package is entered, unless the user has decided otherwise."""

import os
import subprocess
import sys

import pytest

from personalize.common.openmp import WAIT, limit_spinning

NAMES = (*WAIT, "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, WAIT),
        ({"GOMP_SPINCOUNT": "7"}, {**WAIT, "GOMP_SPINCOUNT": "7"}),
        ({"KMP_BLOCKTIME": "200"}, {**WAIT, "KMP_BLOCKTIME": "200"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_what_the_user_has_set_stays(given, expected):
    limit_spinning(environment := dict(given))
    assert environment == expected


@pytest.mark.parametrize("module", ["personalize.cli.app", "personalize.commands.generate", "personalize.core.schedule"])
def test_the_library_of_torch_reads_it_whatever_is_imported_first(module):
    """GNU's OpenMP prints what it has read as it is loaded, with torch."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}, torch"], env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's here")
    assert f"GOMP_SPINCOUNT = '{WAIT['GOMP_SPINCOUNT']}'" in done.stderr
