"""Prompt-to-Prompt (Hertz et al. 2208.01626) without attention maps: rows of a batch borrow each other's queries and keys.

An edited image whose map M of the text is its source's reads M v = attention(q_source, k_source, v). Where its tokens are
others, A (L,L) says how much of the map of each token of the source goes to each of its own: (M A) v = M (A v). A token
may also keep part of its own map, and one that is weighted c times has c v as its value. All of that is done once, to the
prepared keys and values; at a sampling step attention is called as ever, with q and k of another row.

B rows, L text tokens, C channels of an attention. A row and its source are drawn in one call, from the same noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from personalize.common.errors import UserError
from personalize.core.guidance import Cond, Guided
from personalize.models.fast_unet import BORROW_CROSS, BORROW_SELF, TEXT_KEYS_VALUES, why_not_fast
from personalize.models.interface import LatentModel


def require_control(model: LatentModel) -> None:
    """UserError for a base whose attention only the library's own forward pass computes."""
    if why := why_not_fast(model.unet):
        raise UserError(
            f"base {model.name!r}: attention cannot be controlled, for {why} in its U-Net. Use a Stable Diffusion 1, 2 or XL "
            "base of the usual shape, or draw without the edit."
        )


def borrowed(
    cond: Cond,
    uncond: Cond | None,
    source: Tensor,
    *,
    cross: bool = True,
    layout: bool = False,
    alignment: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Cond, Cond | None]:
    """Prepared conditionings for `cfg` -> the same, in which row i of `cond` has the attention of row source[i] (B,).

    A row that is its own source is drawn as without control, and so is `uncond`. cross: maps of the text; whatever else
    conditions an image (SDXL's pooled text) is then the source's too. layout: maps of self-attention.
    alignment: A (B,L,L), source tokens by own tokens, the identity where not given; own: (B,L), the share of its own map that
    a token keeps beside, none where not given. For a row that is its own source they are the identity and 0.
    """
    rows = torch.arange(len(source), device=source.device)
    assert ((source >= 0) & (source < len(source))).all() and (source[source] == source).all(), "a source has no source"
    offsets = {key: source - rows for key, wanted in ((BORROW_CROSS, cross), (BORROW_SELF, layout)) if wanted}
    none = {key: torch.zeros_like(offset) for key, offset in offsets.items()}
    if not cross:
        return cond | offsets, uncond and uncond | none

    def values(v: Tensor) -> list[Tensor]:
        taken = v if alignment is None else alignment.to(v) @ v
        return [taken] if own is None else [taken, own.to(v).unsqueeze(-1) * v]

    others = {key: value[source] for key, value in cond.items() if key != "text" and not key.startswith(TEXT_KEYS_VALUES)}
    plain = (lambda v: [v]) if own is None else (lambda v: [v, torch.zeros_like(v)])
    return (
        cond | others | _with_values(cond, values) | offsets,
        uncond and uncond | _with_values(uncond, plain) | none,
    )


def weighted(cond: Cond, weights: Tensor) -> Cond:
    """A prepared conditioning whose tokens have the attention of the image `weights` (B,L) times; 1 changes nothing."""
    return cond | _with_values(cond, lambda v: [weights.to(v).unsqueeze(-1) * v])


def by_time(early: Guided, late: Guided, tau: float) -> Guided:
    """`early` at timesteps above tau, `late` from there on: control lasts as long as the layout is being decided."""
    return lambda z, t: (early if t > tau else late)(z, t)


def _with_values(cond: Cond, change: Callable[[Tensor], list[Tensor]]) -> Cond:
    """The keys and values of every cross-attention, with change(values (B,L,C)) in the values' place."""
    prepared = {name: value.chunk(2, -1) for name, value in cond.items() if name.startswith(TEXT_KEYS_VALUES)}
    assert prepared, "a conditioning without prepared keys and values: see `require_control`"
    return {name: torch.cat([k, *change(v)], -1) for name, (k, v) in prepared.items()}
