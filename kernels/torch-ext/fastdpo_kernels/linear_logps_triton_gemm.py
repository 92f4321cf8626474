"""Triton: the GEMM of `linear_logps` with an exponential epilogue.

E = exp(logits - reference) of a part of the vocabulary, written or only summed. One epilogue serves
three kernels: operands by pointers, by tensor descriptors (TMA), or products of a library GEMM.
fp32 accumulation; fp32 operands are multiplied as they are ("ieee": never rounded to TF32). Rows
and columns are int64 before they meet a stride. No atomics: every element has one writer.
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_logps_triton_math import (
    ARGMAX,
    CALL_INTS,
    CLAMP,
    FUSE,
    LOG2E,
    LOWEST,
    MAX_Z,
    MOST_REGISTERS,
    OFFSET,
    SUM_ED,
    SUM_SQ,
    SUM_Z,
    Logits,
    logit,
)
from .tiles import Gemm


@triton.jit
def _tile_of(index, tiles_n, tiles_v, group):
    # `group` row blocks by all column blocks, rows fastest: programs that run together share
    # operands in L2.
    per_group = group * tiles_v
    first = (index // per_group) * group
    height = min(tiles_n - first, group)
    inside = index % per_group
    return first + inside % height, inside // height


@triton.jit
def _exponentials(
    product,  # [BLOCK_N, BLOCK_V]
    rows,  # [BLOCK_N] int64
    first_col,  # of the tile, in the whole vocabulary
    tile,  # which BLOCK_V of the vocabulary this is
    n_rows,
    end_col,
    n_tiles,
    ref_ptr,
    target_ptr,
    bias_ptr,
    row_scale_ptr,
    partial_ptr,
    logit_scale,
    cap,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What E holds for this tile (if STORE); writes the tile's sums to `partial`.

    With a `row_scale` (the gradient's second pass) ref is the log-sum-exp, E = row_scale * p, and
    nothing is summed; without one ref is z_y. The target's column is 0, as are rows without target.
    """
    row_ok = rows < n_rows
    cols = first_col + tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + rows, mask=row_ok, other=-1)
    ref = tl.load(ref_ptr + rows, mask=row_ok, other=0.0)
    # A row without target has e = 0, whatever it holds: even NaN, which 0 would not silence in dW.
    product = tl.where((target >= 0)[:, None], product, 0.0)
    ref = tl.where(target >= 0, ref, float("inf"))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < end_col, other=0.0)
        product += bias.to(tl.float32)[None, :]
    z, slope = logit(product, logit_scale, cap, SOFTCAP)
    d = z - ref[:, None]
    if row_scale_ptr is None:
        e = tl.exp2(tl.minimum(d * LOG2E - OFFSET, CLAMP))
    else:
        e = tl.exp2(tl.minimum(d * LOG2E, 0.0))
    e = tl.where(cols[None, :] != target[:, None], e, 0.0)
    if first_col + BLOCK_V > end_col:  # only the last tile pays for its mask
        e = tl.where((cols < end_col)[None, :], e, 0.0)
    if row_scale_ptr is None:
        tl.store(partial_ptr + tile.to(tl.int64) * n_rows + rows, tl.sum(e, 1), mask=row_ok)
        if STATS:
            out = partial_ptr + (tile + SUM_ED * n_tiles).to(tl.int64) * n_rows + rows
            tl.store(out, tl.sum(e * tl.maximum(d, LOWEST), 1), mask=row_ok)
            out = partial_ptr + (tile + SUM_Z * n_tiles).to(tl.int64) * n_rows + rows
            col_ok = (cols < end_col)[None, :]
            tl.store(out, tl.sum(tl.where(col_ok, z, 0.0), 1), mask=row_ok)
            inside = tl.where(col_ok, z, float("-inf"))
            top, column = tl.max(inside, 1, return_indices=True)
            out = partial_ptr + (tile + MAX_Z * n_tiles).to(tl.int64) * n_rows + rows
            tl.store(out, top, mask=row_ok)
            column = column.to(tl.int32) + first_col
            out = partial_ptr + (tile + ARGMAX * n_tiles).to(tl.int64) * n_rows + rows
            tl.store(out, column.to(tl.float32, bitcast=True), mask=row_ok)
            square = tl.exp2((inside - tl.maximum(top, -1e30)[:, None]) * (2.0 * LOG2E))
            out = partial_ptr + (tile + SUM_SQ * n_tiles).to(tl.int64) * n_rows + rows
            tl.store(out, tl.sum(square, 1), mask=row_ok)
    if STORE:
        e = e * slope
        if row_scale_ptr is not None:
            e = e * tl.load(row_scale_ptr + rows, mask=row_ok, other=0.0)[:, None]
    return e


