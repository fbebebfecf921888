"""Programs of others, each in an environment of its own below `.venv-clients`, made on first use by pip."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
TORCH = re.search(r"^TORCH\s*\?=\s*(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
OLD_DIFFUSERS = [  # of spring 2024, when most of today's programs were written
    "diffusers==0.27.2", "transformers==4.44.2", "huggingface_hub==0.24.7", "tokenizers==0.19.1", "numpy==1.26.4",
    "peft==0.10.0", "accelerate==0.30.1", "safetensors==0.4.5",
]  # fmt: skip
ENVIRONMENTS = {  # each line is one call of pip: torch before the rest, as in the Makefile
    "old-diffusers": [[TORCH], OLD_DIFFUSERS],
    "lycoris": [[TORCH], [*OLD_DIFFUSERS, "lycoris-lora==4.1.3"]],
    "sd-parsers": [["sd-parsers==0.6"]],
}


@pytest.fixture(scope="session")
def program():
    """Runs a script of `programs` in an environment with a job -> what it prints as JSON in its last line."""

    def call(environment, script, **job):
        python = _environment(environment)
        plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [python, "-W", "ignore", PROGRAMS / script, json.dumps(job, default=str)]
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}

    return call


def _environment(name: str) -> Path:
    """The environment's python; what was installed is written down last, and other pins make it anew."""
    folder = ROOT / ".venv-clients" / name
    python, stamp, pins = folder / "bin" / "python", folder / "installed.json", json.dumps(ENVIRONMENTS[name])
    if not stamp.exists() or stamp.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in ENVIRONMENTS[name]:
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            subprocess.run(command, check=True)
        stamp.write_text(pins)
    return python
