"""What one optimizer step trains on. B images, C latent channels, h w latent size."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from personalize.core.guidance import Cond
from personalize.models.devices import to_device

COND = "cond."  # begins the names of a conditioning among a batch's tensors


@dataclass
class Batch:
    """One optimizer step's images. is_prior (B,) bool; cond(rows) gives the conditioning of those rows.

    target (B,C,h,w): what the base should give; None: what the schedule says. mask (B,1,h,w): weights of the loss.
    noise (B,C,h,w): what is added to z0; None: eps, which the target is made of.
    counts: photos and class images; None: is_prior, which is then on the CPU, says it.
    prompts(rows): the texts of those rows where they are encoded at each step; beside: what `cond` has besides them.
    """

    z0: Tensor
    eps: Tensor
    t: Tensor
    is_prior: Tensor
    cond: Callable[[slice], Cond]
    target: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None
    counts: tuple[int, int] | None = None
    prompts: Callable[[slice], list[str]] | None = None
    beside: Cond = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.counts is None:
            self.counts = int((~self.is_prior).sum()), int(self.is_prior.sum())

    def loss_inputs(self, rows: slice) -> dict[str, Tensor | None]:
        """Of some rows what the loss is of, besides z0 and the conditioning."""
        parts = {"t": self.t, "eps": self.eps, "target": self.target, "mask": self.mask}
        return {name: None if value is None else value[rows] for name, value in parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, on the device of the latents."""
        tensors = {"z0": self.z0, "eps": self.eps, "t": self.t, "target": self.target, "mask": self.mask, "noise": self.noise}
        tensors["is_prior"] = to_device(self.is_prior, self.z0.device)
        tensors |= {COND + name: value for name, value in self.cond(slice(0, len(self.z0))).items()}
        return {name: value for name, value in tensors.items() if value is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], counts: tuple[int, int]) -> "Batch":
        """The inverse of `tensors`."""
        cond = {name.removeprefix(COND): value for name, value in tensors.items() if name.startswith(COND)}
        own = {name: value for name, value in tensors.items() if not name.startswith(COND)}
        return cls(cond=lambda rows: {name: value[rows] for name, value in cond.items()}, counts=counts, **own)
