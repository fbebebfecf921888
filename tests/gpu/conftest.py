"""What the tests of a real card share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def whole_float32_on_the_first_card(monkeypatch):
    """Convolutions in float32 too: torch lets them run in TF32, whose 10 bits turn the signs that AdamW's first steps are."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # of child processes
    torch.cuda.set_device(0)
