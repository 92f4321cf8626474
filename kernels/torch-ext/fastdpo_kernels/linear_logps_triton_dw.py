"""Triton: the kernels of `linear_logps` for the head's gradient, beside its GEMM.

dW's operand, its target rows and the bias's column sums: one writer each, no atomics.
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logps_triton_math import CALL_INTS, FUSE
from .linear_logps_triton_rows import width

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=CALL_INTS)
def _dw_operand_kernel(
    hidden_ptr,
    target_ptr,
    factor_ptr,  # [n_rows] fp32 or None
    out_ptr,  # [n_rows, D], contiguous
    n_rows,
    D,
    stride_hidden,
    stride_hidden_k,
    ROUNDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden, rounded as it was multiplied, times a factor per row, in the dtype of the GEMM; 0
    where there is no target, NaN or not. PARTS: hidden [n_rows, PARTS * D] is a sum of so many."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_ok = rows < n_rows
    has = tl.load(target_ptr + rows, mask=row_ok, other=-1) >= 0
    inside = (ks < D)[None, :]
    k_at = ks.to(tl.int64)[None, :] * stride_hidden_k
    at = hidden_ptr + rows[:, None] * stride_hidden + k_at
    h = tl.load(at, mask=has[:, None] & inside, other=0.0).to(ROUNDED)
    if PARTS == 2:
        low = tl.load(
            at + tl.full((), D, tl.int64) * stride_hidden_k, mask=has[:, None] & inside, other=0.0
        )
        h = h.to(tl.float32) + low.to(tl.float32)
    if factor_ptr is not None:
        h = h.to(tl.float32) * tl.load(factor_ptr + rows, mask=has, other=0.0)[:, None]
    out = out_ptr + rows[:, None] * D + ks[None, :]
    tl.store(out, h.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & inside)


@triton.jit(do_not_specialize=CALL_INTS)
def _target_rows_kernel(
    sorted_ptr,  # [n_rows] int32, the targets in order
    order_ptr,  # [n_rows] int64, whose they are
    coefficient_ptr,  # [n_rows] fp32
    hidden_ptr,
    dw_ptr,  # [V, D], contiguous, or None
    db_ptr,  # [V] fp32 or None
    n_rows,
    D,
    stride_hidden,
    stride_hidden_k,
    ROUNDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW[y] += sum of coefficient * hidden over the rows whose target is y, in the order of rows;
    db[y] likewise, without hidden.

    Program i does the run of equal targets that starts at i; it has nothing to do if none does.
    """
    first = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = ks < D
    y = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if (y >= 0) & (y != before):
        total = tl.zeros((BLOCK_K,), tl.float32)
        bias_total = 0.0
        at = first + tl.arange(0, BLOCK_R)
        same = tl.load(sorted_ptr + at, mask=at < n_rows, other=-1) == y
        while tl.max(same.to(tl.int32), 0) > 0:
            row = tl.load(order_ptr + at, mask=same, other=0)
            c = tl.load(coefficient_ptr + row, mask=same, other=0.0)
            if dw_ptr is not None:
                k_at = ks.to(tl.int64)[None, :] * stride_hidden_k
                h_at = hidden_ptr + row[:, None] * stride_hidden + k_at
                h = tl.load(h_at, mask=same[:, None] & inside[None, :], other=0.0)
                h = h.to(ROUNDED).to(tl.float32)
                if PARTS == 2:
                    low_at = h_at + tl.full((), D, tl.int64) * stride_hidden_k
                    low = tl.load(low_at, mask=same[:, None] & inside[None, :], other=0.0)
                    h += low.to(tl.float32)
                total += tl.sum(h * c[:, None], 0)
            bias_total += tl.sum(c, 0)
            at += BLOCK_R
            same = tl.load(sorted_ptr + at, mask=at < n_rows, other=-1) == y
        if dw_ptr is not None:
            out = dw_ptr + y.to(tl.int64) * D + ks
            old = tl.load(out, mask=inside, other=0.0).to(tl.float32)
            tl.store(out, (old + total).to(dw_ptr.dtype.element_ty), mask=inside)
        if db_ptr is not None:
            if tl.program_id(1) == 0:
                tl.store(db_ptr + y, tl.load(db_ptr + y) + bias_total)


@triton.jit(do_not_specialize=CALL_INTS)
def _column_sums_kernel(
    e_ptr,  # [n_rows, end_col]
    factor_ptr,  # [n_rows] fp32 or None
    out_ptr,  # [end_col] fp32
    n_rows,
    end_col,
    stride_e,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out[v] (+)= sum over rows of factor * E."""
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = cols < end_col
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, n_rows, BLOCK_R):
        rows = tl.full((), first, tl.int64) + tl.arange(0, BLOCK_R)
        row_ok = rows < n_rows
        at = e_ptr + rows[:, None] * stride_e + cols[None, :]
        e = tl.load(at, mask=row_ok[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if factor_ptr is not None:
            e = e * tl.load(factor_ptr + rows, mask=row_ok, other=0.0)[:, None]
        total += tl.sum(e, 0)
    if ADD:
        total += tl.load(out_ptr + cols, mask=inside, other=0.0)
    tl.store(out_ptr + cols, total, mask=inside)


def dw_operand(
    hidden: Tensor, target: Tensor, factor: Tensor | None, out: Tensor, rounded: torch.dtype
) -> None:
    """out [n, D] = factor * hidden, 0 where there is no target; hidden may be in parts."""
    n, d = out.shape
    block = width(d, 512)
    _dw_operand_kernel[(triton.cdiv(n, 4), triton.cdiv(d, block))](
        hidden, target, factor, out, n, d, *hidden.stride(), ROUNDED=_TYPES[rounded],
        PARTS=hidden.shape[1] // d, BLOCK_N=4, BLOCK_K=block, num_warps=4, **FUSE,
    )  # fmt: skip


def add_target_rows(
    target: Tensor,
    coefficient: Tensor,
    hidden: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    rounded: torch.dtype,
) -> None:
    """dW[target_n] += coefficient_n hidden_n (db likewise): sorted, one writer per row of dW."""
    n, d = len(hidden), hidden.shape[1] if dw is None else dw.shape[1]
    block = width(d, 512)
    ordered, order = target.sort(stable=True)
    _target_rows_kernel[(n, 1 if dw is None else triton.cdiv(d, block))](
        ordered, order, coefficient, hidden, dw, db, n, d, *hidden.stride(),
        ROUNDED=_TYPES[rounded], PARTS=hidden.shape[1] // d,
        BLOCK_R=8, BLOCK_K=block, num_warps=4, **FUSE,
    )  # fmt: skip


def column_sums(e: Tensor, factor: Tensor | None, out: Tensor, *, add: bool) -> None:
    """out [c] (+)= sum over the rows of `e` [n, c] of factor * e."""
    n, c = e.shape
    _column_sums_kernel[(triton.cdiv(c, 64),)](
        e, factor, out, n, c, e.stride(0),
        ADD=add, BLOCK_R=64, BLOCK_V=64, num_warps=4, **FUSE,
    )  # fmt: skip
