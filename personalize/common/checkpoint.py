"""What a run needs to go on bit for bit: trained tensors, their EMA, the optimizer's state, the step. No pickle."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.files import writing
from personalize.common.finite import require_finite
from personalize.common.tensor_file import write_tensors
from personalize.common.untrusted import require_regular

Checkpoint = dict[str, dict[str, Tensor]]
# What Prodigy and schedule-free optimizers keep for a whole group, as numbers; "group.0.d" in a checkpoint.
GROUP_STATE = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k", "weight_sum", "lr_max")


def save_state(path: Path, parts: Checkpoint, step: int) -> None:
    """Write one .safetensors file atomically, tensor by tensor; parts are {"trained": {...}, "optimizer": {...}, ...}."""
    tensors = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
    with writing(path) as temporary:
        write_tensors(temporary, tensors, {"step": str(step)})


def load_state(path: Path) -> tuple[Checkpoint, int]:
    """(parts, step) that `save_state` wrote. UserError for a damaged file."""
    require_regular(path, "checkpoint")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read: {error}. Delete its folder to go on without it."
        ) from error
    parts: Checkpoint = {}
    for key, value in tensors.items():
        require_finite(value, f"{path}: {key}", "Delete its folder to go on without it.")
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts, step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "3.exp_avg" is that of parameter 3, "group.0.k" of group 0."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    named = {f"{i}.{k}": torch.as_tensor(v) for i, p in enumerate(params) for k, v in optimizer.state.get(p, {}).items()}
    # bitsandbytes keeps one table of its 8-bit values for all parameters, and a file holds no tensor twice
    place = {k: v.untyped_storage()._cdata for k, v in named.items()}
    shared = Counter(place.values())
    named = {k: v.clone() if shared[place[k]] > 1 else v for k, v in named.items()}
    for g, group in enumerate(optimizer.param_groups):
        numbers = {name: group[name] for name in GROUP_STATE if name in group}
        named |= {
            f"group.{g}.{name}": torch.tensor(v, dtype=torch.int64 if isinstance(v, int) else torch.float64)
            for name, v in numbers.items()
        }
    return named


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` gave. Learning rates and the like come from the recipe, not from the checkpoint."""
    state: dict[int, dict] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        i, _, name = key.partition(".")
        if i == "group":
            continue
        is_moment = value.shape == params[int(i)].shape
        state.setdefault(int(i), {})[name] = distributed.shard_like(value, params[int(i)]) if is_moment else value
    for entry in state.values():
        if "step" in entry and not entry["step"].is_floating_point():  # all but torch's own count steps in a plain number
            entry["step"] = int(entry["step"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for g, group in enumerate(optimizer.param_groups):
        group |= {name: tensors[key].item() for name in GROUP_STATE if (key := f"group.{g}.{name}") in tensors}
    for p, entry in optimizer.state.items():  # files keep no strides, and a fused step reads state and weights together
        for name, value in entry.items():
            if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                entry[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
