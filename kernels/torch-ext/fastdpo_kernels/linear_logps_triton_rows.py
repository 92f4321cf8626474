"""Triton: the kernels of `linear_logps` that see rows of hidden, a few at a time.

Target logits before the GEMMs; log-probs and d hidden after them. All are bound by memory and small
beside the GEMMs.
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

from .impls import TokenStats, is_factored
from .linear_logps_triton_math import (
    ARGMAX,
    CALL_INTS,
    FLAG,
    FUSE,
    LOG2E,
    MAX_Z,
    OFFSET,
    SUM_ED,
    SUM_SQ,
    SUM_Z,
    TARGET_E,
    Logits,
    Matrix,
    logit,
    matrix_at,
    slope_at,
)

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
GRAD_WIDTH = (256, 128)  # columns of d hidden at a time; with an adapter 256 need a stack frame


@triton.jit
def _log1p(x):
    # log(w) x / (w - 1) with w = 1 + x rounded: w's rounding error cancels (Kahan).
    w = 1.0 + x
    tiny = w == 1.0
    return tl.where(tiny, x, tl.log(w) * (x / tl.where(tiny, 1.0, w - 1.0)))


@triton.jit(do_not_specialize=CALL_INTS)
def _target_logits_kernel(
    hidden_ptr,  # [n_rows, D], rows contiguous
    weight_ptr,
    adapter_ptr,  # [V, d_adapter] or None
    bias_ptr,
    targets_ptr,  # [n_rows] int64
    target_ptr,  # out: [n_rows] int32, the target, -1 where there is none, -2 outside [0, V)
    z_ptr,  # out: [n_rows] fp32, z_y, 0 where there is no target
    n_rows,
    ignore_index,
    V,
    D,
    stride_hidden,
    d_weight,
    d_adapter,
    stride_weight,
    stride_weight_k,
    stride_adapter,
    logit_scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_rows
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    has = row_ok & (y != ignore_index) & (y >= 0) & (y < V)
    none = tl.where(y == ignore_index, -1, -2)
    y = tl.where(has, y, 0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask = has[:, None] & (ks < D)[None, :]
        at = hidden_ptr + rows[:, None] * stride_hidden + ks[None, :]
        h = tl.load(at, mask=mask, other=0.0)
        w = matrix_at(
            weight_ptr, adapter_ptr, y[:, None], ks[None, :], mask, d_weight, d_adapter,
            stride_weight, stride_weight_k, stride_adapter, h.dtype,
        )  # fmt: skip
        acc += h.to(tl.float32) * w.to(tl.float32)
    raw = tl.sum(acc, 1)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + y, mask=has, other=0.0).to(tl.float32)
    z, _ = logit(raw, logit_scale, cap, SOFTCAP)
    tl.store(z_ptr + rows, tl.where(has, z, 0.0), mask=row_ok)
    tl.store(target_ptr + rows, tl.where(has, y, none).to(tl.int32), mask=row_ok)


@triton.jit(do_not_specialize=CALL_INTS)
def _row_sums_kernel(
    partial_ptr,  # [fields, n_tiles, n_rows]
    z_ptr,
    target_ptr,
    logps_ptr,  # out, like those below: [n_rows] fp32
    share_ptr,  # 1 - p_y
    inverse_ptr,  # 1 / (s_o + s_y)
    lse_ptr,
    flag_ptr,  # int32: the exact kernels have to do this row
    any_flag_ptr,  # [1] int32, becomes 1 if any row is flagged
    entropy_ptr,
    mean_ptr,
    top1_ptr,  # int8
    squares_ptr,
    n_rows,
    n_tiles,
    V,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STATS: tl.constexpr,
):
    """Sums the tiles of a row in the order of the vocabulary, and finishes its log-prob.

    The running sum carries its rounding error along (two-sum): many tiles add no error of their
    own, and the result does not depend on how the vocabulary was chunked.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_rows
    z = tl.load(z_ptr + rows, mask=row_ok, other=0.0)
    target = tl.load(target_ptr + rows, mask=row_ok, other=-1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    error = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    sum_z = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), -1e30, tl.float32)
    column = tl.zeros((BLOCK_N,), tl.int32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n_tiles, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        mask = (tiles < n_tiles)[:, None] & row_ok[None, :]
        at = partial_ptr + tiles.to(tl.int64)[:, None] * n_rows + rows[None, :]
        part = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        new = total + part
        back = new - total
        error += (total - (new - back)) + (part - back)
        total = new
        if STATS:
            field = tl.full((), n_tiles, tl.int64) * n_rows
            weighted += tl.sum(tl.load(at + SUM_ED * field, mask=mask, other=0.0), 0)
            sum_z += tl.sum(tl.load(at + SUM_Z * field, mask=mask, other=0.0), 0)
            tops = tl.load(at + MAX_Z * field, mask=mask, other=-1e30)
            best = tl.max(tops, 0)
            bits = tl.load(at + ARGMAX * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
            at_best = tl.min(tl.where(tops == best[None, :], bits, 2147483647), 0)
            column = tl.where(best > top, at_best, column)
            both = tl.maximum(best, top)
            sq = tl.load(at + SUM_SQ * field, mask=mask, other=0.0)
            sq = tl.sum(sq * tl.exp2((tops - both[None, :]) * (2.0 * LOG2E)), 0)
            squares = squares * tl.exp2((top - both) * (2.0 * LOG2E)) + sq
            top = both
    s_o = total + error
    has = target >= 0
    # -log1p(s_o / s_y); where that quotient leaves fp32, the same by logarithms
    far = tl.log(s_o) + OFFSET * LN2
    logp = -tl.where(s_o < 1e18, _log1p(s_o * (1.0 / TARGET_E)), far)
    inverse = 1.0 / (s_o + TARGET_E)
    # s_o may be NaN where z_y is -inf: -inf less -inf
    flag = has & ((s_o >= FLAG) | (z == float("-inf")))
    # NaN where the target is outside the vocabulary
    none = tl.where(target == -2, float("nan"), 0.0)
    tl.store(logps_ptr + rows, tl.where(has, logp, none), mask=row_ok)
    tl.store(share_ptr + rows, tl.where(has, s_o * inverse, 0.0), mask=row_ok)
    tl.store(inverse_ptr + rows, tl.where(has, inverse, 0.0), mask=row_ok)
    tl.store(lse_ptr + rows, tl.where(has, z - logp, 0.0), mask=row_ok)
    tl.store(flag_ptr + rows, flag.to(tl.int32), mask=row_ok)
    tl.store(any_flag_ptr + rows * 0, tl.full((BLOCK_N,), 1, tl.int32), mask=flag & row_ok)
    if STATS:
        # -sum p log p with log p_v = (z_v - z_y) + logp
        tl.store(entropy_ptr + rows, tl.where(has, -logp - weighted * inverse, none), mask=row_ok)
        tl.store(mean_ptr + rows, tl.where(has, sum_z / V, none), mask=row_ok)
        tl.store(top1_ptr + rows, (has & (column == target)).to(tl.int8), mask=row_ok)
        log_squares = tl.log(squares) + 2.0 * (top - (z - logp))
        tl.store(squares_ptr + rows, tl.where(has, log_squares, none), mask=row_ok)


@triton.jit(do_not_specialize=CALL_INTS)
def _hidden_grad_kernel(
    product_ptr,  # [n_splits, n_rows, D] fp32: E @ W in parts
    weight_ptr,
    adapter_ptr,  # [V, d_adapter] or None
    target_ptr,
    z_ptr,
    share_ptr,
    inverse_ptr,
    out_ptr,  # [n_rows, D], contiguous
    n_rows,
    n_splits,
    D,
    d_weight,
    d_adapter,
    stride_weight,
    stride_weight_k,
    stride_adapter,
    slope,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTORED: tl.constexpr,
):
    """slope * ((1 - p_y) slope_y W[y] - (E @ W) / (s_o + s_y)); 0 where there is no target.

    FACTORED: that divided by slope * (1 - p_y), and 0 where 1 - p_y is.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_ok = rows < n_rows
    target = tl.load(target_ptr + rows, mask=row_ok, other=-1)
    has = target >= 0
    z = tl.load(z_ptr + rows, mask=row_ok, other=0.0)
    share = tl.load(share_ptr + rows, mask=row_ok, other=0.0)
    at_y = share * slope_at(z, cap, SOFTCAP)
    inverse = tl.load(inverse_ptr + rows, mask=row_ok, other=0.0)
    mask = has[:, None] & (ks < D)[None, :]
    at = rows[:, None] * D + ks[None, :]
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for split in range(0, n_splits):
        part = tl.full((), split, tl.int64) * n_rows * D
        product += tl.load(product_ptr + part + at, mask=mask, other=0.0)
    y = tl.maximum(target, 0).to(tl.int64)
    w = matrix_at(
        weight_ptr, adapter_ptr, y[:, None], ks[None, :], mask, d_weight, d_adapter,
        stride_weight, stride_weight_k, stride_adapter, out_ptr.dtype.element_ty,
    ).to(tl.float32)  # fmt: skip
    grad = at_y[:, None] * w - inverse[:, None] * product
    if FACTORED:
        grad = grad / tl.where(share == 0.0, 1.0, share)[:, None]
    else:
        grad = slope * grad
    grad = tl.where(has[:, None], grad, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, grad, mask=row_ok[:, None] & (ks < D)[None, :])


def target_logits(
    hidden: Tensor,
    matrix: Matrix,
    targets: Tensor,
    target: Tensor,
    z: Tensor,
    *,
    ignore_index: int,
    logits: Logits,
) -> None:
    """Writes the target [N] int32 (-1: none; -2: outside the vocabulary) and its logit z [N]."""
    n, d = hidden.shape
    _target_logits_kernel[(triton.cdiv(n, 4),)](
        hidden, *matrix.pointers, logits.bias, targets, target, z,
        n, ignore_index, matrix.v, d, hidden.stride(0), *matrix.layout,
        logits.scale, logits.cap,
        BLOCK_N=4, BLOCK_K=width(d, 512), SOFTCAP=logits.softcap, num_warps=4, **FUSE,
    )  # fmt: skip


def row_sums(
    partial: Tensor,
    z: Tensor,
    target: Tensor,
    logps: Tensor,
    share: Tensor,
    inverse: Tensor,
    lse: Tensor,
    flag: Tensor,
    any_flag: Tensor,
    stats: TokenStats | None,
    *,
    v: int,
) -> None:
    """From the tiles' sums `partial` [fields, tiles, n] to everything about n rows; see the kernel.

    `stats` holds the tensors to fill, all four of them.
    """
    n = len(z)
    every = (None,) * 4
    if stats is not None:
        every = (stats.entropy, stats.mean_logits, stats.is_top1, stats.log_sum_sq_probs)
    _row_sums_kernel[(triton.cdiv(n, 32),)](
        partial, z, target, logps, share, inverse, lse, flag, any_flag, *every,
        n, partial.shape[1], v,
        BLOCK_N=32, BLOCK_T=64, STATS=stats is not None, num_warps=4, **FUSE,
    )  # fmt: skip


def hidden_grad(
    product: Tensor,
    matrix: Matrix,
    target: Tensor,
    z: Tensor,
    share: Tensor,
    inverse: Tensor,
    out: Tensor,
    *,
    logits: Logits,
) -> None:
    """`ForwardResult.hidden_grad` [n, D] from `product` [splits, n, D], E @ W in parts."""
    n, d = out.shape
    block = width(d, GRAD_WIDTH[matrix.adapter is not None])
    _hidden_grad_kernel[(triton.cdiv(n, 8), triton.cdiv(d, block))](
        product, *matrix.pointers, target, z, share, inverse, out,
        n, product.shape[0], d, *matrix.layout, logits.slope, logits.cap,
        BLOCK_N=8, BLOCK_K=block, SOFTCAP=logits.softcap, FACTORED=is_factored(out.dtype),
        num_warps=4, **FUSE,
    )  # fmt: skip


def width(d: int, most: int) -> int:
    """Columns that a program takes of d, at most `most`."""
    return min(most, max(16, 1 << (d - 1).bit_length()))
