"""Networks of a base that stay in the host's memory while runs begin and end: each run gets modules of its own.

Methods replace layers, and what a run attaches is gone with its modules. Weights are not copied, unless a run trains them.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from personalize.models import loading
from personalize.models.locate import weight_files


class KeptNetworks:
    """Reads each network of a base once, and again where its files have changed. Another base takes its place."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._networks: dict[tuple, nn.Module] = {}

    def maker(self, *, shared: bool) -> Callable[..., nn.Module]:
        """A `make_network` for `load_model`. shared: the run computes with the very weights that are kept, and changes none."""

        def make_network(kind: type, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
            if folder != self._folder:
                self._folder = folder
                self._networks.clear()
            state = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in weight_files(folder / part))
            if (key := (part, dtype, state)) not in self._networks:
                self._networks[key] = loading.load_network(kind, folder, part, dtype)
            network = self._networks[key]
            return same_weights(network) if shared else copy.deepcopy(network)

        return make_network


def same_weights(network: nn.Module) -> nn.Module:
    """The modules again, with parameters of their own that lie in the same memory."""
    known = {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, known)
