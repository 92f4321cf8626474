"""Library GEMMs (cuBLAS) of `linear_logps` on a GPU, with results in fp32.

Where the interpreter runs the other kernels, the products are a CPU's, of operands raised to fp32.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out [m, n] = a @ b, or += in fp32 (then `out` is fp32)."""
    if a.dtype == torch.float32 or a.dtype == out.dtype:
        if not a.is_cuda and a.dtype != torch.float32:  # the interpreter: CPUs sum bf16 coarsely
            out.copy_(a.float() @ b.float())
        elif add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif not a.is_cuda:
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_splits(out: Tensor, e: Tensor, w: Tensor, *, add: bool) -> None:
    """out [splits, n, D] (+)= e [n, c] @ w [c, D] by equal parts of c, in one batched GEMM.

    What does not divide goes to the first part.
    """
    splits, (n, c), d = out.shape[0], e.shape, w.shape[1]
    part = c // splits // 8 * 8
    if splits == 1 or part == 0:
        multiply(out[0], e, w, add=add)
        if not add:
            out[1:].zero_()
        return
    a = e.as_strided((splits, n, part), (part, e.stride(0), 1))
    b = w.as_strided((splits, part, d), (part * w.stride(0), w.stride(0), 1))
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.bmm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        torch.baddbmm(out, a.float(), b.float(), out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)
    if splits * part < c:
        multiply(out[0], e[:, splits * part :], w[splits * part :], add=True)


@contextlib.contextmanager
def whole_sums() -> Iterator[None]:
    """Library GEMMs without bf16 between the parts of a split sum."""
    matmul = torch.backends.cuda.matmul
    reduction = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction_split_k,
    )
    matmul.allow_bf16_reduced_precision_reduction = (False, reduction[1])
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduction
