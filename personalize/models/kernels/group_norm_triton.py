"""The Triton kernels of `group_norm`. An image is rows of channels, R = h w rows of C; a program takes some of each.

Forward: moments of parts, their sum by group, and the output. Backward: sums of parts, their sum by group, and the input's
gradient. Nothing is added atomically, so results are the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_R = tl.constexpr(32)
ROWS, COLUMNS = TILE_R.value, 64  # of a tile; 64 channels in bfloat16 are one line of 128 bytes
MOST_PARTS = 64  # that the rows of an image are summed in


@triton.jit
def _tile(row, stop, columns, C):
    """Offsets of a tile within an image, and which of them are inside it."""
    rows = row + tl.arange(0, TILE_R)
    return rows[:, None] * C + columns[None, :], (rows[:, None] < stop) & (columns[None, :] < C)


@triton.jit
def _per_channel(mean_ptr, rstd_ptr, columns, C, G):
    """Mean and 1 / deviation of the group of each channel."""
    group = columns // (C // G)
    mask = columns < C
    return tl.load(mean_ptr + group, mask=mask, other=0.0), tl.load(rstd_ptr + group, mask=mask, other=0.0)


@triton.jit
def _moments(x_ptr, mean_ptr, m2_ptr, R, C, part, TILE_C: tl.constexpr):
    """(B,R,C) -> mean and sum of squares around it (B,parts,C) of `part` rows each, joined as Chan et al. do."""
    b, p, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(2) * TILE_C + tl.arange(0, TILE_C)
    mean, m2, count = tl.zeros([TILE_C], tl.float32), tl.zeros([TILE_C], tl.float32), 0.0
    stop = tl.minimum((p + 1) * part, R)
    for row in range(p * part, stop, TILE_R):
        offsets, mask = _tile(row, stop, columns, C)
        x = tl.load(x_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
        tile_rows = tl.minimum(TILE_R, stop - row).to(tl.float32)
        tile_mean = tl.sum(x, 0) / tile_rows
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        m2 += tl.sum(centred * centred, 0) + delta * delta * (count * tile_rows / (count + tile_rows))
        mean += delta * (tile_rows / (count + tile_rows))
        count += tile_rows
    out_offsets = (b * parts + p) * C + columns
    tl.store(mean_ptr + out_offsets, mean, mask=columns < C)
    tl.store(m2_ptr + out_offsets, m2, mask=columns < C)


@triton.jit
def _join(means_ptr, m2s_ptr, mean_ptr, rstd_ptr, R, C, G, part, parts, eps, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    """(B,parts,C) moments -> mean and 1 / deviation (B,G)."""
    b, g = tl.program_id(0), tl.program_id(1)
    width = C // G
    rows, inside = tl.arange(0, TILE_P), tl.arange(0, TILE_C)
    mask = (rows[:, None] < parts) & (inside[None, :] < width)
    offsets = (b * parts + rows[:, None]) * C + g * width + inside[None, :]
    counts = tl.where(mask, tl.minimum(part, R - rows[:, None] * part), 0).to(tl.float32)
    means = tl.load(means_ptr + offsets, mask=mask, other=0.0)
    total = (R * width).to(tl.float32)
    mean = tl.sum(tl.sum(means * counts, 0), 0) / total
    centred = means - mean
    m2 = tl.load(m2s_ptr + offsets, mask=mask, other=0.0) + counts * centred * centred
    variance = tl.sum(tl.sum(m2, 0), 0) / total
    tl.store(mean_ptr + b * G + g, mean)
    tl.store(rstd_ptr + b * G + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _apply(x_ptr, out_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, R, C, G, SILU: tl.constexpr, TILE_C: tl.constexpr):
    b, columns = tl.program_id(0), tl.program_id(2) * TILE_C + tl.arange(0, TILE_C)
    offsets, mask = _tile(tl.program_id(1) * TILE_R, R, columns, C)
    mean, rstd = _per_channel(mean_ptr + b * G, rstd_ptr + b * G, columns, C, G)
    w = tl.load(w_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(b_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
    out = (x - mean[None, :]) * (rstd * w)[None, :] + bias[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(out_ptr + b * R * C + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(x, dy, mean, rstd, w, bias, SILU: tl.constexpr):
    """Normalized input, and the gradient after the weight and the bias."""
    x_hat = (x - mean[None, :]) * rstd[None, :]
    if SILU:
        s = tl.sigmoid(x_hat * w[None, :] + bias[None, :])
        dy = dy * s * (1.0 + (x_hat * w[None, :] + bias[None, :]) * (1.0 - s))
    return x_hat, dy


@triton.jit
def _sums(
    x_ptr, dy_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, db_ptr, dw_ptr, R, C, G, part, SILU: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """Parts (B,parts,C) of the gradients of the bias and the weight."""
    b, p, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(2) * TILE_C + tl.arange(0, TILE_C)
    mean, rstd = _per_channel(mean_ptr + b * G, rstd_ptr + b * G, columns, C, G)
    w = tl.load(w_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(b_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    db, dw = tl.zeros([TILE_C], tl.float32), tl.zeros([TILE_C], tl.float32)
    stop = tl.minimum((p + 1) * part, R)
    for row in range(p * part, stop, TILE_R):
        offsets, mask = _tile(row, stop, columns, C)
        x = tl.load(x_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat, dz = _gradients(x, dy, mean, rstd, w, bias, SILU)
        db += tl.sum(dz, 0)
        dw += tl.sum(dz * x_hat, 0)
    out_offsets = (b * parts + p) * C + columns
    tl.store(db_ptr + out_offsets, db, mask=columns < C)
    tl.store(dw_ptr + out_offsets, dw, mask=columns < C)


@triton.jit
def _join_sums(
    dbs_ptr, dws_ptr, w_ptr, db_ptr, dw_ptr, s1_ptr, s2_ptr, C, G, parts, TILE_P: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """Their sums (B,C), and those over a group, each times its weight (B,G)."""
    b, g = tl.program_id(0), tl.program_id(1)
    rows, inside = tl.arange(0, TILE_P), tl.arange(0, TILE_C)
    columns, width = g * (C // G) + inside, C // G
    mask = (rows[:, None] < parts) & (inside[None, :] < width)
    offsets = (b * parts + rows[:, None]) * C + columns[None, :]
    db = tl.sum(tl.load(dbs_ptr + offsets, mask=mask, other=0.0), 0)
    dw = tl.sum(tl.load(dws_ptr + offsets, mask=mask, other=0.0), 0)
    w = tl.load(w_ptr + columns, mask=inside < width, other=0.0).to(tl.float32)
    tl.store(db_ptr + b * C + columns, db, mask=inside < width)
    tl.store(dw_ptr + b * C + columns, dw, mask=inside < width)
    tl.store(s1_ptr + b * G + g, tl.sum(db * w, 0))
    tl.store(s2_ptr + b * G + g, tl.sum(dw * w, 0))


@triton.jit
def _input_gradient(
    x_ptr, dy_ptr, dx_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, s1_ptr, s2_ptr, R, C, G, SILU: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    b, columns = tl.program_id(0), tl.program_id(2) * TILE_C + tl.arange(0, TILE_C)
    offsets, mask = _tile(tl.program_id(1) * TILE_R, R, columns, C)
    mean, rstd = _per_channel(mean_ptr + b * G, rstd_ptr + b * G, columns, C, G)
    s1, s2 = _per_channel(s1_ptr + b * G, s2_ptr + b * G, columns, C, G)
    w = tl.load(w_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(b_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + b * R * C + offsets, mask=mask, other=0.0).to(tl.float32)
    x_hat, dz = _gradients(x, dy, mean, rstd, w, bias, SILU)
    inverse_size = 1.0 / (R * (C // G)).to(tl.float32)
    dx = rstd[None, :] * (dz * w[None, :] - (s1[None, :] + x_hat * s2[None, :]) * inverse_size)
    tl.store(dx_ptr + b * R * C + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class Fused(torch.autograd.Function):
    """x (B,C,h,w) channels-last, groups, weight (C,), bias (C,), eps, silu -> (B,C,h,w) of x's type."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        B, C, R, part, parts = _sizes(x)
        means, m2s = x.new_empty(2, B, parts, C, dtype=torch.float32)
        mean, rstd = x.new_empty(2, B, groups, dtype=torch.float32)
        out, blocks = torch.empty_like(x, memory_format=torch.channels_last), triton.cdiv(C, COLUMNS)
        join_tiles = {"TILE_P": triton.next_power_of_2(parts), "TILE_C": triton.next_power_of_2(C // groups)}
        _moments[B, parts, blocks](x, means, m2s, R, C, part, TILE_C=COLUMNS)
        _join[B, groups](means, m2s, mean, rstd, R, C, groups, part, parts, eps, **join_tiles)
        _apply[B, triton.cdiv(R, ROWS), blocks](
            x, out, weight, bias, mean, rstd, R, C, groups, SILU=silu, TILE_C=COLUMNS
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        (B, C, R, part, parts), G = _sizes(x), ctx.groups
        dbs, dws = x.new_empty(2, B, parts, C, dtype=torch.float32)
        db, dw = x.new_empty(2, B, C, dtype=torch.float32)
        s1, s2 = x.new_empty(2, B, G, dtype=torch.float32)
        dx, blocks = torch.empty_like(x, memory_format=torch.channels_last), triton.cdiv(C, COLUMNS)
        tile, context = {"SILU": ctx.silu, "TILE_C": COLUMNS}, (weight, bias, mean, rstd)
        join_tiles = {"TILE_P": triton.next_power_of_2(parts), "TILE_C": triton.next_power_of_2(C // G)}
        _sums[B, parts, blocks](x, dy, *context, dbs, dws, R, C, G, part, **tile)
        _join_sums[B, G](dbs, dws, weight, db, dw, s1, s2, C, G, parts, **join_tiles)
        _input_gradient[B, triton.cdiv(R, ROWS), blocks](x, dy, dx, *context, s1, s2, R, C, G, **tile)
        needs_grad = ctx.needs_input_grad
        return (
            dx, None, dw.sum(0).to(weight.dtype) if needs_grad[2] else None,
            db.sum(0).to(bias.dtype) if needs_grad[3] else None, None, None,
        )  # fmt: skip


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """B, C, R, and the rows of a part, whole tiles of them, and the number of parts."""
    B, C, R = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    part = ROWS * triton.cdiv(R, ROWS * MOST_PARTS)
    return B, C, R, part, triton.cdiv(R, part)
