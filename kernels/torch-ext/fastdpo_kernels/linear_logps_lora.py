"""A LoRA adapter (A [r, D], B [V, r], s) on the head of `linear_logps`: what joins it to the rest.

hidden @ W.T + u @ B.T, with u = s * hidden @ A.T, is one product of [hidden, u] and [W, B]. In 16
bits u is held in two numbers, itself and its rounding error, and the product is that of
[hidden, u, rest] and [W, B, B]: as exact as one with u in fp32, for r columns more. The same two
opaque ops serve eager calls and graphs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .impls import adapter_parts
from .linear_logps_call import TRANSFORMED, undisturbed
from .linear_logps_targets import blocks

_NAMESPACE = (__package__ or "fastdpo_kernels").replace(".", "_")
_CELLS = 2**20  # of hidden, raised to fp32 at once where no GEMM does that


@torch.library.custom_op(f"{_NAMESPACE}::linear_logps_beside_adapter", mutates_args=())
def beside_adapter(
    hidden: Tensor,
    a: Tensor,
    targets: Tensor,
    rounded: torch.dtype,
    scaling: float,
    ignore_index: int,
) -> Tensor:
    """[hidden, u] [N, D + r], or [hidden, u, its rest] [N, D + 2 r], in the dtype `rounded`.

    u is summed in fp32 (fp64). Ignored rows are 0: what they hold reaches no gradient.
    """
    n, (r, d) = len(hidden), a.shape
    joined = hidden.new_empty((n, d + adapter_parts(rounded) * r), dtype=rounded)
    rows, inner, rest = joined[:, :d], joined[:, d : d + r], joined[:, d + r :]
    a = a.to(rounded)
    with undisturbed(hidden.device):
        rows.copy_(hidden).masked_fill_((targets == ignore_index)[:, None], 0)
        for some in _parts(rows):
            u = _product(rows[some], a.mT).mul_(scaling)
            inner[some] = u
            if rest.shape[1]:
                rest[some] = u.sub_(inner[some])
    return joined


@beside_adapter.register_fake
def _(hidden, a, targets, rounded, scaling, ignore_index):
    n, (r, d) = hidden.shape[0], a.shape
    return hidden.new_empty((n, d + adapter_parts(rounded) * r), dtype=rounded)


@torch.library.custom_op(f"{_NAMESPACE}::linear_logps_adapter_grad", mutates_args=())
def _grads(
    grad: Tensor,
    joined: Tensor,
    a: Tensor,
    scaling: float,
    hidden_dtype: torch.dtype,
    need_hidden: bool,
    need_a: bool,
) -> list[Tensor]:
    """[d hidden [N, D], dA [r, D]], of these what is due; both sums in fp32, then rounded.

    u and its rest meet the same B, so their gradients are one and the same.
    """
    r, d = a.shape
    of_rows, of_u, rows = grad[:, :d], grad[:, d : d + r], joined[:, :d]
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = []
    with undisturbed(grad.device):
        if need_hidden:
            rounded = a.to(grad.dtype)
            if _is_whole(grad):
                d_hidden = torch.addmm(of_rows, of_u, rounded, alpha=scaling).to(hidden_dtype)
            else:
                d_hidden = grad.new_empty(of_rows.shape, dtype=hidden_dtype)
                for some in _parts(of_rows):
                    through = _product(of_u[some], rounded).mul_(scaling)
                    d_hidden[some] = through.add_(of_rows[some])
            found.append(d_hidden)
        if need_a:
            d_a = torch.zeros((r, d), dtype=wide, device=grad.device)
            for some in _parts(of_rows):
                d_a += _product(of_u[some].mT, rows[some])
            found.append(d_a.mul_(scaling).to(a.dtype))
    return found


@_grads.register_fake
def _(grad, joined, a, scaling, hidden_dtype, need_hidden, need_a):
    d_hidden = grad.new_empty((grad.shape[0], a.shape[1]), dtype=hidden_dtype)
    d_a = torch.empty_like(a, memory_format=torch.contiguous_format)
    return [d_hidden] * need_hidden + [d_a] * need_a


def _is_whole(rows: Tensor) -> bool:
    """Whether the GEMM sums in fp32 without operands being raised to it first."""
    return rows.is_cuda or rows.dtype.itemsize > 2


def _parts(rows: Tensor) -> Iterator[slice]:
    n, d = rows.shape
    for start, end in blocks(n, n if _is_whole(rows) else _CELLS // d):
        yield slice(start, end)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64)."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _setup(ctx, inputs, output) -> None:
    hidden, a, _, _, ctx.scaling, _ = inputs
    ctx.hidden_dtype = hidden.dtype
    ctx.save_for_backward(output, a)


def _backward(ctx, grad):
    joined, a = ctx.saved_tensors
    need_hidden, need_a, *_ = ctx.needs_input_grad
    found = _grads(grad, joined, a, ctx.scaling, ctx.hidden_dtype, need_hidden, need_a)
    d_hidden = found[0] if need_hidden else None
    return d_hidden, found[-1] if need_a else None, None, None, None, None


beside_adapter.register_autograd(_backward, setup_context=_setup)


def _no_second(ctx, grads):
    raise RuntimeError(
        "linear_logps has no second derivative: its gradient was finished in the forward pass; "
        'use impl="reference" to differentiate twice'
    )


_grads.register_autograd(_no_second)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(TRANSFORMED)


beside_adapter.register_vmap(_no_vmap)
_grads.register_vmap(_no_vmap)