@triton.jit(do_not_specialize=CALL_INTS)
def _exp_gemm_kernel(
    hidden_ptr,  # [n_rows, D]
    weight_ptr,  # [end_col - first_col, D], the same dtype
    e_ptr,  # [n_rows, end_col - first_col] or None
    ref_ptr,  # [n_rows] fp32
    target_ptr,  # [n_rows] int32, -1: no target
    bias_ptr,  # [V] or None
    row_scale_ptr,  # [n_rows] fp32 or None
    partial_ptr,  # [fields, n_tiles, n_rows] fp32 or None
    n_rows,
    first_col,
    end_col,
    first_tile,
    n_tiles,
    D,
    group,
    stride_hidden,
    stride_weight,
    stride_e,
    logit_scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of E per program, operands by pointers: any dtype, any alignment."""
    tiles_n = tl.cdiv(n_rows, BLOCK_N)
    tiles_v = tl.cdiv(end_col - first_col, BLOCK_V)
    block_n, block_v = _tile_of(tl.program_id(0), tiles_n, tiles_v, group)
    rows = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_col + block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    # Rows and columns past the end read the last one again: no mask in the loop, and their
    # results are dropped.
    h_rows = tl.minimum(rows, n_rows - 1)
    w_rows = tl.minimum(cols, end_col - 1).to(tl.int64) - first_col
    ks = tl.arange(0, BLOCK_K)
    h_ptrs = hidden_ptr + h_rows[:, None] * stride_hidden + ks[None, :]
    w_ptrs = weight_ptr + w_rows[None, :] * stride_weight + ks[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            h = tl.load(h_ptrs, mask=(ks < D - k)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < D - k)[:, None], other=0.0)
        product = tl.dot(h, w, product, input_precision="ieee")
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    e = _exponentials(
        product, rows, first_col + block_v * BLOCK_V, first_tile + block_v,
        n_rows, end_col, n_tiles,
        ref_ptr, target_ptr, bias_ptr, row_scale_ptr, partial_ptr, logit_scale, cap,
        SOFTCAP, STATS, e_ptr is not None, BLOCK_V,
    )  # fmt: skip
    if e_ptr is not None:
        out = e_ptr + rows[:, None] * stride_e + (cols - first_col)[None, :]
        inside = (rows < n_rows)[:, None] & (cols < end_col)[None, :]
        tl.store(out, e.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _descriptor_tile(
    index, hidden_desc, weight_desc, e_desc, ref_ptr, target_ptr, bias_ptr, row_scale_ptr,
    partial_ptr, n_rows, first_col, end_col, first_tile, n_tiles, D, group, logit_scale, cap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, E_DTYPE: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n_rows, BLOCK_N)
    tiles_v = tl.cdiv(end_col - first_col, BLOCK_V)
    block_n, block_v = _tile_of(index, tiles_n, tiles_v, group)
    row = block_n * BLOCK_N
    col = block_v * BLOCK_V
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_K):
        h = hidden_desc.load([row, k])
        w = weight_desc.load([col, k])
        product = tl.dot(h, w.T, product)
    e = _exponentials(
        product, row.to(tl.int64) + tl.arange(0, BLOCK_N), first_col + col, first_tile + block_v,
        n_rows, end_col, n_tiles,
        ref_ptr, target_ptr, bias_ptr, row_scale_ptr, partial_ptr, logit_scale, cap,
        SOFTCAP, STATS, e_desc is not None, BLOCK_V,
    )  # fmt: skip
    if e_desc is not None:
        e_desc.store([row, col], e.to(E_DTYPE))


@triton.jit(do_not_specialize=CALL_INTS)
def _exp_gemm_descriptor_kernel(
    hidden_desc,  # [n_rows, D] in blocks [BLOCK_N, BLOCK_K]
    weight_desc,  # [end_col - first_col, D] in blocks [BLOCK_V, BLOCK_K]
    e_desc,  # [n_rows, end_col - first_col] in blocks [BLOCK_N, BLOCK_V], or None
    ref_ptr,
    target_ptr,
    bias_ptr,
    row_scale_ptr,
    partial_ptr,
    n_rows,
    first_col,
    end_col,
    first_tile,
    n_tiles,
    D,
    group,
    logit_scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    E_DTYPE: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """The same, operands by tensor descriptors (TMA): 16-bit, rows on 16-byte boundaries.

    PERSISTENT: program i takes tiles i, i + grid, ... in one flattened loop, so that a tile's loads
    overlap the epilogue of the tile before. Otherwise a program has one tile, E's shared memory
    lies over the operands', and two programs fit on a multiprocessor and overlap each other.
    """
    if PERSISTENT:
        tiles = tl.cdiv(n_rows, BLOCK_N) * tl.cdiv(end_col - first_col, BLOCK_V)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _descriptor_tile(
                index, hidden_desc, weight_desc, e_desc, ref_ptr, target_ptr, bias_ptr,
                row_scale_ptr, partial_ptr, n_rows, first_col, end_col, first_tile, n_tiles, D,
                group, logit_scale, cap, BLOCK_N, BLOCK_V, BLOCK_K, SOFTCAP, STATS, E_DTYPE,
            )  # fmt: skip
    else:
        _descriptor_tile(
            tl.program_id(0), hidden_desc, weight_desc, e_desc, ref_ptr, target_ptr, bias_ptr,
            row_scale_ptr, partial_ptr, n_rows, first_col, end_col, first_tile, n_tiles, D,
            group, logit_scale, cap, BLOCK_N, BLOCK_V, BLOCK_K, SOFTCAP, STATS, E_DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=CALL_INTS)
def _exp_tile_kernel(
    product_ptr,  # [n_rows, end_col - first_col] fp32
    e_ptr,  # the same shape, or None; may be `product` itself
    ref_ptr,
    target_ptr,
    bias_ptr,
    row_scale_ptr,
    partial_ptr,
    n_rows,
    first_col,
    end_col,
    first_tile,
    n_tiles,
    stride_product,
    stride_e,
    logit_scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
):
    """The epilogue alone, on the products of a library GEMM."""
    block_v = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_col + block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < n_rows)[:, None] & (cols < end_col)[None, :]
    at = product_ptr + rows[:, None] * stride_product + (cols - first_col)[None, :]
    e = _exponentials(
        tl.load(at, mask=inside, other=0.0), rows, first_col + block_v * BLOCK_V,
        first_tile + block_v,
        n_rows, end_col, n_tiles,
        ref_ptr, target_ptr, bias_ptr, row_scale_ptr, partial_ptr, logit_scale, cap,
        SOFTCAP, STATS, e_ptr is not None, BLOCK_V,
    )  # fmt: skip
    if e_ptr is not None:
        out = e_ptr + rows[:, None] * stride_e + (cols - first_col)[None, :]
        tl.store(out, e.to(e_ptr.dtype.element_ty), mask=inside)


TILE_ROWS, TILE_WARPS = 4, 8  # of a program of the epilogue alone


def exp_gemm(
    hidden: Tensor,
    weight: Tensor,
    e: Tensor | None,
    ref: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    partial: Tensor | None,
    *,
    first_col: int,
    n_tiles: int,
    logits: Logits,
    stats: bool,
    gemm: Gemm,
    programs: int,
) -> None:
    """E of `hidden` [n, D] and `weight` [c, D], the vocabulary from `first_col` on, in one GEMM.

    Writes E [n, c] if given, and each tile's sums to `partial` [fields, n_tiles, n] (or, with
    `row_scale` [n], E = row_scale * exp(z - ref) and no sums). Descriptors need 16-bit operands
    and 16-byte aligned rows; `programs` bounds a persistent grid.
    """
    n, d = hidden.shape
    c = weight.shape[0]
    tiles = triton.cdiv(n, gemm.block_n) * triton.cdiv(c, gemm.block_v)
    shared = (ref, target, logits.bias, row_scale, partial, n, first_col, first_col + c)
    shared += (first_col // gemm.block_v, n_tiles, d, gemm.group)
    constants = {
        "BLOCK_N": gemm.block_n,
        "BLOCK_V": gemm.block_v,
        "BLOCK_K": gemm.block_k,
        "SOFTCAP": logits.softcap,
        "STATS": stats,
        "num_warps": gemm.warps,
        "num_stages": gemm.stages,
        **FUSE,
    }
    if gemm.loads == "pointer":
        even = d % gemm.block_k == 0
        _exp_gemm_kernel[(tiles,)](
            hidden, weight, e, *shared,
            hidden.stride(0), weight.stride(0), 0 if e is None else e.stride(0),
            logits.scale, logits.cap, EVEN_K=even, maxnreg=None if even else MOST_REGISTERS,
            **constants,
        )  # fmt: skip
        return
    persistent = gemm.loads == "persistent"
    e_desc = None
    if e is not None:
        e_desc = TensorDescriptor.from_tensor(e, [gemm.block_n, gemm.block_v])
    _exp_gemm_descriptor_kernel[(min(tiles, programs) if persistent else tiles,)](
        TensorDescriptor.from_tensor(hidden, [gemm.block_n, gemm.block_k]),
        TensorDescriptor.from_tensor(weight, [gemm.block_v, gemm.block_k]),
        e_desc, *shared, logits.scale, logits.cap,
        E_DTYPE=tl.bfloat16, PERSISTENT=persistent, **constants,
    )  # fmt: skip


def exp_tile(
    product: Tensor,
    e: Tensor | None,
    ref: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    partial: Tensor | None,
    *,
    first_col: int,
    n_tiles: int,
    logits: Logits,
    stats: bool,
    block_v: int,
) -> None:
    """As `exp_gemm`, from `product` [n, c] = hidden @ weight.T in fp32; `e` may be `product`."""
    n, c = product.shape
    _exp_tile_kernel[(triton.cdiv(n, TILE_ROWS), triton.cdiv(c, block_v))](
        product, e, ref, target, logits.bias, row_scale, partial,
        n, first_col, first_col + c, first_col // block_v, n_tiles,
        product.stride(0), 0 if e is None else e.stride(0), logits.scale, logits.cap,
        BLOCK_N=TILE_ROWS, BLOCK_V=block_v, SOFTCAP=logits.softcap, STATS=stats,
        num_warps=TILE_WARPS, **FUSE,
    )  # fmt: skip


def describable(*tensors: Tensor) -> bool:
    """Whether these matrices can be read through tensor descriptors: rows on 16-byte boundaries
    that do not overlap (an expanded row has a stride of 0)."""
    return all(
        t.dtype in (torch.float16, torch.bfloat16)
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in tensors
    )
