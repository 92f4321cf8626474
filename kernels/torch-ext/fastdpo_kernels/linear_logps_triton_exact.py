"""Triton: rows of `linear_logps` that the fixed reference cannot hold, done exactly.

Those with logp < -99.8, -inf among them: targets that a bias of -inf took out of the vocabulary.
Two kernels, always launched, so that the host never waits for a device to hear whether any row was
flagged; without flagged rows they return at once. They work with the row's own largest logit, in
blocks of 16 rows, and are right for any row, but slow: one multiprocessor reads all of W for each
slice of D (predicted, not measured: some 10 ms per flagged block at V = 128k, D = 4096).
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

from .impls import TokenStats, is_factored
from .linear_logps_triton_math import (
    CALL_INTS,
    FUSE,
    LOG2E,
    LOWEST,
    MOST_REGISTERS,
    Logits,
    Matrix,
    logit,
    matrix_at,
    slope_at,
)

ROWS = 16
FIELDS = 5  # of a split's partial results: max, sum e, sum e (z - max), sum z, sum e^2
MOST_SPLITS = 16
# By the bytes of an operand's element: blocks.
BLOCKS = {
    2: {"BLOCK_N": ROWS, "BLOCK_V": 32, "BLOCK_K": 32},
    4: {"BLOCK_N": ROWS, "BLOCK_V": 64, "BLOCK_K": 16},
}
BLOCK_D = {2: 128, 4: 64}
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": MOST_REGISTERS}


@triton.jit
def _products(
    hidden_ptr, weight_ptr, adapter_ptr, rows, row_ok, cols, V, D,
    stride_hidden, d_weight, d_adapter, stride_weight, stride_weight_k, stride_adapter,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    w_rows = cols.to(tl.int64)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        at = hidden_ptr + rows[:, None] * stride_hidden + ks[None, :]
        h = tl.load(at, mask=row_ok[:, None] & (ks < D)[None, :], other=0.0)
        w = matrix_at(
            weight_ptr, adapter_ptr, w_rows[None, :], ks[:, None],
            (cols < V)[None, :] & (ks < D)[:, None], d_weight, d_adapter,
            stride_weight, stride_weight_k, stride_adapter, h.dtype,
        )  # fmt: skip
        acc = tl.dot(h, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _logits_of(
    product, bias_ptr, cols, V, logit_scale, cap, SOFTCAP: tl.constexpr
):  # z and its slope; -inf past the vocabulary
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0)
        product += bias.to(tl.float32)[None, :]
    z, slope = logit(product, logit_scale, cap, SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.where((cols < V)[None, :], z, float("-inf")), slope


@triton.jit(do_not_specialize=CALL_INTS)
def _exact_sums_kernel(
    hidden_ptr,
    weight_ptr,
    adapter_ptr,
    bias_ptr,
    target_ptr,
    flag_ptr,
    any_flag_ptr,
    split_ptr,  # out: [FIELDS, n_splits, n_rows] fp32
    n_rows,
    n_splits,
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
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """What a flagged row sums to over its part of the vocabulary, relative to its maximum there."""
    width = tl.cdiv(tl.cdiv(V, n_splits), BLOCK_V) * BLOCK_V
    items = tl.cdiv(n_rows, BLOCK_N) * n_splits * tl.load(any_flag_ptr)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % n_splits
        rows = (item // n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        flag = tl.load(flag_ptr + rows, mask=rows < n_rows, other=0) != 0
        if tl.max(flag.to(tl.int32), 0) > 0:
            target = tl.load(target_ptr + rows, mask=flag, other=-1)
            top = tl.full((BLOCK_N,), -1e30, tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            weighted = tl.zeros((BLOCK_N,), tl.float32)
            sum_z = tl.zeros((BLOCK_N,), tl.float32)
            squares = tl.zeros((BLOCK_N,), tl.float32)
            end = min(V, (split + 1) * width)
            for first in range(split * width, end, BLOCK_V):
                cols = first + tl.arange(0, BLOCK_V)
                product = _products(
                    hidden_ptr, weight_ptr, adapter_ptr, rows, flag, cols, V, D,
                    stride_hidden, d_weight, d_adapter, stride_weight, stride_weight_k,
                    stride_adapter, BLOCK_N, BLOCK_V, BLOCK_K,
                )  # fmt: skip
                z, _ = _logits_of(product, bias_ptr, cols, V, logit_scale, cap, SOFTCAP)
                sum_z += tl.sum(tl.where((cols < V)[None, :], z, 0.0), 1)
                z = tl.where(cols[None, :] == target[:, None], float("-inf"), z)
                new = tl.maximum(top, tl.max(z, 1))
                fade = tl.exp2((top - new) * LOG2E)
                d = z - new[:, None]
                e = tl.exp2(d * LOG2E)
                weighted = (weighted + total * (top - new)) * fade
                weighted += tl.sum(e * tl.maximum(d, LOWEST), 1)
                total = total * fade + tl.sum(e, 1)
                squares = squares * fade * fade + tl.sum(e * e, 1)
                top = new
            field = tl.full((), n_splits, tl.int64) * n_rows
            out = split_ptr + split.to(tl.int64) * n_rows + rows
            tl.store(out, top, mask=flag)
            tl.store(out + field, total, mask=flag)
            tl.store(out + 2 * field, weighted, mask=flag)
            tl.store(out + 3 * field, sum_z, mask=flag)
            tl.store(out + 4 * field, squares, mask=flag)


@triton.jit(do_not_specialize=CALL_INTS)
def _exact_rows_kernel(
    hidden_ptr,
    weight_ptr,
    adapter_ptr,
    bias_ptr,
    target_ptr,
    z_ptr,
    flag_ptr,
    any_flag_ptr,
    split_ptr,
    logps_ptr,  # out, like those below, at flagged rows only: [n_rows]
    share_ptr,
    inverse_ptr,
    lse_ptr,
    grad_ptr,  # [n_rows, D], contiguous, or None
    e_ptr,  # [n_rows, V] or None
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    squares_ptr,
    n_rows,
    n_splits,
    V,
    D,
    stride_hidden,
    d_weight,
    d_adapter,
    stride_weight,
    stride_weight_k,
    stride_adapter,
    stride_e,
    logit_scale,
    cap,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    FACTORED: tl.constexpr,
):
    """Joins the splits; then d hidden (a slice of D per program) and E of the flagged rows.

    Their E is p itself, so their factor for dW is 1 where other rows have 1 / (s_o + s_y).
    FACTORED: d hidden is divided by slope * (1 - p_y), as in `_hidden_grad_kernel`.
    """
    slices = 1
    if grad_ptr is not None:
        slices = tl.cdiv(D, BLOCK_D)
    items = tl.cdiv(n_rows, BLOCK_N) * slices * tl.load(any_flag_ptr)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = item % slices
        rows = (item // slices).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        flag = tl.load(flag_ptr + rows, mask=rows < n_rows, other=0) != 0
        if tl.max(flag.to(tl.int32), 0) > 0:
            target = tl.load(target_ptr + rows, mask=flag, other=-1)
            z_y = tl.load(z_ptr + rows, mask=flag, other=0.0)
            splits = tl.arange(0, BLOCK_S)
            mask = (splits < n_splits)[:, None] & flag[None, :]
            at = split_ptr + splits.to(tl.int64)[:, None] * n_rows + rows[None, :]
            field = tl.full((), n_splits, tl.int64) * n_rows
            tops = tl.load(at, mask=mask, other=-1e30)
            top = tl.max(tops, 0)
            fade = tl.exp2((tops - top[None, :]) * LOG2E)
            sums = tl.load(at + field, mask=mask, other=0.0)
            total = tl.sum(sums * fade, 0)
            # log-odds of "not y", and from them logp = -softplus
            others = top + tl.log(total)
            others = tl.where(others < -1e30, -1e30, others)  # no other column: not -inf
            far = others - z_y
            shrink = tl.exp2(-tl.abs(far) * LOG2E)
            logp = -(tl.maximum(far, 0.0) + tl.log(1.0 + shrink))
            lse = tl.maximum(others, z_y) + tl.log(1.0 + shrink)  # z_y and logp may be -inf
            share = tl.where(far > 0, 1.0, shrink) / (1.0 + shrink)
            if part == 0:
                tl.store(logps_ptr + rows, logp, mask=flag)
                tl.store(share_ptr + rows, share, mask=flag)
                tl.store(inverse_ptr + rows, tl.full((BLOCK_N,), 1.0, tl.float32), mask=flag)
                tl.store(lse_ptr + rows, lse, mask=flag)
                if STATS:
                    weighted = tl.load(at + 2 * field, mask=mask, other=0.0)
                    weighted += sums * tl.maximum(tops - top[None, :], LOWEST)
                    weighted = tl.sum(weighted * fade, 0)
                    entropy = share * (lse - top - weighted / total)
                    entropy -= tl.exp2(logp * LOG2E) * tl.maximum(logp, LOWEST)
                    tl.store(entropy_ptr + rows, entropy, mask=flag)
                    sum_z = tl.sum(tl.load(at + 3 * field, mask=mask, other=0.0), 0)
                    tl.store(mean_ptr + rows, sum_z / V, mask=flag)
                    tl.store(top1_ptr + rows, (z_y > top).to(tl.int8), mask=flag)
                    squares = tl.load(at + 4 * field, mask=mask, other=0.0)
                    squares = tl.sum(squares * fade * fade, 0)
                    squares = squares * tl.exp2((top - lse) * (2.0 * LOG2E))
                    squares += tl.exp2(logp * (2.0 * LOG2E))
                    tl.store(squares_ptr + rows, tl.log(squares), mask=flag)
            if (grad_ptr is not None) or (e_ptr is not None):
                ds = part * BLOCK_D + tl.arange(0, BLOCK_D)
                acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                for first in range(0, V, BLOCK_V):
                    cols = first + tl.arange(0, BLOCK_V)
                    product = _products(
                        hidden_ptr, weight_ptr, adapter_ptr, rows, flag, cols, V, D,
                        stride_hidden, d_weight, d_adapter, stride_weight, stride_weight_k,
                        stride_adapter, BLOCK_N, BLOCK_V, BLOCK_K,
                    )  # fmt: skip
                    z, flat = _logits_of(product, bias_ptr, cols, V, logit_scale, cap, SOFTCAP)
                    # as a share of 1 - p_y
                    d = z - others[:, None]
                    p = tl.exp2(tl.where(d > 0.0, 0.0, d) * LOG2E)  # a minimum would drop NaN
                    p = tl.where(cols[None, :] == target[:, None], 0.0, p) * flat
                    if e_ptr is not None:
                        if part == 0:
                            out = e_ptr + rows[:, None] * stride_e + cols[None, :]
                            inside = flag[:, None] & (cols < V)[None, :]
                            e = p * share[:, None]
                            tl.store(out, e.to(e_ptr.dtype.element_ty), mask=inside)
                    if grad_ptr is not None:
                        w = matrix_at(
                            weight_ptr, adapter_ptr, cols.to(tl.int64)[:, None], ds[None, :],
                            (cols < V)[:, None] & (ds < D)[None, :], d_weight, d_adapter,
                            stride_weight, stride_weight_k, stride_adapter,
                            hidden_ptr.dtype.element_ty,
                        )  # fmt: skip
                        if FACTORED:  # fp16's range ends at 2^-24
                            p = p * 16384.0
                        p = p.to(hidden_ptr.dtype.element_ty)
                        acc = tl.dot(p, w, acc, input_precision="ieee")
                if grad_ptr is not None:
                    y = tl.maximum(target, 0).to(tl.int64)
                    inside = flag[:, None] & (ds < D)[None, :]
                    w = matrix_at(
                        weight_ptr, adapter_ptr, y[:, None], ds[None, :], inside,
                        d_weight, d_adapter, stride_weight, stride_weight_k, stride_adapter,
                        hidden_ptr.dtype.element_ty,
                    ).to(tl.float32)  # fmt: skip
                    if FACTORED:
                        acc = acc * (1.0 / 16384.0)
                    at_y = slope_at(z_y, cap, SOFTCAP) + tl.zeros((BLOCK_N,), tl.float32)
                    grad = at_y[:, None] * w - acc
                    if FACTORED:
                        grad = tl.where(share[:, None] == 0.0, 0.0, grad)
                    else:
                        grad = slope * share[:, None] * grad
                    grad = grad.to(grad_ptr.dtype.element_ty)
                    tl.store(grad_ptr + rows[:, None] * D + ds[None, :], grad, mask=inside)


def splits_of(n_tiles: int) -> int:
    """Parts of the vocabulary that the first kernel sums apart."""
    return min(MOST_SPLITS, n_tiles)


def exact_rows(
    hidden: Tensor,
    matrix: Matrix,
    target: Tensor,
    z: Tensor,
    flag: Tensor,
    any_flag: Tensor,
    scratch: Tensor,
    logps: Tensor,
    share: Tensor,
    inverse: Tensor,
    lse: Tensor,
    grad: Tensor | None,
    e: Tensor | None,
    stats: TokenStats | None,
    *,
    logits: Logits,
    splits: int,
    programs: int,
) -> None:
    """Does flagged rows again: log-prob, d hidden, kept E [n, V], statistics.

    Rows of `hidden` [n, D] are contiguous.
    `scratch` holds FIELDS * splits * n fp32.
    """
    (n, d), v = hidden.shape, matrix.v
    width = hidden.element_size()
    blocks = {
        **BLOCKS[width],
        "SOFTCAP": logits.softcap,
        **OPTIONS,
        **FUSE,
    }
    every = (None,) * 4
    if stats is not None:
        every = (stats.entropy, stats.mean_logits, stats.is_top1, stats.log_sum_sq_probs)
    layout = (hidden.stride(0), *matrix.layout)
    _exact_sums_kernel[(programs,)](
        hidden, *matrix.pointers, logits.bias, target, flag, any_flag, scratch,
        n, splits, v, d, *layout, logits.scale, logits.cap, **blocks,
    )  # fmt: skip
    _exact_rows_kernel[(programs,)](
        hidden, *matrix.pointers, logits.bias, target, z, flag, any_flag, scratch,
        logps, share, inverse, lse, grad, e, *every,
        n, splits, v, d, *layout, 0 if e is None else e.stride(0),
        logits.scale, logits.cap, logits.slope,
        BLOCK_D=BLOCK_D[width], BLOCK_S=MOST_SPLITS, STATS=stats is not None,
        FACTORED=is_factored(hidden.dtype), **blocks,
    )  # fmt: skip
