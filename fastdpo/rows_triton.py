"""Triton: the gradient of gathered rows, added up in one launch.

In steps of torch a gather whose rows occur twice takes five launches and reads and writes about 6 T
rows; here it is one, 2.5 T rows (T rows, half of them prompts that occur twice). For a layer's keys
and values, forward and backward, that is 4 launches where there were 12. On a 0.5B model, whose
rows have 256 bytes, launches are what counts: some 36 us of a layer's 1 ms become 12 (predicted,
not measured).
"""

# Triton's language is Python in syntax alone: checkers know neither its arguments nor its tensors.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def _sum_rows_kernel(
    grad_ptr,  # [M, width]
    order_ptr,  # [M] int64: places in grad, grouped by row of out
    bounds_ptr,  # [n_rows + 1] int64: where each row's group starts
    out_ptr,  # out: [n_rows, width]
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        place = tl.load(order_ptr + i)
        total += tl.load(grad_ptr + place * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_rows(grad: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    """[M, ...] -> [len(bounds) - 1, ...]: row r is the sum of `grad` at the places
    order[bounds[r] : bounds[r + 1]], in that order, in fp32; rows without places are 0."""
    n_rows, shape = len(bounds) - 1, grad.shape[1:]
    out = grad.new_empty((n_rows, *shape))
    if out.numel():
        width = shape.numel()
        grid = (n_rows, triton.cdiv(width, BLOCK))
        _sum_rows_kernel[grid](grad.contiguous(), order, bounds, out, width, BLOCK=BLOCK)
    return out
