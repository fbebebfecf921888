"""Guidance: predict(z, t, cond) -> out becomes guided(z, t) -> out, on the network's raw output.

B images; z, out (B,C,h,w); t (B,); cond is a dict of tensors whose first dimension is B (text embeddings, ...).
A cond of kB rows asks for k answers to the same z and t, B rows after B rows: out is (kB,C,h,w).
`schedule` turns what comes out into z0 or eps afterwards, in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Cond = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor, Cond], Tensor]
Guided = Callable[[Tensor, Tensor | float], Tensor]


def cfg(
    predict: Predict,
    cond: Cond,
    uncond: Cond | None,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """Classifier-free guidance u + scale (c - u) (Ho & Salimans 2207.12598, in the form where scale 1 is plain).

    Both halves are one call, in which z and t have B rows and the conditioning 2B. Scale 1 never evaluates `uncond`, which
    may then be None; scale 0 never `cond`.
    rescale: phi in [0, 1] of Lin et al. 2305.08891, eq. 15-16: pulls the standard deviation back to that of c.
    interval: (lo, hi) in timesteps; outside lo <= t <= hi plain `cond` is used (Kynkäänniemi et al. 2404.07724).
    The returned `guided` takes one t for the whole batch and gives float32 (float64 for float64).
    """
    assert scale == 1 or uncond is not None, "guidance needs an unconditional prompt"
    both = None if scale == 1 else _join(uncond, cond)

    def guided(z: Tensor, t: Tensor | float) -> Tensor:
        rows = torch.as_tensor(t, device=z.device).expand(len(z))
        if scale == 1 or (interval is not None and not interval[0] <= float(t) <= interval[1]):
            return _wide(predict(z, rows, cond))
        if scale == 0 and rescale == 0:
            return _wide(predict(z, rows, uncond))
        u, c = _wide(predict(z, rows, both)).chunk(2)
        out = u + scale * (c - u)
        return torch.lerp(out, out * (_std(c) / _std(out)), rescale) if rescale else out

    return guided


GUIDANCE = {"cfg": cfg}


def _join(a: Cond, b: Cond) -> Cond:
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return {key: torch.cat([a[key], b[key]]) for key in a}


def _std(out: Tensor) -> Tensor:
    return out.std(dim=list(range(1, out.ndim)), keepdim=True)


def _wide(out: Tensor) -> Tensor:
    return out.to(torch.promote_types(out.dtype, torch.float32))
